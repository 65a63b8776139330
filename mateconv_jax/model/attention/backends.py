"""Causal grouped-query attention: three backends with one meaning.

Dimensions in names: B batch, S queries, T keys, H query heads, K key/value heads, G = H / K, N head_dim.
"""

import jax
import jax.numpy as jnp

from mateconv_jax.errors import UserError
from mateconv_jax.model.attention import blocked
from mateconv_jax.model.attention.xla import attend


def choose_backend(name: str, platform: str, dtype: jnp.dtype, dropout: float = 0.0) -> str:
    """The backend that serves `name` ('auto' or a backend's own name) for a computation in `dtype` on `platform`.

    cudnn: cuDNN's fused attention, on NVIDIA GPUs in bfloat16 or float16. blocked: no S x S matrix is ever whole, 3
    times faster than xla on the CPU. xla: plain einsums, the reference, anywhere, and the only one with dropout.

    Raises:
      UserError: the backend asked for cannot run there. Nothing falls back silently.
    """
    half = dtype in (jnp.bfloat16, jnp.float16)
    if dropout and name not in ("auto", "xla"):
        raise UserError(f"model.attention: {name} cannot drop weights (with model.dropout={dropout} expected auto or xla)")
    if dropout:
        return "xla"
    if name == "auto":
        if platform == "gpu":
            return "cudnn" if half else "xla"
        return "blocked" if platform == "cpu" else "xla"
    if name == "cudnn" and not (platform == "gpu" and half):
        raise UserError(
            f"model.attention: cudnn needs an NVIDIA GPU and bfloat16, here it would be {platform} and "
            f"{jnp.dtype(dtype).name} (expected auto, blocked or xla)"
        )
    return name


def causal_attention(q_BSHN, k_BSKN, v_BSKN, backend: str, documents_BS=None, dropout: float = 0.0, key_B=None):
    """softmax(q k^T / sqrt(N), causal) v for grouped queries: head h reads key/value head h // (H / K).

    Args:
      q_BSHN, k_BSKN, v_BSKN: one dtype, rotary embedding applied.
      backend: from `choose_backend`.
      documents_BS: int32 numbers; a query sees the keys of its own document only. None: all before it.
      dropout, key_B: share of the weights that are dropped, of the xla backend; no keys, no dropout.

    Returns:
      (B, S, H, N) in the same dtype; the softmax is fp32.
    """
    if backend == "cudnn":
        mask_B1SS = None if documents_BS is None else (documents_BS[:, :, None] == documents_BS[:, None])[:, None]
        return jax.nn.dot_product_attention(q_BSHN, k_BSKN, v_BSKN, mask=mask_B1SS, is_causal=True, implementation="cudnn")
    if backend == "blocked":
        # In fp32: XLA's CPU backend has no such products of halves (bfloat16: "Unsupported element type for DotThunk").
        q_BSHN32, k_BSKN32, v_BSKN32 = (x.astype(jnp.float32) for x in (q_BSHN, k_BSKN, v_BSKN))
        return blocked.attention(q_BSHN32, k_BSKN32, v_BSKN32, documents_BS).astype(q_BSHN.dtype)
    if backend == "xla":
        positions_S = jnp.arange(q_BSHN.shape[1])
        seen_BST = (positions_S[:, None] >= positions_S)[None]
        if documents_BS is not None:
            seen_BST &= documents_BS[:, :, None] == documents_BS[:, None]
        k_BKNS, v_BKSN = k_BSKN.transpose(0, 2, 3, 1), v_BSKN.transpose(0, 2, 1, 3)
        return attend(q_BSHN, k_BKNS, v_BKSN, seen_BST, dropout, key_B)
    raise ValueError(f"unknown attention backend {backend!r}")
