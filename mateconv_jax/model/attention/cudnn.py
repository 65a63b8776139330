"""cuDNN's fused attention for NVIDIA GPUs.

Dimensions in names: B batch, S queries, H query heads, K key/value heads, N head_dim.
"""

import contextlib
from collections.abc import Generator

import jax
import jax.numpy as jnp

from mateconv_jax.errors import UserError
from mateconv_jax.model.attention.request import Request


def refusal(request: Request) -> str | None:
    """Why the request is not supported, or None. The limits are cuDNN 9's flash attention's as jax.nn.dot_product_attention
    documents them, and even lengths, because cuDNN rejects odd ones.
    """
    capability = request.device.compute_capability
    if request.device.platform != "gpu" or capability is None:
        platform = "GPU of another vendor" if request.device.platform == "gpu" else request.device.platform
        return f"needs an NVIDIA GPU, and this device is a {platform}"
    if capability < (8, 0):
        return f"needs compute capability 8.0, and this GPU has {capability[0]}.{capability[1]}"
    if request.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, and the dtype is {jnp.dtype(request.dtype).name}"
    largest = 256 if capability >= (9, 0) else 128
    if request.head_dim % 8 or request.head_dim > largest:
        return f"needs model.head_dim to be a multiple of 8 up to {largest}, and it is {request.head_dim}"
    if request.length is not None and request.length % 2:
        return f"needs an even length, and data.seq_len is {request.length}"
    if request.dropout:
        return f"has no dropout on attention weights, and model.dropout is {request.dropout}"
    return None


def attention(q_BSHN, k_BSKN, v_BSKN, documents_BS=None, dropout=0.0, key_B=None):
    mask_B1SS = None if documents_BS is None else (documents_BS[:, :, None] == documents_BS[:, None])[:, None]
    return jax.nn.dot_product_attention(q_BSHN, k_BSKN, v_BSKN, mask=mask_B1SS, is_causal=True, implementation="cudnn")


@contextlib.contextmanager
def clear_rejections() -> Generator[None]:
    """Within the block, shapes that `refusal` accepts and cuDNN rejects when a program is compiled are a UserError."""
    try:
        yield
    except (ValueError, NotImplementedError, RuntimeError) as error:
        if "fused_attention" not in _files_of(error):
            raise
        raise UserError(
            f"model.attention: cuDNN rejects these shapes ({' '.join(str(error).split())[:200]}; expected an even "
            "data.seq_len and a model.head_dim divisible by 8, or --config.model.attention=xla)"
        ) from error


def _files_of(error: Exception) -> str:
    names, traceback = [], error.__traceback__
    while traceback is not None:
        names.append(traceback.tb_frame.f_code.co_filename)
        traceback = traceback.tb_next
    return " ".join(names)
