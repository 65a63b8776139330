"""Rotary position embedding, and its scalings for contexts longer than the model was first trained with.

A dimension is one letter of an array's name; see transformer.py. n = N / 2 pairs.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class RotarySettings:
    """What the angles depend on; see config_keys.py. rope_factor 1: no scaling, whatever rope_scaling is."""

    head_dim: int
    rope_theta: float
    rope_scaling: str
    rope_factor: float
    rope_original_max_seq_len: int
    rope_low_freq_factor: float
    rope_high_freq_factor: float
    rope_beta_fast: float
    rope_beta_slow: float
    rope_truncate: bool
    rope_attention_factor: float | None


def rope_frequencies(c: RotarySettings) -> np.ndarray:
    """Angular frequency of each rotary pair in radians per position, fp32 (N/2,): theta^(-2j/N) (Su et al., 2021), scaled as
    transformers' rope_type "llama3" or "yarn".
    """
    frequency_n = c.rope_theta ** (-np.arange(c.head_dim // 2) * 2 / c.head_dim)
    if c.rope_factor != 1:
        kept_n = {"llama3": _kept_by_llama3, "yarn": _kept_by_yarn}[c.rope_scaling](c, frequency_n)
        frequency_n = kept_n * frequency_n + (1 - kept_n) * frequency_n / c.rope_factor
    return frequency_n.astype(np.float32)


def _kept_by_llama3(c: RotarySettings, frequency_n: np.ndarray) -> np.ndarray:
    """Llama 3's scaling: frequencies of fewer than rope_low_freq_factor turns within the original context are divided by
    rope_factor (0), those of more than rope_high_freq_factor turns are kept (1), those between are mixed, linearly in turns.
    """
    turns_n = c.rope_original_max_seq_len * frequency_n / (2 * np.pi)
    return np.clip((turns_n - c.rope_low_freq_factor) / (c.rope_high_freq_factor - c.rope_low_freq_factor), 0, 1)


def _kept_by_yarn(c: RotarySettings, frequency_n: np.ndarray) -> np.ndarray:
    """YaRN (Peng et al., 2023): pairs of more than rope_beta_fast turns within the original context are kept (1), those of
    fewer than rope_beta_slow are divided (0), those between are mixed, linearly in the pair's number. rope_truncate widens
    that range to whole pairs.
    """

    def pair_of(turns: float) -> float:
        return c.head_dim * math.log(c.rope_original_max_seq_len / (turns * 2 * math.pi)) / (2 * math.log(c.rope_theta))

    first, last = pair_of(c.rope_beta_fast), pair_of(c.rope_beta_slow)
    if c.rope_truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, c.head_dim - 1)
    if first == last:
        last += 0.001  # transformers' own guard against dividing by 0
    return 1 - np.clip((np.arange(len(frequency_n)) - first) / (last - first), 0, 1)


def rope_attention_factor(c: RotarySettings) -> float:
    """What YaRN multiplies rotated queries and keys by; 1 without it."""
    if c.rope_factor == 1 or c.rope_scaling != "yarn":
        return 1.0
    return yarn_attention_factor(c.rope_factor) if c.rope_attention_factor is None else c.rope_attention_factor


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """The paper's recommendation, 0.1 ln(factor) + 1; DeepSeek weights the logarithm by `mscale`."""
    return 0.1 * mscale * math.log(factor) + 1.0


def rope_angles(c: RotarySettings, length: int, positions_BS=None):
    """(cosine, sine) of the angles at positions_BS, fp32 (B, S, 1, N/2), times YaRN's attention factor.

    positions_BS None: all of 0 .. length - 1, with B = 1.

    The table of `length` positions is computed in numpy. XLA would fuse the cosines into every loop that reads them and
    recompute them for each head and layer: on the CPU, rotating a layer's queries took 10 times as long.
    """
    angle_Tn = np.arange(length, dtype=np.float32)[:, None] * rope_frequencies(c)
    factor = np.float32(rope_attention_factor(c))
    tables = jnp.asarray(factor * np.cos(angle_Tn)), jnp.asarray(factor * np.sin(angle_Tn))
    return tuple(table_Tn[None, :, None] if positions_BS is None else table_Tn[positions_BS][:, :, None] for table_Tn in tables)


def rope(x_BSHN, angles):
    """Rotate the pairs (j, j + N/2) of each head (Su et al., 2021), the layout of Hugging Face's models."""
    cos, sin = angles
    a, b = jnp.split(x_BSHN.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BSHN.dtype)
