"""Attention in plain einsums: the reference, anywhere, and over a KV cache.

Dimensions in names: B batch, S queries, T keys, H query heads, K key/value heads, G = H / K, N head_dim.
"""

import functools

import jax
import jax.numpy as jnp

from mateconv_jax.model import layers

# Low enough that exp() gives 0 in fp32, and finite: -inf - -inf would be NaN in a row that sees nothing.
MASKED = -1e30

dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def cached_attention(q_BSHN, k_BKNT, v_BKTN, positions_BS):
    """Attention of S new queries over a cache whose slot t holds position t: a query sees the slots up to its own."""
    seen_BST = jnp.arange(k_BKNT.shape[3]) <= positions_BS[..., None]
    return attend(q_BSHN, k_BKNT, v_BKTN, seen_BST)


def attend(q_BSHN, k_BKNT, v_BKTN, seen_BST, dropout_rate: float = 0.0, key_B=None):
    B, S, H, N = q_BSHN.shape
    K = k_BKNT.shape[1]
    q_BKGSN = q_BSHN.reshape(B, S, K, H // K, N).transpose(0, 2, 3, 1, 4) * N**-0.5
    scores_BKGST = dot("BKGSN,BKNT->BKGST", q_BKGSN, k_BKNT)
    scores_BKGST = jnp.where(seen_BST[:, None, None], scores_BKGST, MASKED)
    weights_BKGST = layers.dropout(jax.nn.softmax(scores_BKGST, axis=-1).astype(q_BSHN.dtype), dropout_rate, key_B)
    out_BKGSN = dot("BKGST,BKTN->BKGSN", weights_BKGST, v_BKTN)
    return out_BKGSN.transpose(0, 3, 1, 2, 4).reshape(B, S, H, N).astype(q_BSHN.dtype)
