"""Rotary position embedding.

Dimensions in names: B batch, S sequence, T positions of a table, H heads, N head_dim, n = N / 2 pairs.
"""

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mateconv_jax.model.config import ModelConfig


def rope_frequencies(c: ModelConfig | ConfigDict) -> np.ndarray:
    """Angular frequency of each rotary pair in radians per position, fp32 (N/2,): theta^(-2j/N) (Su et al., 2021).

    With rope_factor other than 1, Llama 3's scaling (transformers' `rope_type="llama3"`): frequencies of fewer than
    rope_low_freq_factor turns within rope_original_max_seq_len are divided by rope_factor, those of more than
    rope_high_freq_factor turns are unchanged, and those between are interpolated.
    """
    frequency_n = c.rope_theta ** (-np.arange(c.head_dim // 2) * 2 / c.head_dim)
    if c.rope_factor != 1:
        turns_n = c.rope_original_max_seq_len * frequency_n / (2 * np.pi)
        smooth_n = (turns_n - c.rope_low_freq_factor) / (c.rope_high_freq_factor - c.rope_low_freq_factor)
        smooth_n = np.clip(smooth_n, 0, 1)
        frequency_n = smooth_n * frequency_n + (1 - smooth_n) * frequency_n / c.rope_factor
    return frequency_n.astype(np.float32)


def rope_angles(c: ModelConfig, length: int, positions_BS=None):
    """(cosine, sine) of the angles at positions_BS, fp32 (B, S, 1, N/2); positions_BS None: all of 0 .. length - 1, with B = 1.

    The table of `length` positions is computed in numpy. XLA would fuse the cosines into every loop that reads them and
    recompute them for each head and layer: on the CPU, rotating a layer's queries took 10 times as long.
    """
    angle_Tn = np.arange(length, dtype=np.float32)[:, None] * rope_frequencies(c)
    tables = jnp.asarray(np.cos(angle_Tn)), jnp.asarray(np.sin(angle_Tn))
    return tuple(table_Tn[None, :, None] if positions_BS is None else table_Tn[positions_BS][:, :, None] for table_Tn in tables)


def rope(x_BSHN, angles):
    """Rotate the pairs (j, j + N/2) of each head (Su et al., 2021), the layout of Hugging Face's models."""
    cos, sin = angles
    a, b = jnp.split(x_BSHN.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BSHN.dtype)
