"""Rope scaling in GGUF files: Llama 3's as a tensor of divisors, YaRN as metadata.

Of YaRN, llama.cpp's `llama` and `qwen3` read rope.scaling.type, factor, original_context_length and attn_factor. They ignore
yarn_beta_fast and yarn_beta_slow (always 32 and 1, rounded to whole pairs) and the other yarn_ keys; log-probabilities of
llama.cpp did not move by a bit when those were changed (docs/LOG.md, 2026-11-26).
"""

import functools

import gguf
import numpy as np
from ml_collections import ConfigDict

from mateconv_jax import config as config_lib
from mateconv_jax.errors import UserError
from mateconv_jax.interop import hf_config
from mateconv_jax.interop.gguf_reader import GGUFFile
from mateconv_jax.interop.weight_mapping import Tensor
from mateconv_jax.model.rope import RotarySettings, rope_frequencies, yarn_attention_factor

DIVISORS = "rope_freqs.weight"  # Llama 3's scaling: what each pair's frequency is divided by, (N/2,)
# Settings of Llama 3's scaling that a file does not hold; these are Llama 3.1's and 3.2's.
LLAMA3 = dict(rope_scaling="llama3", rope_low_freq_factor=1.0, rope_high_freq_factor=4.0, rope_original_max_seq_len=8192)
# Settings of YaRN that llama.cpp does not read.
YARN = dict(rope_beta_fast=32.0, rope_beta_slow=1.0, rope_truncate=True)


def read(file: GGUFFile, architecture: str, plain: ConfigDict) -> ConfigDict:
    """The configuration with the file's rope scaling.

    Args:
      architecture: general.architecture.
      plain: config.model without it.

    Raises:
      UserError: another scaling, or settings that this model does not have.
    """
    prefix = f"{architecture}.rope.scaling."
    kind = file.get(f"{prefix}type", "none")
    if kind not in ("none", "yarn"):
        raise UserError(f"{file.path}: {prefix}type is {kind!r} (expected 'none' or 'yarn')")
    changes = {}
    if kind == "yarn":
        changes = _read_yarn(file, prefix, plain.max_seq_len)
    elif DIVISORS in file.tensors:
        original = file.number(f"{prefix}original_context_length", LLAMA3["rope_original_max_seq_len"])
        factor = float(file.read(DIVISORS).max())
        changes = LLAMA3 | {"rope_factor": factor, "rope_original_max_seq_len": original}
    config = hf_config.configuration(plain.to_dict() | changes, str(file.path))
    if DIVISORS in file.tensors:
        _check_divisors(file, kind, config.model)
    return config


def _read_yarn(file: GGUFFile, prefix: str, context_length: int) -> dict:
    # llama.cpp writes 1, and ignores it; its converter writes transformers' attention_factor there.
    file.check_only({f"{prefix}yarn_attn_factor": 1.0, f"{prefix}yarn_log_multiplier": 0.0})
    if (value := file.get(f"{prefix}yarn_ext_factor", 1.0)) not in (1.0, -1.0):  # -1: as the type says
        raise UserError(f"{file.path}: {prefix}yarn_ext_factor is {value!r} (expected 1.0, the only supported value)")
    factor = float(file.number(f"{prefix}factor"))
    scale = file.number(f"{prefix}attn_factor", 1.0)
    attention_factor = float(f"{scale * yarn_attention_factor(factor):.7g}")  # as many digits as its float32 has
    return {
        "rope_scaling": "yarn",
        "rope_factor": factor,
        "rope_original_max_seq_len": file.number(f"{prefix}original_context_length", context_length),
        "rope_beta_fast": float(file.number(f"{prefix}yarn_beta_fast", YARN["rope_beta_fast"])),
        "rope_beta_slow": float(file.number(f"{prefix}yarn_beta_slow", YARN["rope_beta_slow"])),
        "rope_attention_factor": None if scale == 1 else attention_factor,
    }


def _check_divisors(file: GGUFFile, kind: str, model: ConfigDict) -> None:
    if kind == "yarn":
        raise UserError(f"{file.path}: {DIVISORS} beside YaRN (expected one kind of rope scaling)")
    divisors_n, expected_n = file.read(DIVISORS), _divisors(model)
    if divisors_n.shape != expected_n.shape or not np.allclose(divisors_n, expected_n, rtol=1e-4, atol=0):
        raise UserError(
            f"{file.path}: {DIVISORS} is not Llama 3's scaling (expected rope_type 'llama3' with low_freq_factor 1, "
            f"high_freq_factor 4 and original_max_position_embeddings {model.rope_original_max_seq_len})"
        )


def _divisors(model: ConfigDict) -> np.ndarray:
    plain = model.copy_and_resolve_references()
    plain.rope_factor = 1.0
    return _frequencies(plain) / _frequencies(model)


def _frequencies(model: ConfigDict) -> np.ndarray:
    return rope_frequencies(config_lib.options(RotarySettings, model))


def check_writable(c: ConfigDict) -> None:
    """Raises UserError for rope scaling that llama.cpp does not have."""
    if c.rope_factor == 1:
        return
    if c.rope_scaling == "llama3" and (c.qk_norm or c.qkv_bias):
        key, name = ("qk_norm", "qwen3") if c.qk_norm else ("qkv_bias", "qwen2")
        raise UserError(
            f"--to: cannot be a .gguf file with model.rope_factor {c.rope_factor} (llama.cpp's {name} has no Llama 3 rope "
            f"scaling; expected model.rope_scaling yarn or model.{key} False)"
        )
    for key, value in YARN.items():
        if c.rope_scaling == "yarn" and c[key] != value:
            raise UserError(f"--to: cannot be a .gguf file with model.{key} {c[key]} (llama.cpp always uses {value})")


def add_scaling(writer: gguf.GGUFWriter, c: ConfigDict) -> dict[str, Tensor]:
    """Write the metadata of c's rope scaling. Returns the tensors that belong to it."""
    writer.add_rope_scaling_orig_ctx_len(c.rope_original_max_seq_len)
    if c.rope_scaling == "llama3":
        return {DIVISORS: Tensor((c.head_dim // 2,), functools.partial(_divisors, c))}
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(c.rope_factor)
    if c.rope_attention_factor is not None:  # llama.cpp multiplies it by the recommended one
        writer.add_rope_scaling_attn_factors(c.rope_attention_factor / yarn_attention_factor(c.rope_factor))
    return {}
