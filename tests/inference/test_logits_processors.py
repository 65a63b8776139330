"""Each filter against transformers' class. An example of hypothesis is a seed, from which numpy draws 20 batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings, strategies as st

from mateconv_jax.inference import logits_processors

EOS = 2

repetition_penalty = jax.jit(logits_processors.repetition_penalty)
no_repeat_ngram = jax.jit(logits_processors.no_repeat_ngram)
min_new_tokens = jax.jit(logits_processors.min_new_tokens, static_argnums=3)
temperature = jax.jit(logits_processors.temperature)
top_k = jax.jit(logits_processors.top_k, static_argnums=1)
top_p = jax.jit(logits_processors.top_p)
min_p = jax.jit(logits_processors.min_p)
inverse_cdf = jax.jit(logits_processors.inverse_cdf)


def batches(test):
    """The test on 120 batches of 1 to 8 rows: spread out or with many ties, some logits -inf from an earlier filter."""

    @settings(max_examples=6)
    @given(st.integers(0, 2**32 - 1))
    def run(seed):
        rng = np.random.default_rng(seed)
        for _ in range(20):
            B = rng.integers(1, 9)
            V = 12 if B % 2 else 300  # eight shapes, so that not much is compiled
            logits_BV = rng.normal(size=(B, V)) * rng.uniform(0.5, 4)
            if rng.random() < 0.5:
                logits_BV = np.round(2 * logits_BV) / 2
            logits_BV[rng.random((B, V)) < rng.choice([0, 0.3])] = -np.inf
            logits_BV[:, 0] = np.maximum(logits_BV[:, 0], -9)  # something is left
            test(rng, logits_BV.astype(np.float32))

    return run


def ragged_tokens(rng, B, vocab_size, T=12):
    """(tokens_BT, length_B): rows of 1 to T tokens; what stands behind them would count if it were looked at."""
    return rng.integers(0, vocab_size, (B, T)).astype(np.int32), rng.integers(1, T + 1, B).astype(np.int32)


def of_row(processor, logits_V, tokens_T=()):
    """What transformers makes of a row alone."""
    tokens_1T = torch.tensor(np.asarray(tokens_T, np.int64)[None])
    return processor(tokens_1T, torch.tensor(logits_V[None])).numpy()[0]


def is_close_call(processor, logits_V):
    """Whether a probability is so near the boundary of top-p or min-p (1e-6) that rounding decides."""
    weight_V = np.exp(np.sort(logits_V.astype(np.float64)) - logits_V.max())
    if isinstance(processor, transformers.TopPLogitsWarper):
        cumulative_V = np.cumsum(weight_V)[:-1] / weight_V.sum()  # without the highest, which always stays
        return np.abs(cumulative_V - (1 - processor.top_p)).min(initial=1) < 1e-6
    if isinstance(processor, transformers.MinPLogitsWarper):
        return np.abs(weight_V[weight_V < 1] - processor.min_p).min(initial=1) < 1e-6
    return False


# ---- filters that look at the tokens -----------------------------------------------------------------------------------


@batches
def test_repetition_penalty_equals_transformers(rng, logits_BV):
    tokens_BT, length_B = ragged_tokens(rng, *logits_BV.shape)
    penalty = float(rng.uniform(0.3, 3))
    ours_BV = repetition_penalty(logits_BV, tokens_BT, length_B, np.float32(penalty))
    processor = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    for row in zip(ours_BV, logits_BV, tokens_BT, length_B, strict=True):
        ours_V, logits_V, tokens_T, length = row
        np.testing.assert_array_equal(ours_V, of_row(processor, logits_V, tokens_T[:length]))


@batches
def test_no_repeat_ngram_equals_transformers(rng, logits_BV):
    tokens_BT, length_B = ragged_tokens(rng, len(logits_BV), vocab_size=3)  # few tokens, so that they repeat
    size = (1, 2, 3, 20)[len(logits_BV) % 4]  # 20: no row is that long
    ours_BV = no_repeat_ngram(logits_BV, tokens_BT, length_B, size)
    processor = transformers.NoRepeatNGramLogitsProcessor(size)
    for ours_V, logits_V, tokens_T, length in zip(ours_BV, logits_BV, tokens_BT, length_B, strict=True):
        np.testing.assert_array_equal(ours_V, of_row(processor, logits_V, tokens_T[:length]))


@batches
def test_min_new_tokens_equals_transformers(rng, logits_BV):
    tokens_BT, length_B = ragged_tokens(rng, *logits_BV.shape)
    prompt_length_B = rng.integers(0, length_B + 1).astype(np.int32)
    minimum = int(rng.integers(0, 6))
    ours_BV = min_new_tokens(logits_BV, length_B - prompt_length_B, np.int32(minimum), (EOS,))
    for ours_V, logits_V, tokens_T, length, prompt_length in zip(
        ours_BV, logits_BV, tokens_BT, length_B, prompt_length_B, strict=True
    ):
        processor = transformers.MinNewTokensLengthLogitsProcessor(int(prompt_length), minimum, EOS)
        np.testing.assert_array_equal(ours_V, of_row(processor, logits_V, tokens_T[:length]))


# ---- filters that look at the logits alone -----------------------------------------------------------------------------


@batches
def test_temperature_equals_transformers(rng, logits_BV):
    value = float(rng.uniform(0.1, 3))
    theirs_BV = transformers.TemperatureLogitsWarper(value)(None, torch.tensor(logits_BV)).numpy()
    np.testing.assert_array_equal(temperature(logits_BV, np.float32(value)), theirs_BV)


@batches
def test_top_k_equals_transformers(rng, logits_BV):
    k = int(rng.choice([1, 2, 12]))
    ours_BV, highest_BK = top_k(logits_BV, k)
    theirs_BV = transformers.TopKLogitsWarper(k)(None, torch.tensor(logits_BV)).numpy()
    np.testing.assert_array_equal(ours_BV, theirs_BV)
    np.testing.assert_array_equal(highest_BK, -np.sort(-logits_BV, axis=-1)[:, :k])


def check_top_p(ours_BV, logits_BV, p):
    """As many tokens go as with transformers. Which of tied ones go is torch's secret: ours are those of a stable sort."""
    warper = transformers.TopPLogitsWarper(p)
    for ours_V, logits_V in zip(ours_BV, logits_BV, strict=True):
        theirs_V = of_row(warper, logits_V)
        if is_close_call(warper, logits_V):
            continue
        expected_V = logits_V.copy()
        expected_V[np.argsort(logits_V, kind="stable")[: np.isinf(theirs_V).sum()]] = -np.inf
        np.testing.assert_array_equal(ours_V, expected_V)
        if len(set(logits_V[np.isfinite(logits_V)])) == np.isfinite(logits_V).sum():  # no ties
            np.testing.assert_array_equal(ours_V, theirs_V)


