"""Attention in plain einsums: the reference backend, for any device, and attention over a KV cache.

Dimensions in names: B batch, S queries, T keys, H query heads, K key/value heads, G = H / K, N head_dim.
"""

import functools

import jax
import jax.numpy as jnp

from mateconv_jax.model import layers
from mateconv_jax.model.attention.request import Request

# Low enough that exp() gives 0 in fp32, but finite: a fully masked row would compute -inf - -inf = NaN.
MASKED = -1e30

dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def refusal(request: Request) -> str | None:
    """None: every request is supported, if slowly."""
    return None


def attention(q_BSHN, k_BSKN, v_BSKN, documents_BS=None, dropout=0.0, key_B=None):
    positions_S = jnp.arange(q_BSHN.shape[1])
    mask_BST = (positions_S[:, None] >= positions_S)[None]
    if documents_BS is not None:
        mask_BST &= documents_BS[:, :, None] == documents_BS[:, None]
    k_BKNS, v_BKSN = k_BSKN.transpose(0, 2, 3, 1), v_BSKN.transpose(0, 2, 1, 3)
    return attend(q_BSHN, k_BKNS, v_BKSN, mask_BST, dropout, key_B)


def cached_attention(q_BSHN, k_BKNT, v_BKTN, positions_BS):
    """Attention of S new queries over a cache whose slot t holds position t; a query attends up to its own position."""
    mask_BST = jnp.arange(k_BKNT.shape[3]) <= positions_BS[..., None]
    return attend(q_BSHN, k_BKNT, v_BKTN, mask_BST)


def attend(q_BSHN, k_BKNT, v_BKTN, mask_BST, dropout_rate: float = 0.0, key_B=None):
    """Attention with an explicit mask: mask_BST (B or 1, S, T) is True where a query may attend. Scores and softmax are fp32;
    the result (B, S, H, N) has q's dtype.
    """
    B, S, H, N = q_BSHN.shape
    K = k_BKNT.shape[1]
    q_BKGSN = q_BSHN.reshape(B, S, K, H // K, N).transpose(0, 2, 3, 1, 4) * N**-0.5
    scores_BKGST = dot("BKGSN,BKNT->BKGST", q_BKGSN, k_BKNT)
    scores_BKGST = jnp.where(mask_BST[:, None, None], scores_BKGST, MASKED)
    weights_BKGST = layers.dropout(jax.nn.softmax(scores_BKGST, axis=-1).astype(q_BSHN.dtype), dropout_rate, key_B)
    out_BKGSN = dot("BKGST,BKTN->BKGSN", weights_BKGST, v_BKTN)
    return out_BKGSN.transpose(0, 3, 1, 2, 4).reshape(B, S, H, N).astype(q_BSHN.dtype)
