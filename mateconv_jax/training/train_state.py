"""Everything that training changes, as one tree."""

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mateconv_jax.model import transformer


@flax.struct.dataclass
class TrainState:
    """step: optimizer steps done, int32. params: fp32 masters. ema_params: fp32, or None when EMA is off."""

    step: jax.Array
    params: nnx.State
    ema_params: nnx.State | None
    opt_state: optax.OptState


def init(c: transformer.ModelConfig, tx: optax.GradientTransformation, seed: int, use_ema: bool) -> TrainState:
    """A fresh state; the EMA starts at the parameters. Call it inside jit, with the shardings it shall have."""
    params = transformer.init_params(c, seed)
    return TrainState(
        step=jnp.int32(0),
        params=params,
        ema_params=jax.tree.map(jnp.copy, params) if use_ema else None,
        opt_state=tx.init(params),
    )
