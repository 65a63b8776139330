"""Filters over next-token logits: pure functions (logits_BV) -> logits_BV, fp32. What is filtered out becomes -inf.

Order and boundaries are those of transformers' processors: temperature, top-k, top-p.
"""

import jax
import jax.numpy as jnp


def temperature(logits_BV, value):
    """Divide by `value` > 0 (transformers' TemperatureLogitsWarper)."""
    return logits_BV / value


def top_k(logits_BV, k: int):
    """Keep the k highest; ties with the k-th stay (transformers' TopKLogitsWarper). k is static, 1 <= k <= V."""
    kth_B1 = jax.lax.top_k(logits_BV, k)[0][:, -1:]
    return jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)


def top_p(logits_BV, p):
    """Nucleus filter (Holtzman et al., 2020): keep the smallest set whose probability reaches p.

    Same boundary as transformers' TopPLogitsWarper: tokens from the lowest up go as long as their summed probability is
    at most 1 - p; the highest always stays.
    """
    order_BV = jnp.argsort(logits_BV, axis=-1)  # ascending, stable
    cumulative_BV = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, axis=-1), axis=-1), axis=-1)
    remove_sorted_BV = (cumulative_BV <= 1 - p).at[:, -1].set(False)
    remove_BV = jnp.zeros_like(remove_sorted_BV).at[jnp.arange(logits_BV.shape[0])[:, None], order_BV].set(remove_sorted_BV)
    return jnp.where(remove_BV, -jnp.inf, logits_BV)
