"""Logits processors: pure functions on fp32 (B, V) that match transformers' classes exactly. Filtered logits become -inf.

A row of tokens_BT has length_B tokens (`<s>`, prompt and answer so far); the rest is padding and is ignored, so each row gets
the logits that transformers would give it alone. Nothing here sorts the vocabulary: on the CPU, sorting 6,400 logits takes
1.2 ms and one pass over them 5 µs.

Dimensions in names: B rows, T token positions, V vocabulary, K the k of top-k, N entries summed along a row (V, K or blocks),
W n-gram windows, b tokens of a block.
"""

import jax
import jax.numpy as jnp
import numpy as np


def repetition_penalty(logits_BV, tokens_BT, length_B, penalty):
    """For each token already in a row, divide a positive logit by the penalty and multiply a negative one (CTRL, Keskar et al.,
    2019; transformers' RepetitionPenaltyLogitsProcessor).

    Args:
      logits_BV: fp32.
      tokens_BT: int32.
      length_B: int32.
      penalty: fp32 > 0, scalar or (B, 1); above 1 discourages repetition.
    """
    is_token_BT = jnp.arange(tokens_BT.shape[1]) < length_B[:, None]
    rows_B1 = jnp.arange(len(length_B))[:, None]
    logits_BT = jnp.take_along_axis(logits_BV, tokens_BT, axis=1, mode="clip")
    is_negative_BT = logits_BT < 0
    penalised_BT = logits_BT * jnp.where(is_negative_BT, penalty, 1) / jnp.where(is_negative_BT, 1, penalty)
    return logits_BV.at[rows_B1, jnp.where(is_token_BT, tokens_BT, logits_BV.shape[1])].set(penalised_BT, mode="drop")


def logit_bias(logits_BV, tokens_BM, bias_BM):
    """Add a bias to some tokens' logits, each token at most once (OpenAI's logit_bias; transformers'
    SequenceBiasLogitsProcessor for sequences of one token).

    Args:
      logits_BV: fp32.
      tokens_BM: int32, (M,) or (B, M); ids outside the vocabulary are ignored.
      bias_BM: fp32 of the same shape.
    """
    rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    return logits_BV.at[rows_B1, jnp.atleast_2d(tokens_BM)].add(jnp.atleast_2d(bias_BM), mode="drop")


def count_penalties(logits_BV, tokens_BT, prompt_length_B, length_B, presence, frequency):
    """Subtract from the logit of each token of the answer so far: presence, and frequency times how often it is there
    (OpenAI's definition; the prompt does not count, as in vLLM).

    Args:
      logits_BV: fp32.
      tokens_BT: int32.
      prompt_length_B, length_B: int32.
      presence, frequency: fp32, scalar or (B, 1).
    """
    positions_T = jnp.arange(tokens_BT.shape[1])
    is_answer_BT = (positions_T >= prompt_length_B[:, None]) & (positions_T < length_B[:, None])
    rows_B1 = jnp.arange(len(length_B))[:, None]
    columns_BT = jnp.where(is_answer_BT, tokens_BT, logits_BV.shape[1])  # out of range, hence dropped
    count_BV = jnp.zeros_like(logits_BV).at[rows_B1, columns_BT].add(1, mode="drop")
    return logits_BV - frequency * count_BV - presence * (count_BV > 0)


def no_repeat_ngram(logits_BV, tokens_BT, length_B, size):
    """Ban every token that would complete an n-gram already in its row (transformers' NoRepeatNGramLogitsProcessor).

    Args:
      logits_BV: fp32.
      tokens_BT: int32.
      length_B: int32.
      size: n, int32 >= 0, scalar or (B, 1). With 1, every token in the row is banned; 0 is off.
    """
    # An n-gram ends at position t, and the n - 1 tokens before t are the row's last n - 1.
    positions_T = jnp.arange(tokens_BT.shape[1])
    repeats_BT = (positions_T < length_B[:, None]) & (positions_T >= size - 1) & (size > 0)

    def compare(i, repeats_BT):
        last_B1 = jnp.take_along_axis(tokens_BT, jnp.maximum(length_B[:, None] - i, 0), axis=1)
        return repeats_BT & ((i >= size) | (jnp.roll(tokens_BT, i, axis=1) == last_B1))

    longest = jnp.minimum(jnp.max(size), tokens_BT.shape[1])
    repeats_BT = jax.lax.fori_loop(1, longest, compare, repeats_BT)
    return jnp.where(_mark(tokens_BT, repeats_BT, logits_BV.shape), -jnp.inf, logits_BV)


