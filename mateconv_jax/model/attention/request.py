"""The attention request that a backend supports or refuses."""

import dataclasses

import jax.numpy as jnp

from mateconv_jax.model.device import Device


@dataclasses.dataclass(frozen=True)
class Request:
    """What decides which backends are usable.

    Attributes:
      dtype: of queries, keys and values.
      length: queries per row; None: any even length.
      dropout: rate of dropout on attention weights.
    """

    dtype: jnp.dtype
    head_dim: int
    length: int | None
    dropout: float
    device: Device
