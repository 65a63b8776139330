"""Filters over next-token logits: pure functions on fp32 (B, V), exact to transformers' classes. What goes becomes -inf.

A row of tokens_BT has length_B tokens (`<s>`, prompt and answer so far); what stands behind them does not count, so a row's
logits are those that transformers gives for the row alone. Nothing here sorts the vocabulary: on the CPU a sort of 6,400
logits costs 1.2 ms, a pass over them 5 µs.

Dimensions in names: B rows, T token positions, V vocabulary, K the k of top-k, N whatever is summed along a row, b tokens of a
block.
"""

import jax
import jax.numpy as jnp


def repetition_penalty(logits_BV, tokens_BT, length_B, penalty):
    """Divide the positive logits of tokens that a row has already by the penalty, multiply the negative ones (CTRL: Keskar et
    al., 2019; transformers' RepetitionPenaltyLogitsProcessor).

    Args:
      logits_BV: fp32.
      tokens_BT: int32. length_B: int32.
      penalty: fp32 scalar > 0; above 1 against repetition.
    """
    is_token_BT = jnp.arange(tokens_BT.shape[1]) < length_B[:, None]
    rows_B1 = jnp.arange(len(length_B))[:, None]
    logits_BT = jnp.take_along_axis(logits_BV, tokens_BT, axis=1, mode="clip")
    is_negative_BT = logits_BT < 0
    penalised_BT = logits_BT * jnp.where(is_negative_BT, penalty, 1) / jnp.where(is_negative_BT, 1, penalty)
    return logits_BV.at[rows_B1, jnp.where(is_token_BT, tokens_BT, logits_BV.shape[1])].set(penalised_BT, mode="drop")


def no_repeat_ngram(logits_BV, tokens_BT, length_B, size: int):
    """Ban each token that would make an n-gram which its row has already (transformers' NoRepeatNGramLogitsProcessor).

    Args:
      logits_BV: fp32.
      tokens_BT: int32. length_B: int32.
      size: of the n-grams, >= 1, static. 1 bans every token of the row.
    """
    windows = tokens_BT.shape[1] - size + 1  # one that starts at w ends at w + size - 1
    if windows <= 0:
        return logits_BV
    repeats_BW = jnp.arange(windows) + size - 1 < length_B[:, None]
    for i in range(size - 1):
        suffix_B1 = jnp.take_along_axis(tokens_BT, jnp.maximum(length_B[:, None] - size + 1 + i, 0), axis=1)
        repeats_BW &= tokens_BT[:, i : i + windows] == suffix_B1
    return jnp.where(_mark(tokens_BT[:, size - 1 :], repeats_BW, logits_BV.shape), -jnp.inf, logits_BV)


def min_new_tokens(logits_BV, new_tokens_B, minimum, eos_id: int):
    """Ban `</s>` in rows that have fewer new tokens than the minimum (transformers' MinNewTokensLengthLogitsProcessor).

    Args:
      logits_BV: fp32.
      new_tokens_B: int32, tokens that a row has after its prompt.
      minimum: int32 scalar.
    """
    is_eos_V = jnp.arange(logits_BV.shape[1]) == eos_id
    return jnp.where((new_tokens_B < minimum)[:, None] & is_eos_V, -jnp.inf, logits_BV)


def temperature(logits_BV, value):
    """Divide by `value` > 0, an fp32 scalar (transformers' TemperatureLogitsWarper)."""
    # Divided by a plain scalar, XLA multiplies with 1 / value, which rounds otherwise than torch's division.
    return logits_BV / jnp.where(logits_BV > -jnp.inf, value, 1)


def top_k(logits_BV, k: int):
    """Keep the k highest (Fan et al., 2018). Ties with the k-th stay, so that more than k may (transformers' TopKLogitsWarper).

    Args:
      logits_BV: fp32.
      k: 1 <= k <= V, static.

    Returns:
      (logits_BV, the k highest logits in falling order, highest_BK fp32)
    """
    # Without the barrier XLA takes the k-th straight out of a sort of the whole vocabulary: 1,030 µs instead of 18 for
    # 6,400 logits on the CPU (jaxlib 0.10.2). It can go when tests/inference/test_sampling.py finds no sort without it.
    highest_BK = jax.lax.optimization_barrier(jax.lax.top_k(logits_BV, k)[0])
    return jnp.where(logits_BV < highest_BK[:, -1:], -jnp.inf, logits_BV), highest_BK


