"""Parameter counts, training FLOPs and peak device throughput, for model FLOP utilisation (MFU)."""

import jax
import jax.numpy as jnp

from mateconv_jax.model.config import ModelConfig
from mateconv_jax.model.moe import ROUTED
from mateconv_jax.model.transformer import abstract_model

# {jax's device_kind, which is the driver's name: dense peak of matrix products in FLOP/s, accumulated in float32 as XLA does}.
# GeForce cards accumulate in float32 at half the advertised rate; where a data sheet has only the sparse peak, half of it.
# Names: NVIDIA/open-gpu-kernel-modules, README.md, "Compatible GPUs". One that is not here stays unknown: cards of one name may
# differ (RTX 3080 with 10 and 12 GB), and a laptop's have no fixed clock.
PEAKS = {
    # HGX B200 and GB200 NVL72 data sheets (4.5 and 5 PFLOP/s sparse).
    "NVIDIA B200": 2250e12, "NVIDIA GB200": 2500e12,
    # H100 data sheet (SXM, PCIe, NVL), H200 and GH200 data sheets; those for China: H800 as the H100, H20 148.
    "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H100 NVL": 835e12, "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12, "NVIDIA GH200 120GB": 989e12, "NVIDIA GH200 480GB": 989e12, "NVIDIA H800": 989e12,
    "NVIDIA H800 PCIe": 756e12, "NVIDIA H20": 148e12,
    # A100, A800, A30, A40, A10 and A10G data sheets.
    "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12, "NVIDIA A800-SXM4-40GB": 312e12, "NVIDIA A800-SXM4-80GB": 312e12,
    "NVIDIA A800 80GB PCIe": 312e12, "NVIDIA A800 40GB Active": 312e12, "NVIDIA A30": 165e12, "NVIDIA A40": 149.7e12,
    "NVIDIA A10": 125e12, "NVIDIA A10G": 70e12,
    # L40S, L40, L20 and L4 data sheets.
    "NVIDIA L40S": 362e12, "NVIDIA L40": 181e12, "NVIDIA L20": 119.5e12, "NVIDIA L4": 121e12,
    # RTX A6000, A5000, A4000, RTX 6000 and 5000 Ada data sheets: a half of "tensor performance", for Ada, where it is FP8, a
    # quarter.
    "NVIDIA RTX A6000": 154.8e12, "NVIDIA RTX A5000": 111.1e12, "NVIDIA RTX A4000": 76.7e12,
    "NVIDIA RTX 6000 Ada Generation": 364e12, "NVIDIA RTX 5000 Ada Generation": 261e12,
    # GA102, Ada and RTX Blackwell whitepapers, "Peak FP16 Tensor TFLOPS with FP32 Accumulate". The 4090 D: 14,592 cores at 2.52
    # GHz, each with four FLOPs a cycle as the 4090's.
    "NVIDIA GeForce RTX 3090": 71e12, "NVIDIA GeForce RTX 3090 Ti": 80e12, "NVIDIA GeForce RTX 4080": 97.5e12,
    "NVIDIA GeForce RTX 4090": 165e12, "NVIDIA GeForce RTX 4090 D": 147e12, "NVIDIA GeForce RTX 5080": 112.6e12,
    "NVIDIA GeForce RTX 5090": 209.5e12,
}  # fmt: skip
# The same of GPUs without bfloat16. V100 and T4 data sheets; Turing whitepaper (reference clock).
FLOAT16_PEAKS = {
    "Tesla V100-SXM2-16GB": 125e12, "Tesla V100-SXM2-32GB": 125e12, "Tesla V100-PCIE-16GB": 112e12,
    "Tesla V100-PCIE-32GB": 112e12, "Tesla V100S-PCIE-32GB": 130e12, "Tesla T4": 65e12, "NVIDIA GeForce RTX 2080 Ti": 53.8e12,
}  # fmt: skip


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
    if dtype == jnp.float16 and device_kind in FLOAT16_PEAKS:
        return FLOAT16_PEAKS[device_kind]
    return PEAKS.get(device_kind) if dtype in (jnp.bfloat16, jnp.float16) else None
