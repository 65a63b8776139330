"""What a backend is asked to serve."""

import dataclasses

import jax.numpy as jnp

from mateconv_jax.model.device import Device


@dataclasses.dataclass(frozen=True)
class Request:
    """Attributes:
    length: queries of a row; None: any that is even.
    dropout: share of the attention weights that training drops.
    """

    dtype: jnp.dtype
    head_dim: int
    length: int | None
    dropout: float
    device: Device