def top_p(logits_BV, tail, highest_BK=None):
    """Nucleus filter (Holtzman et al., 2020): keep the smallest set of tokens whose probability reaches p.

    The boundary is that of transformers' TopPLogitsWarper: tokens from the lowest up go as long as their summed probability
    is at most 1 - p; the highest always stays. Among tokens with the same logit the lowest index goes first, as in a stable
    sort; torch promises no order there.

    Args:
      logits_BV: fp32.
      tail: fp32 scalar in [0, 1): 1 - p, subtracted before it is rounded. float32(1 - 0.8) is 0.2, 1 - float32(0.8) is less,
        and one of ten equal tokens more would stay.
      highest_BK: what `top_k` gave, when the logits come from there: then K logits are looked at instead of V.
    """
    # Which logits there are, and how many tokens have each: of those that tie with the k-th, highest_BK may lack some.
    values_BN, tokens_BN = logits_BV, 1.0
    if highest_BK is not None:
        kth_B1 = highest_BK[:, -1:]
        lacking_B = jnp.sum(logits_BV == kth_B1, axis=-1) - jnp.sum(highest_BK == kth_B1, axis=-1)
        values_BN, tokens_BN = highest_BK, jnp.ones_like(highest_BK).at[:, -1].add(lacking_B)
    highest_B1 = jnp.max(values_BN, axis=-1, keepdims=True)
    probability_BN = jnp.exp(values_BN - highest_B1)
    probability_BN /= jnp.sum(probability_BN * tokens_BN, axis=-1, keepdims=True)
    # The boundary is the lowest logit that is kept: tokens above it hold less than p.
    if highest_BK is None:
        keys_BN = _ordered(values_BN)
        is_kept_BN = keys_BN >= _nucleus_boundary(keys_BN, probability_BN, 1 - tail)[:, None]
    else:
        is_kept_BN = jnp.cumsum(probability_BN, axis=-1) - probability_BN < 1 - tail
    boundary_B1 = jnp.min(jnp.where(is_kept_BN, values_BN, highest_B1), axis=-1, keepdims=True)
    # Of the tokens at the boundary as many go as still fit into the tail.
    is_tied_BN = values_BN == boundary_B1
    tied_B = jnp.sum(jnp.where(is_tied_BN, tokens_BN, 0), axis=-1)
    each_B = jnp.max(jnp.where(is_tied_BN, probability_BN, 0), axis=-1)
    below_B = jnp.sum(jnp.where(values_BN < boundary_B1, probability_BN * tokens_BN, 0), axis=-1)
    go_B = jnp.round((tail - below_B) / each_B)
    go_B = jnp.clip(go_B - (below_B + go_B * each_B > tail), 0, tied_B - 1)
    is_tied_BV = logits_BV == boundary_B1
    first_kept_B = inverse_cdf(is_tied_BV.astype(jnp.float32), (go_B + 0.5) / tied_B)
    goes_BV = (logits_BV < boundary_B1) | (is_tied_BV & (jnp.arange(logits_BV.shape[1]) < first_kept_B[:, None]))
    return jnp.where(goes_BV, -jnp.inf, logits_BV)


def min_p(logits_BV, value):
    """Keep the tokens that are at least `value` times as probable as the most probable one (Nguyen et al., 2024; transformers'
    MinPLogitsWarper). `value`: fp32 scalar in [0, 1].
    """
    return jnp.where(logits_BV < jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(value), -jnp.inf, logits_BV)


def inverse_cdf(weights_BV, u_B):
    """The first token at which the running sum of a row's weights exceeds u of their total, int32 (B,).

    Never one with weight 0, whatever u is, where a row has any weight at all. Looks for a block of 128 tokens, then in it: a
    running sum over the whole vocabulary is 5 times slower on the CPU.
    """
    B, V = weights_BV.shape
    blocks_BNb = jnp.pad(weights_BV, ((0, 0), (0, -V % 128))).reshape(B, -1, 128)
    weight_BN = jnp.sum(blocks_BNb, axis=-1)
    cumulative_BN = jnp.cumsum(weight_BN, axis=-1)
    target_B = u_B * cumulative_BN[:, -1]
    block_B = _first_above(cumulative_BN, weight_BN, target_B)
    rows_B = jnp.arange(B)
    weight_Bb = blocks_BNb[rows_B, block_B]
    target_B -= cumulative_BN[rows_B, block_B] - weight_BN[rows_B, block_B]
    return block_B * 128 + _first_above(jnp.cumsum(weight_Bb, axis=-1), weight_Bb, target_B)


def _first_above(cumulative_BN, weight_BN, target_B):
    """The first index with weight where the sum exceeds the target; if rounding leaves none, that of the highest sum."""
    cumulative_BN = jnp.where(weight_BN > 0, cumulative_BN, 0)  # a parallel sum may rise a bit even where no weight is
    is_last_BN = cumulative_BN == jnp.max(cumulative_BN, axis=-1, keepdims=True)
    return jnp.argmax((cumulative_BN > jnp.maximum(target_B, 0)[:, None]) | is_last_BN, axis=-1).astype(jnp.int32)


def _mark(tokens_BT, is_marked_BT, shape_BV):
    """bool (B, V): the vocabulary entries that a row's marked positions name."""
    rows_B1 = jnp.arange(shape_BV[0])[:, None]
    places_BT = jnp.where(is_marked_BT, tokens_BT, shape_BV[1])  # behind the vocabulary: dropped
    return jnp.zeros(shape_BV, bool).at[rows_B1, places_BT].set(True, mode="drop")


def _ordered(logits):
    """int32 in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _nucleus_boundary(keys_BV, probability_BV, p):
    """The highest key such that keys from it up hold probability p, found bit by bit: 4 times faster than sorting integers."""

    def decide_bit(i, boundary_B):
        higher_B = boundary_B + (jnp.int32(1) << (31 - i))
        reaches_B = jnp.sum(jnp.where(keys_BV >= higher_B[:, None], probability_BV, 0), axis=-1) >= p
        return jnp.where(reaches_B, higher_B, boundary_B)

    return jax.lax.fori_loop(0, 32, decide_bit, jnp.full(len(keys_BV), jnp.iinfo(jnp.int32).min))
