"""Everything that training changes, as one tree."""

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mateconv_jax.model import transformer


@flax.struct.dataclass
class LossScale:
    """Factor of float16 gradients that keeps small ones from vanishing. Behaves like torch.amp.GradScaler: halved by an
    overflow, doubled after 2,000 steps without one.

    Attributes:
      scale: float32.
      good_steps: int32, steps since the scale last changed.
    """

    scale: jax.Array
    good_steps: jax.Array

    GROW_AFTER = 2000

    def update(self, finite: jax.Array) -> "LossScale":
        """After a step; `finite`: whether its gradients were."""
        grow = finite & (self.good_steps + 1 >= self.GROW_AFTER)
        scale = jnp.where(finite, jnp.where(grow, 2 * self.scale, self.scale), jnp.maximum(self.scale / 2, 1.0))
        return LossScale(scale, jnp.where(finite & ~grow, self.good_steps + 1, 0))


@flax.struct.dataclass
class LossAverage:
    """Running statistics of the training loss over about the last 100 steps.

    Attributes:
      mean, variance: float32.
      steps: int32, losses seen so far.
    """

    mean: jax.Array
    variance: jax.Array
    steps: jax.Array

    OVER = 100

    def update(self, loss: jax.Array) -> "LossAverage":
        """Include the loss of another step; a non-finite one is ignored. The first OVER losses count equally (Welford, 1962);
        from then on the newest has weight 1 / OVER.
        """
        share = 1 / jnp.minimum(self.steps + 1, self.OVER)
        difference = loss - self.mean
        variance = (1 - share) * (self.variance + share * difference**2)
        new = LossAverage(self.mean + share * difference, variance, self.steps + 1)
        return jax.tree.map(lambda a, b: jnp.where(jnp.isfinite(loss), a, b), new, self)

    def is_spike(self, loss: jax.Array, deviations: float) -> jax.Array:
        """Whether `loss` is that many standard deviations above the mean; never in the first OVER steps."""
        return (self.steps >= self.OVER) & (loss > self.mean + deviations * jnp.sqrt(self.variance))


@flax.struct.dataclass
class TrainState:
    """The state of training.

    Attributes:
      step: int32, optimizer steps done, skipped updates included.
      params: fp32 masters.
      ema_params: fp32; None without EMA.
      opt_state: of the optimizer.
      loss_scale: None except in float16.
      loss_average: for finding spikes.
      bad_steps: int32, consecutive skipped updates up to now.
    """

    step: jax.Array
    params: nnx.State
    ema_params: nnx.State | None
    opt_state: optax.OptState
    loss_scale: LossScale | None
    loss_average: LossAverage
    bad_steps: jax.Array


def init(c: transformer.ModelConfig, tx: optax.GradientTransformation, seed: int, use_ema: bool) -> TrainState:
    """A fresh state; the EMA starts at the parameters. Call it inside jit with the shardings that the state shall have."""
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
