"""How much arithmetic training takes, and how much a device could do."""

import jax
import jax.numpy as jnp

from mateconv_jax.model.config import ModelConfig
from mateconv_jax.model.moe import ROUTED
from mateconv_jax.model.transformer import abstract_model

# Dense bfloat16 and float16 peaks by data sheet, FLOP/s; a part of jax's device_kind.
PEAKS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12}


def parameters(c: ModelConfig, at_least_dims: int = 0) -> tuple[int, int]:
    """(all, those that one token meets: of E routed experts K), counting arrays of that many dimensions."""
    total = active = 0
    for path, p in jax.tree.leaves_with_path(abstract_model(c)[1]):
        if p.ndim >= at_least_dims:
            is_routed = any(getattr(key, "key", None) in ROUTED for key in path)
            total += p.size
            active += p.size * c.num_experts_per_tok // c.n_routed_experts if is_routed else p.size
    return total, active


def training_flops_per_token(c: ModelConfig, seq_len: int) -> float:
    """Forward and backward: 6 for each weight of a matrix product that a token meets (an embedding counts only where it is the
    output layer), and 6 L S H N for causal attention, half of the full square (as in PaLM, Chowdhery et al., 2022, appendix B,
    but causal). What is needed, that is: of a mixture's experts the chosen ones, whatever its backend computes.
    """
    weights = parameters(c, at_least_dims=2)[1]
    if not c.tie_word_embeddings:
        weights -= c.vocab_size * c.dim
    return 6 * weights + 6 * c.n_layers * seq_len * c.n_heads * c.head_dim


def peak_flops(device_kind: str, dtype: jnp.dtype) -> float | None:
    """Of one device in `dtype`, FLOP/s; None where it is not known."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return None
    return next((peak for name, peak in PEAKS.items() if name in device_kind), None)
