"""Parameter counts, training FLOPs and peak device throughput, for model FLOP utilisation (MFU)."""

import jax
import jax.numpy as jnp

from mateconv_jax.model.config import ModelConfig
from mateconv_jax.model.moe import ROUTED
from mateconv_jax.model.transformer import abstract_model

# {part of jax's device_kind: dense bfloat16 and float16 peak in FLOP/s, from the data sheet}.
PEAKS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12}


def parameters(c: ModelConfig, at_least_dims: int = 0) -> tuple[int, int]:
    """(total, active per token) parameters in arrays of at least `at_least_dims` dimensions. Of the E routed experts, a token
    activates K.
    """
    total = active = 0
    for path, p in jax.tree.leaves_with_path(abstract_model(c)[1]):
        if p.ndim >= at_least_dims:
            is_routed = any(getattr(key, "key", None) in ROUTED for key in path)
            total += p.size
            active += p.size * c.num_experts_per_tok // c.n_routed_experts if is_routed else p.size
    return total, active


def training_flops_per_token(c: ModelConfig, seq_len: int) -> float:
    """Model FLOPs per token, forward and backward: 6 per active matrix weight (an embedding counts only if it is also the
    output layer) plus 6 L S H N for attention. As in PaLM (Chowdhery et al., 2022, appendix B), but with half of the S x S
    square because attention is causal. Only a token's chosen experts count, whatever the MoE backend computes.
    """
    weights = parameters(c, at_least_dims=2)[1]
    if not c.tie_word_embeddings:
        weights -= c.vocab_size * c.dim
    return 6 * weights + 6 * c.n_layers * seq_len * c.n_heads * c.head_dim


def peak_flops(device_kind: str, dtype: jnp.dtype) -> float | None:
    """Peak FLOP/s of one device in `dtype`; None if unknown."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return None
    return next((peak for name, peak in PEAKS.items() if name in device_kind), None)
