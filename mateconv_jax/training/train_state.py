"""Everything that training changes, as one tree."""

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mateconv_jax.model import transformer


@flax.struct.dataclass
class LossScale:
    """What float16 gradients are multiplied by so that small ones do not vanish. Equals torch.amp.GradScaler's: halved by an
    overflow, doubled after 2,000 steps without one.
    """

    scale: jax.Array  # float32
    good_steps: jax.Array  # int32, since it last changed

    GROW_AFTER = 2000

    def update(self, finite: jax.Array) -> "LossScale":
        """After a step whose gradients were finite, or not."""
        grow = finite & (self.good_steps + 1 >= self.GROW_AFTER)
        scale = jnp.where(finite, jnp.where(grow, 2 * self.scale, self.scale), jnp.maximum(self.scale / 2, 1.0))
        return LossScale(scale, jnp.where(finite & ~grow, self.good_steps + 1, 0))


@flax.struct.dataclass
class LossAverage:
    """Mean and variance of the training loss over about the last 100 steps, fp32; steps: how many there were, int32."""

    mean: jax.Array
    variance: jax.Array
    steps: jax.Array

    OVER = 100

    def update(self, loss: jax.Array) -> "LossAverage":
        """With the loss of another step; one that is not finite changes nothing. Up to OVER steps they count equally (Welford,
        1962), from then on the last one 1 / OVER.
        """
        share = 1 / jnp.minimum(self.steps + 1, self.OVER)
        difference = loss - self.mean
        variance = (1 - share) * (self.variance + share * difference**2)
        new = LossAverage(self.mean + share * difference, variance, self.steps + 1)
        return jax.tree.map(lambda a, b: jnp.where(jnp.isfinite(loss), a, b), new, self)

    def is_spike(self, loss: jax.Array, deviations: float) -> jax.Array:
        """Whether `loss` is that many standard deviations above the mean; not in the first 100 steps."""
        return (self.steps >= self.OVER) & (loss > self.mean + deviations * jnp.sqrt(self.variance))


@flax.struct.dataclass
class TrainState:
    """step: optimizer steps done, int32, left out ones too. params: fp32 masters. ema_params: fp32, or None when EMA is off.
    loss_scale: None but in float16. bad_steps: how many of the last steps in a row were left out, int32.
    """

    step: jax.Array
    params: nnx.State
    ema_params: nnx.State | None
    opt_state: optax.OptState
    loss_scale: LossScale | None
    loss_average: LossAverage
    bad_steps: jax.Array


def init(c: transformer.ModelConfig, tx: optax.GradientTransformation, seed: int, use_ema: bool) -> TrainState:
    """A fresh state; the EMA starts at the parameters. Call it inside jit, with the shardings it shall have."""
    params = transformer.init_params(c, seed)
    return TrainState(
        step=jnp.int32(0),
        params=params,
        ema_params=jax.tree.map(jnp.copy, params) if use_ema else None,
        opt_state=tx.init(params),
        loss_scale=LossScale(jnp.float32(2**16), jnp.int32(0)) if c.dtype == jnp.float16 else None,
        loss_average=LossAverage(jnp.float32(0), jnp.float32(0), jnp.int32(0)),
        bad_steps=jnp.int32(0),
    )