@batches
def test_top_p_equals_transformers(rng, logits_BV):
    p = float(rng.choice([rng.uniform(0.01, 0.99), rng.uniform(0.99, 1), 1e-20]))
    check_top_p(top_p(logits_BV, np.float32(1 - p)), logits_BV, p)


@batches
def test_top_p_behind_top_k_equals_transformers(rng, logits_BV):
    """More tokens may tie with the k-th than top-p gets to see of them in top-k's list."""
    k, p = 2 if len(logits_BV) > 4 else 12, float(rng.choice([rng.uniform(0.01, 0.99), 1e-20]))
    logits_BV, highest_BK = top_k(logits_BV, k)
    check_top_p(top_p(logits_BV, np.float32(1 - p), highest_BK), np.array(logits_BV), p)


@pytest.mark.parametrize("n", [2, 3, 7, 10, 300])
def test_top_p_keeps_as_many_equal_tokens_as_transformers(n):
    """Every p here is a boundary, where only the same rounding gives the same answer."""
    logits_1V = np.zeros((1, n), np.float32)
    for p in [*np.arange(0.05, 1, 0.05), *np.arange(1, n) / n]:
        theirs = np.isfinite(of_row(transformers.TopPLogitsWarper(float(p)), logits_1V[0])).sum()
        for highest_1K in (None, logits_1V[:, :2]):
            kept_V = np.isfinite(top_p(logits_1V, np.float32(1 - p), highest_1K)[0])
            assert kept_V.sum() == theirs and kept_V[n - theirs :].all()