def min_new_tokens(logits_BV, new_tokens_B, minimum, eos_ids: tuple[int, ...]):
    """Ban the end tokens in rows with fewer new tokens than the minimum (transformers' MinNewTokensLengthLogitsProcessor).

    Args:
      logits_BV: fp32.
      new_tokens_B: int32, tokens after the prompt.
      minimum: int32, scalar or (B, 1).
      eos_ids: the tokens that end an answer, static.
    """
    is_eos_V = np.isin(np.arange(logits_BV.shape[1]), eos_ids)
    return jnp.where((new_tokens_B[:, None] < minimum) & is_eos_V, -jnp.inf, logits_BV)


def temperature(logits_BV, value):
    """Divide logits_BV by `value`, fp32 > 0, scalar or (B, 1) (transformers'
    TemperatureLogitsWarper)."""
    # Given a plain scalar, XLA multiplies by 1 / value instead, which rounds differently from torch's division.
    return logits_BV / jnp.where(logits_BV > -jnp.inf, value, 1)


def top_k(logits_BV, k: int, k_B=None):
    """Keep the k highest logits (Fan et al., 2018). Ties with the k-th are kept too, so more than k may remain (transformers'
    TopKLogitsWarper).

    Args:
      logits_BV: fp32.
      k: 1 <= k <= V, static.
      k_B: int32, 1 <= k_B <= k: each row's own k; other rows give nothing meaningful. None: k in all rows.

    Returns:
      (filtered logits_BV, the k highest logits in descending order, highest_BK fp32; -inf beyond a row's own k)
    """
    # Without the barrier, XLA sorts the whole vocabulary to get the k-th value: 1,030 µs instead of 18 for 6,400 logits on
    # the CPU (jaxlib 0.10.2). Remove it when tests/inference/test_sampling.py finds no sort without it.
    highest_BK = jax.lax.optimization_barrier(jax.lax.top_k(logits_BV, k)[0])
    if k_B is None:
        return jnp.where(logits_BV < highest_BK[:, -1:], -jnp.inf, logits_BV), highest_BK
    kth_B1 = jnp.take_along_axis(highest_BK, k_B[:, None] - 1, axis=1, mode="clip")
    highest_BK = jnp.where(jnp.arange(k) < k_B[:, None], highest_BK, -jnp.inf)
    return jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV), highest_BK


def top_k_of_many(logits_BV, k_B):
    """`top_k` for any k, each row's own, by a binary search for the k-th logit: 32 passes over the logits.

    Args:
      logits_BV: fp32.
      k_B: int32 in [0, V]; 0 keeps all.
    """
    keys_BV = _ordered(logits_BV)
    is_kept_BV = keys_BV >= _highest_boundary(keys_BV, jnp.ones_like(keys_BV), k_B)[:, None]
    return jnp.where(is_kept_BV | (k_B == 0)[:, None], logits_BV, -jnp.inf)


