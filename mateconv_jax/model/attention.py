"""Causal grouped-query attention: three backends with one meaning, and attention over a KV cache.

Dimensions in names: B batch, S queries, T keys, H query heads, K key/value heads, G = H / K, N head_dim.
"""

import functools

import jax
import jax.numpy as jnp

from mateconv_jax.errors import UserError

# Low enough that exp() gives 0 in fp32, and finite: -inf - -inf would be NaN in a row that sees nothing.
MASKED = -1e30

_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def choose_backend(name: str, platform: str, dtype: jnp.dtype, dropout: float = 0.0) -> str:
    """The backend that serves `name` ('auto' or a backend's own name) for a computation in `dtype` on `platform`.

    cudnn: cuDNN's fused attention, on NVIDIA GPUs in bfloat16 or float16. blocked: no S x S matrix is ever whole, 2.3
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


def causal_attention(q_BSHN, k_BSKN, v_BSKN, backend: str, documents_BS=None, dropout: float = 0.0, dropout_key=None):
    """softmax(q k^T / sqrt(N), causal) v for grouped queries: head h reads key/value head h // (H / K).

    Args:
      q_BSHN, k_BSKN, v_BSKN: one dtype, rotary embedding applied.
      backend: from `choose_backend`.
      documents_BS: int32 numbers; a query sees the keys of its own document only. None: all before it.
      dropout, dropout_key: share of the weights that are dropped, of the xla backend; no key, no dropout.

    Returns:
      (B, S, H, N) in the same dtype; the softmax is fp32.
    """
    if backend == "cudnn":
        mask_B1SS = None if documents_BS is None else (documents_BS[:, :, None] == documents_BS[:, None])[:, None]
        return jax.nn.dot_product_attention(q_BSHN, k_BSKN, v_BSKN, mask=mask_B1SS, is_causal=True, implementation="cudnn")
    if backend == "blocked":
        return _blocked_attention(q_BSHN, k_BSKN, v_BSKN, documents_BS)
    if backend == "xla":
        positions_S = jnp.arange(q_BSHN.shape[1])
        seen_BST = (positions_S[:, None] >= positions_S)[None]
        if documents_BS is not None:
            seen_BST &= documents_BS[:, :, None] == documents_BS[:, None]
        k_BKNS, v_BKSN = k_BSKN.transpose(0, 2, 3, 1), v_BSKN.transpose(0, 2, 1, 3)
        return _attend(q_BSHN, k_BKNS, v_BKSN, seen_BST, dropout, dropout_key)
    raise ValueError(f"unknown attention backend {backend!r}")


def cached_attention(q_BSHN, k_BKNT, v_BKTN, positions_BS):
    """Attention of S new queries over a cache whose slot t holds position t: a query sees the slots up to its own."""
    seen_BST = jnp.arange(k_BKNT.shape[3]) <= positions_BS[..., None]
    return _attend(q_BSHN, k_BKNT, v_BKTN, seen_BST)


def dropout(x, rate: float, key):
    """Zeros for a share `rate` of x, the rest divided by 1 - rate (Srivastava et al., 2014); without a key x itself."""
    if not rate or key is None:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


def _attend(q_BSHN, k_BKNT, v_BKTN, seen_BST, dropout_rate: float = 0.0, dropout_key=None):
    B, S, H, N = q_BSHN.shape
    K = k_BKNT.shape[1]
    q_BKGSN = q_BSHN.reshape(B, S, K, H // K, N).transpose(0, 2, 3, 1, 4) * N**-0.5
    scores_BKGST = _dot("BKGSN,BKNT->BKGST", q_BKGSN, k_BKNT)
    scores_BKGST = jnp.where(seen_BST[:, None, None], scores_BKGST, MASKED)
    weights_BKGST = dropout(jax.nn.softmax(scores_BKGST, axis=-1).astype(q_BSHN.dtype), dropout_rate, dropout_key)
    out_BKGSN = _dot("BKGST,BKTN->BKGSN", weights_BKGST, v_BKTN)
    return out_BKGSN.transpose(0, 3, 1, 2, 4).reshape(B, S, H, N).astype(q_BSHN.dtype)


# ---- blocked ------------------------------------------------------------------------------------------------------
# FlashAttention's idea (Dao et al., 2022) in plain XLA. A block of queries meets only its prefix of keys, which saves
# half of the work; the queries of a group are folded into rows of one matrix; the backward pass recomputes the weights
# from the log-sum-exp instead of keeping them. Inside, layouts are B K G S N, and R = G * block rows.

BLOCK = 64  # queries; on 2 cores blocks of 128 and 256 were 1.2 and 1.5 times slower at S = 512


def _blocked_attention(q_BSHN, k_BSKN, v_BSKN, documents_BS):
    B, S, H, N = q_BSHN.shape
    K = k_BSKN.shape[2]
    q_BKGSN = q_BSHN.reshape(B, S, K, H // K, N).transpose(0, 2, 3, 1, 4) * N**-0.5
    out_BKGSN = _blocked(q_BKGSN, k_BSKN.transpose(0, 2, 1, 3), v_BSKN.transpose(0, 2, 1, 3), documents_BS)
    return out_BKGSN.transpose(0, 3, 1, 2, 4).reshape(B, S, H, N)


def _rows(x_BKGSN, block):
    """The block's queries as rows of one matrix per key/value head: (B, K, G * block, N)."""
    B, K, G, _, N = x_BKGSN.shape
    return x_BKGSN[:, :, :, block].reshape(B, K, -1, N)


