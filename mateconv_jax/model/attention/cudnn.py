"""cuDNN's fused attention, for NVIDIA GPUs.

Dimensions in names: B batch, S queries, H query heads, K key/value heads, N head_dim.
"""

import jax
import jax.numpy as jnp

from mateconv_jax.model.attention.request import Request


def refusal(request: Request) -> str | None:
    """Why it cannot serve; None: it can. The limits of cuDNN 9's flash attention, as jax.nn.dot_product_attention states them;
    lengths that are odd cuDNN itself refuses.
    """
    capability = request.device.compute_capability
    if request.device.platform != "gpu" or capability is None:
        kind = "gpu of another kind" if request.device.platform == "gpu" else request.device.platform
        return f"it needs an NVIDIA GPU, and this is a {kind}"
    if capability < (8, 0):
        return f"it needs compute capability 8.0, and this GPU has {capability[0]}.{capability[1]}"
    if request.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 or float16, and this is {jnp.dtype(request.dtype).name}"
    largest = 256 if capability >= (9, 0) else 128
    if request.head_dim % 8 or request.head_dim > largest:
        return f"it needs a model.head_dim that is a multiple of 8 up to {largest}, and this is {request.head_dim}"
    if request.length is not None and request.length % 2:
        return f"it needs an even length, and data.seq_len is {request.length}"
    if request.dropout:
        return f"it cannot drop weights, and model.dropout is {request.dropout}"
    return None


def attention(q_BSHN, k_BSKN, v_BSKN, documents_BS=None, dropout=0.0, key_B=None):
    mask_B1SS = None if documents_BS is None else (documents_BS[:, :, None] == documents_BS[:, None])[:, None]
    return jax.nn.dot_product_attention(q_BSHN, k_BSKN, v_BSKN, mask=mask_B1SS, is_causal=True, implementation="cudnn")