def top_p(logits_BV, tail, highest_BK=None):
    """Nucleus filter (Holtzman et al., 2020): keep the smallest set of tokens whose probability reaches p.

    The boundary is that of transformers' TopPLogitsWarper: tokens are removed from the least likely up while their cumulative
    probability is at most 1 - p; the most likely token always stays. Among equal logits the lowest index is removed first, as
    in a stable sort; torch leaves that order undefined.

    Args:
      logits_BV: fp32.
      tail: fp32 in [0, 1), scalar or (B, 1), 1 - p computed in float64 and then rounded: float32(1 - 0.8) is 0.2, but
        1 - float32(0.8) is less and would keep 9 of ten equally likely tokens instead of 8.
      highest_BK: the second result of `top_k`, if the logits come from it: only K logits per row are examined instead of V.
    """
    # Logit values and how many tokens have each; highest_BK may hold only some of the tokens that tie with the k-th.
    values_BN, tokens_BN = logits_BV, 1.0
    if highest_BK is not None:
        n_B = jnp.sum(highest_BK > -jnp.inf, axis=-1)
        kth_B1 = jnp.take_along_axis(highest_BK, jnp.maximum(n_B - 1, 0)[:, None], axis=1)
        missing_B = jnp.sum(logits_BV == kth_B1, axis=-1) - jnp.sum(highest_BK == kth_B1, axis=-1)
        is_last_BN = jnp.arange(highest_BK.shape[1]) == n_B[:, None] - 1
        values_BN, tokens_BN = highest_BK, jnp.where(is_last_BN, 1.0 + missing_B[:, None], 1.0)
    highest_B1 = jnp.max(values_BN, axis=-1, keepdims=True)
    probability_BN = jnp.exp(values_BN - highest_B1)
    probability_BN /= jnp.sum(probability_BN * tokens_BN, axis=-1, keepdims=True)
    # The boundary is the lowest logit kept: tokens above it have a total probability below p.
    if highest_BK is None:
        keys_BN = _ordered(values_BN)
        is_kept_BN = keys_BN >= _highest_boundary(keys_BN, probability_BN, jnp.ravel(1 - tail))[:, None]
    else:
        is_kept_BN = jnp.cumsum(probability_BN, axis=-1) - probability_BN < 1 - tail
    boundary_B1 = jnp.min(jnp.where(is_kept_BN, values_BN, highest_B1), axis=-1, keepdims=True)
    # Of the tokens tied at the boundary, as many are removed as still fit into the tail.
    is_tied_BN = values_BN == boundary_B1
    tied_B = jnp.sum(jnp.where(is_tied_BN, tokens_BN, 0), axis=-1)
    each_B = jnp.max(jnp.where(is_tied_BN, probability_BN, 0), axis=-1)
    below_B = jnp.sum(jnp.where(values_BN < boundary_B1, probability_BN * tokens_BN, 0), axis=-1)
    tail_B = jnp.ravel(tail)  # or (1,)
    removed_B = jnp.round((tail_B - below_B) / each_B)
    removed_B = jnp.clip(removed_B - (below_B + removed_B * each_B > tail_B), 0, tied_B - 1)
    is_tied_BV = logits_BV == boundary_B1
    first_kept_B = inverse_cdf(is_tied_BV.astype(jnp.float32), (removed_B + 0.5) / tied_B)
    is_removed_BV = (logits_BV < boundary_B1) | (is_tied_BV & (jnp.arange(logits_BV.shape[1]) < first_kept_B[:, None]))
    return jnp.where(is_removed_BV, -jnp.inf, logits_BV)


def min_p(logits_BV, value):
    """Keep tokens at least `value` times as likely as the most likely one (Nguyen et al., 2024; transformers'
    MinPLogitsWarper). `value`: fp32 in [0, 1], scalar or (B, 1).
    """
    return jnp.where(logits_BV < jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(value), -jnp.inf, logits_BV)


def inverse_cdf(weights_BV, u_B):
    """The first token at which the cumulative weight of its row exceeds the fraction u of the total, int32 (B,).

    Never a token of weight 0, whatever u is, if the row has any weight. Finds the block of 128 tokens first, then the token in
    it: a cumulative sum over the whole vocabulary is 5 times slower on the CPU.

    Args:
      weights_BV: fp32, >= 0, not necessarily normalised.
      u_B: fp32 in [0, 1).
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
    """The first index of nonzero weight whose cumulative sum exceeds the target, or the largest sum if rounding leaves none."""
    cumulative_BN = jnp.where(weight_BN > 0, cumulative_BN, 0)  # a parallel cumsum may rise slightly where the weight is 0
    is_last_BN = cumulative_BN == jnp.max(cumulative_BN, axis=-1, keepdims=True)
    return jnp.argmax((cumulative_BN > jnp.maximum(target_B, 0)[:, None]) | is_last_BN, axis=-1).astype(jnp.int32)


def _mark(tokens_BT, is_marked_BT, shape_BV):
    """bool (B, V): the tokens at each row's marked positions."""
    rows_B1 = jnp.arange(shape_BV[0])[:, None]
    columns_BT = jnp.where(is_marked_BT, tokens_BT, shape_BV[1])  # out of range, hence dropped
    return jnp.zeros(shape_BV, bool).at[rows_B1, columns_BT].set(True, mode="drop")


def _ordered(logits):
    """Map fp32 to int32 monotonically."""
    bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _highest_boundary(keys_BV, weight_BV, least_B):
    """The highest key such that keys >= it have a total weight >= least_B: a binary search over its bits, 4 times faster than
    sorting the keys.
    """

    def decide_bit(i, boundary_B):
        higher_B = boundary_B + (jnp.int32(1) << (31 - i))
        reaches_B = jnp.sum(jnp.where(keys_BV >= higher_B[:, None], weight_BV, 0), axis=-1) >= least_B
        return jnp.where(reaches_B, higher_B, boundary_B)

    return jax.lax.fori_loop(0, 32, decide_bit, jnp.full(len(keys_BV), jnp.iinfo(jnp.int32).min))