@pytest.mark.parametrize("sixteenths", range(1, 16))
def test_top_p_stops_at_the_probability_that_reaches_p_exactly(sixteenths):
    """Probabilities that fp32 adds without rounding."""
    logits_1V = np.log(np.array([[8, 1, 2, 1, 4]], np.float32) / 8)
    p = sixteenths / 16
    theirs_V = np.isfinite(of_row(transformers.TopPLogitsWarper(p), logits_1V[0]))
    for highest_1K in (None, top_k(logits_1V, 4)[1], top_k(logits_1V, 5)[1]):
        kept_V = np.isfinite(top_p(logits_1V, np.float32(1 - p), highest_1K)[0])
        assert (kept_V[[0, 2, 4]] == theirs_V[[0, 2, 4]]).all() and kept_V.sum() == theirs_V.sum()


@batches
def test_min_p_equals_transformers(rng, logits_BV):
    value = float(rng.choice([rng.uniform(0, 1), 10 ** rng.uniform(-6, 0), 0, 1]))
    warper = transformers.MinPLogitsWarper(value)
    for ours_V, logits_V in zip(min_p(logits_BV, np.float32(value)), logits_BV, strict=True):
        if not is_close_call(warper, logits_V):
            np.testing.assert_array_equal(ours_V, of_row(warper, logits_V))


# ---- looking up a draw -------------------------------------------------------------------------------------------------


@batches
def test_inverse_cdf_finds_the_token_that_the_running_sum_reaches(rng, logits_BV):
    weight_BV = np.exp(logits_BV - logits_BV.max())
    u_B = rng.random(len(logits_BV), np.float32)
    for token, weight_V, u in zip(inverse_cdf(weight_BV, u_B), weight_BV, u_B, strict=True):
        cumulative_V = np.cumsum(weight_V, dtype=np.float64) / weight_V.sum(dtype=np.float64)
        # 1e-6 is what fp32 sums may be off.
        assert np.searchsorted(cumulative_V, u - 1e-6, "right") <= token <= np.searchsorted(cumulative_V, u + 1e-6, "right")


@pytest.mark.parametrize("seed", range(3))
def test_inverse_cdf_never_gives_a_token_without_weight(seed):
    """Not at any step of the running sum, a bit before or behind it, nor where rounding makes of u the whole or more."""
    rng = np.random.default_rng(seed)
    weight_V = rng.random(600, np.float32) ** 8
    weight_V[rng.random(600) < 0.6] = 0
    weight_V[[*range(100, 300), *range(500, 600)]] = 0  # 128 to 255 and 512 to 599 are blocks of their own
    step_V = (np.cumsum(weight_V, dtype=np.float64) / weight_V.sum(dtype=np.float64)).astype(np.float32)
    u_B = np.concatenate([step_V + i * np.float32(2**-24) for i in range(-3, 4)])
    token_B = np.asarray(inverse_cdf(np.tile(weight_V, (len(u_B), 1)), np.maximum(u_B, 0)))
    assert (weight_V[token_B] > 0).all()


def test_presence_and_frequency_penalties_are_openais():
    """mu[j] -> mu[j] - c[j] * frequency - float(c[j] > 0) * presence, where c counts the answer's tokens alone."""
    tokens_BT = np.array([[3, 3, 4, 5, 5, 5, 0], [1, 2, 2, 9, 9, 9, 9]], np.int32)
    ours_BV = logits_processors.count_penalties(
        jnp.zeros((2, 10)),
        tokens_BT,
        np.array([1, 2]),
        np.array([6, 3]),
        np.float32(0.5),
        np.array([[2.0], [-1.0]], np.float32),
    )
    expected_BV = np.zeros((2, 10), np.float32)
    expected_BV[0, [3, 4, 5]] = [-2.5, -2.5, -6.5]
    expected_BV[1, 2] = 0.5
    np.testing.assert_array_equal(ours_BV, expected_BV)