def _block_scores(q_BKGSN, k_BKSN, documents_BS, block):
    """Masked fp32 scores (B, K, G, block, T) of one block of queries against its prefix of keys."""
    B, K, G, _, _ = q_BKGSN.shape
    scores_BKRT = _dot("BKRN,BKTN->BKRT", _rows(q_BKGSN, block), k_BKSN[:, :, : block.stop])
    seen = jnp.arange(block.start, block.stop)[:, None] >= jnp.arange(block.stop)
    if documents_BS is not None:
        seen = (seen & (documents_BS[:, block, None] == documents_BS[:, None, : block.stop]))[:, None, None]
    return jnp.where(seen, scores_BKRT.reshape(B, K, G, -1, block.stop), MASKED)


def _blocks(S):
    return [slice(start, min(start + BLOCK, S)) for start in range(0, S, BLOCK)]


@jax.custom_vjp
def _blocked(q_BKGSN, k_BKSN, v_BKSN, documents_BS):
    return _blocked_forward(q_BKGSN, k_BKSN, v_BKSN, documents_BS)[0]


def _blocked_forward(q_BKGSN, k_BKSN, v_BKSN, documents_BS):
    dtype = q_BKGSN.dtype
    outs, log_sums = [], []
    for block in _blocks(q_BKGSN.shape[3]):
        scores = _block_scores(q_BKGSN, k_BKSN, documents_BS, block)
        highest = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = weights.sum(-1, keepdims=True)
        weights_BKRT = weights.astype(dtype).reshape(*weights.shape[:2], -1, block.stop)
        out = _dot("BKRT,BKTN->BKRN", weights_BKRT, v_BKSN[:, :, : block.stop])
        outs.append((out.reshape(*scores.shape[:-1], -1) / total).astype(dtype))
        log_sums.append(highest + jnp.log(total))
    out_BKGSN, log_sum_BKGS1 = jnp.concatenate(outs, 3), jnp.concatenate(log_sums, 3)
    return out_BKGSN, (q_BKGSN, k_BKSN, v_BKSN, documents_BS, out_BKGSN, log_sum_BKGS1)


def _blocked_backward(saved, d_out_BKGSN):
    q_BKGSN, k_BKSN, v_BKSN, documents_BS, out_BKGSN, log_sum_BKGS1 = saved
    dtype = q_BKGSN.dtype
    delta_BKGS1 = jnp.sum(d_out_BKGSN.astype(jnp.float32) * out_BKGSN, -1, keepdims=True)
    d_qs, d_k_BKSN, d_v_BKSN = [], jnp.zeros(k_BKSN.shape, jnp.float32), jnp.zeros(v_BKSN.shape, jnp.float32)
    for block in _blocks(q_BKGSN.shape[3]):
        weights = jnp.exp(_block_scores(q_BKGSN, k_BKSN, documents_BS, block) - log_sum_BKGS1[:, :, :, block])
        d_out_BKRN = _rows(d_out_BKGSN, block)
        d_weights = _dot("BKRN,BKTN->BKRT", d_out_BKRN, v_BKSN[:, :, : block.stop]).reshape(weights.shape)
        d_scores = weights * (d_weights - delta_BKGS1[:, :, :, block])
        d_scores_BKRT = d_scores.astype(dtype).reshape(*weights.shape[:2], -1, block.stop)
        weights_BKRT = weights.astype(dtype).reshape(d_scores_BKRT.shape)
        d_q_BKRN = _dot("BKRT,BKTN->BKRN", d_scores_BKRT, k_BKSN[:, :, : block.stop])
        d_qs.append(d_q_BKRN.reshape(*weights.shape[:-1], -1).astype(dtype))
        d_k_BKSN = d_k_BKSN.at[:, :, : block.stop].add(_dot("BKRT,BKRN->BKTN", d_scores_BKRT, _rows(q_BKGSN, block)))
        d_v_BKSN = d_v_BKSN.at[:, :, : block.stop].add(_dot("BKRT,BKRN->BKTN", weights_BKRT, d_out_BKRN))
    return jnp.concatenate(d_qs, 3), d_k_BKSN.astype(dtype), d_v_BKSN.astype(dtype), None


_blocked.defvjp(_blocked_forward, _blocked_backward)
