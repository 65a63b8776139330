"""Rotary position embedding.

Dimensions in names: B batch, S sequence, T positions of a table, H heads, N head_dim, n = N / 2 pairs.
"""

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mateconv_jax.model.config import ModelConfig


def rope_frequencies(c: ModelConfig | ConfigDict) -> np.ndarray:
    """Radians a position of each rotary pair, fp32 (N/2,): theta^(-2j/N) (Su et al., 2021), and with rope_factor above 1 Llama
    3's scaling (transformers' `rope_type="llama3"`): pairs that turn less than rope_low_freq_factor times within
    rope_original_max_seq_len are slowed down rope_factor times, those above rope_high_freq_factor not, between them in part.
    """
    frequency_n = c.rope_theta ** (-np.arange(c.head_dim // 2) * 2 / c.head_dim)
    if c.rope_factor != 1:
        turns_n = c.rope_original_max_seq_len * frequency_n / (2 * np.pi)
        kept_n = (turns_n - c.rope_low_freq_factor) / (c.rope_high_freq_factor - c.rope_low_freq_factor)
        kept_n = np.clip(kept_n, 0, 1)
        frequency_n = kept_n * frequency_n + (1 - kept_n) * frequency_n / c.rope_factor
    return frequency_n.astype(np.float32)


def rope_angles(c: ModelConfig, length: int, positions_BS=None):
    """(cosine, sine) of each position's angles, fp32 (B, S, 1, N/2), out of a table of `length`; None: of all, B = 1.

    A table made by numpy: XLA would fuse its own cosines into every loop that reads them and make them anew for each head and
    layer; on the CPU the loop that rotates a layer's queries took 10 times as long.
    """
    angle_Tn = np.arange(length, dtype=np.float32)[:, None] * rope_frequencies(c)
    tables = jnp.asarray(np.cos(angle_Tn)), jnp.asarray(np.sin(angle_Tn))
    return tuple(table_Tn[None, :, None] if positions_BS is None else table_Tn[positions_BS][:, :, None] for table_Tn in tables)


def rope(x_BSHN, angles):
    """Rotary position embedding (Su et al., 2021) on half-split pairs (j, j + N/2), as Hugging Face lays them out."""
    cos, sin = angles
    a, b = jnp.split(x_BSHN.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BSHN.dtype)
