"""Blocked causal attention for the CPU: the S x S scores are never materialised.

Dimensions in names: B batch, S queries, T keys, H query heads, K key/value heads, G = H / K, N head_dim, I turns of n key/value
heads, C = B n rows of one turn.
"""

import jax
import jax.numpy as jnp

from mateconv_jax.model.attention.request import Request
from mateconv_jax.model.attention.xla import MASKED, dot

# FlashAttention (Dao et al., 2022) in plain XLA. Each block of queries is multiplied only with the keys up to its end, which
# halves the work; the backward pass recomputes the attention weights from the log-sum-exp instead of storing them. Scores are
# laid out (keys, queries): every one of the seven matmuls is fastest this way (the key and value gradients took twice as long
# otherwise), and the softmax vectorises over queries.

BLOCK = 64  # queries; on 2 cores 128 was 1.1 and 256 1.3 times slower at S = 512
# Key/value heads are processed in turns, so that a turn's scores stay in the CPU cache: 1.2 times faster than all at once.
TURN = 2**19  # most scores of one block in a turn; a turn has at least one head


def refusal(request: Request) -> str | None:
    """Why the request is not supported, or None."""
    return f"has no dropout on attention weights, and model.dropout is {request.dropout}" if request.dropout else None


def attention(q_BSHN, k_BSKN, v_BSKN, documents_BS=None, dropout=0.0, key_B=None):
    # In fp32, because XLA's CPU backend lacks these matmuls in 16 bits (bfloat16: "Unsupported element type for DotThunk").
    q_BSHN32, k_BSKN32, v_BSKN32 = (x.astype(jnp.float32) for x in (q_BSHN, k_BSKN, v_BSKN))
    return _in_turns(q_BSHN32, k_BSKN32, v_BSKN32, documents_BS).astype(q_BSHN.dtype)


def _in_turns(q_BSHN, k_BSKN, v_BSKN, documents_BS):
    """Split the key/value heads into turns."""
    B, S, H, N = q_BSHN.shape
    K = k_BSKN.shape[2]
    scores_of_a_head = B * S * H // K * min(BLOCK, S)
    n = max(n for n in range(1, K + 1) if K % n == 0 and (n == 1 or n * scores_of_a_head <= TURN))

    def turns(x_BSHN):
        x_BSInGN = x_BSHN.reshape(B, S, K // n, n, -1, N)
        return x_BSInGN.transpose(2, 0, 3, 4, 1, 5).reshape(K // n, B * n, -1, S, N)

    documents_CS = None if documents_BS is None else jnp.repeat(documents_BS, n, axis=0)
    out_ICGSN = _blocked(turns(q_BSHN * N**-0.5), turns(k_BSKN)[:, :, 0], turns(v_BSKN)[:, :, 0], documents_CS)
    return out_ICGSN.reshape(K // n, B, n, -1, S, N).transpose(1, 4, 0, 2, 3, 5).reshape(B, S, H, N)


def _blocks(S):
    return [slice(start, min(start + BLOCK, S)) for start in range(0, S, BLOCK)]


def _block_scores(q_CGSN, k_CSN, documents_CS, block):
    """Masked fp32 scores (C, T, G, block) of one block of queries with the keys up to its end."""
    scores_CTGS = dot("CTN,CGSN->CTGS", k_CSN[:, : block.stop], q_CGSN[:, :, block])
    positions = jnp.arange(block.start, block.stop)
    if documents_CS is None:  # only the block's own keys can come after a query
        mask = (positions[:, None] <= positions)[:, None]
        return scores_CTGS.at[:, block].set(jnp.where(mask, scores_CTGS[:, block], MASKED))
    mask = (jnp.arange(block.stop)[:, None] <= positions)[:, None]
    mask &= documents_CS[:, : block.stop, None, None] == documents_CS[:, None, None, block]
    return jnp.where(mask, scores_CTGS, MASKED)


@jax.custom_vjp
def _blocked(q_ICGSN, k_ICSN, v_ICSN, documents_CS):
    return _blocked_forward(q_ICGSN, k_ICSN, v_ICSN, documents_CS)[0]


def _blocked_forward(q_ICGSN, k_ICSN, v_ICSN, documents_CS):
    def turn(qkv):
        q_CGSN, k_CSN, v_CSN = qkv
        v_CNS = v_CSN.transpose(0, 2, 1)
        outs, log_sums = [], []
        for block in _blocks(q_CGSN.shape[2]):
            scores_CTGS = _block_scores(q_CGSN, k_CSN, documents_CS, block)
            highest = scores_CTGS.max(1, keepdims=True)
            weights_CTGS = jnp.exp(scores_CTGS - highest)
            total = weights_CTGS.sum(1, keepdims=True)
            out_CNGS = dot("CNT,CTGS->CNGS", v_CNS[..., : block.stop], weights_CTGS)
            outs.append(out_CNGS / total)
            log_sums.append(highest + jnp.log(total))
        return jnp.concatenate(outs, -1), jnp.concatenate(log_sums, -1)

    out_ICNGS, log_sum_IC1GS = jax.lax.map(turn, (q_ICGSN, k_ICSN, v_ICSN))
    saved = q_ICGSN, k_ICSN, v_ICSN, documents_CS, out_ICNGS, log_sum_IC1GS
    return out_ICNGS.transpose(0, 1, 3, 4, 2), saved


def _blocked_backward(saved, d_out_ICGSN):
    q_ICGSN, k_ICSN, v_ICSN, documents_CS, out_ICNGS, log_sum_IC1GS = saved

    def turn(inputs):
        q_CGSN, k_CSN, v_CSN, out_CNGS, log_sum_C1GS, d_out_CGSN = inputs
        k_CNS = k_CSN.transpose(0, 2, 1)
        delta_C1GS = jnp.sum(d_out_CGSN.transpose(0, 3, 1, 2) * out_CNGS, 1, keepdims=True)
        d_qs, d_k_CSN, d_v_CSN = [], jnp.zeros_like(k_CSN), jnp.zeros_like(v_CSN)
        for block in _blocks(q_CGSN.shape[2]):
            prefix = slice(block.stop)
            weights_CTGS = jnp.exp(_block_scores(q_CGSN, k_CSN, documents_CS, block) - log_sum_C1GS[..., block])
            d_weights_CTGS = dot("CTN,CGSN->CTGS", v_CSN[:, prefix], d_out_CGSN[:, :, block])
            d_scores_CTGS = weights_CTGS * (d_weights_CTGS - delta_C1GS[..., block])
            d_qs.append(dot("CNT,CTGS->CNGS", k_CNS[..., prefix], d_scores_CTGS))
            d_k_CSN = d_k_CSN.at[:, prefix].add(dot("CTGS,CGSN->CTN", d_scores_CTGS, q_CGSN[:, :, block]))
            d_v_CSN = d_v_CSN.at[:, prefix].add(dot("CTGS,CGSN->CTN", weights_CTGS, d_out_CGSN[:, :, block]))
        return jnp.concatenate(d_qs, -1), d_k_CSN, d_v_CSN

    inputs = q_ICGSN, k_ICSN, v_ICSN, out_ICNGS, log_sum_IC1GS, d_out_ICGSN
    d_q_ICNGS, d_k_ICSN, d_v_ICSN = jax.lax.map(turn, inputs)
    return d_q_ICNGS.transpose(0, 1, 3, 4, 2), d_k_ICSN, d_v_ICSN, None


_blocked.defvjp(_blocked_forward, _blocked_backward)
