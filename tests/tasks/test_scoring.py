import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from mateconv_jax.runtime import sharding
from mateconv_jax.tasks import scoring
from mateconv_jax.tasks.encoding import Scored
from mateconv_jax.tasks.scoring import Scorer, make_batches
from tests import llama

N_TOKENS = 400


@pytest.fixture(scope="module")
def model():
    graph, params = nnx.split(llama.peaked_model(64))
    return nnx.merge(graph, params).c, graph, params


def answers_of(seed, n, longest=42):
    """Questions of 3 answers each, some of which differ in their last token alone."""
    rng, answers = np.random.default_rng(seed), []
    for _ in range(n):
        context = rng.integers(0, N_TOKENS, rng.integers(1, longest)).astype(np.int32)
        shared = rng.integers(0, N_TOKENS, rng.integers(0, 4)).astype(np.int32)
        for last in rng.choice(N_TOKENS, 3, replace=False):
            own = shared if rng.random() < 0.7 else rng.integers(0, N_TOKENS, 5).astype(np.int32)
            answers.append(Scored(np.concatenate([context, own, [last]]).astype(np.int32), len(own) + 1, False))
    return answers


def score(model, answers, batch_size=None, mesh=None):
    c, graph, params = model
    mesh = mesh or sharding.make_mesh()
    return Scorer(graph, mesh, c.max_seq_len, c.vocab_size, answers, batch_size)(params)


def test_each_answer_has_the_log_likelihood_that_it_has_alone(model):
    """And whether it is the likeliest: from the whole logits of its row."""
    c, graph, params = model
    answers = answers_of(0, 20)
    answers.append(dataclasses.replace(answers[0]))  # twice the same
    found = score(model, answers)
    forward = jax.jit(lambda tokens: jax.nn.log_softmax(nnx.merge(graph, params)(tokens)))
    for n, answer in enumerate(answers):
        inputs = np.zeros(64, np.int32)
        inputs[: len(answer.ids) - 1] = answer.ids[:-1]
        first = len(answer.ids) - 1 - answer.n_answer
        log_probs = np.asarray(forward(inputs[None])[0, first : len(answer.ids) - 1])
        expected = log_probs[np.arange(answer.n_answer), answer.ids[-answer.n_answer :]].sum()
        assert found.log_likelihood_N[n] == pytest.approx(expected, abs=2e-5)
        assert found.is_likeliest_N[n] == np.array_equal(log_probs.argmax(-1), answer.ids[-answer.n_answer :])
    assert found.log_likelihood_N[-1] == found.log_likelihood_N[0]
    context = answers[0].ids[:-1]
    likeliest = int(forward(np.pad(context, (0, 64 - len(context)))[None])[0, len(context) - 1].argmax())
    greedy = Scored(np.append(context, likeliest).astype(np.int32), 1, False)
    assert score(model, [greedy]).is_likeliest_N[0]


def test_order_and_batch_size_change_nothing(model):
    """The order not one bit; the batch size the last bits, since products of other shapes are summed in another order."""
    answers = answers_of(1, 30, longest=25)  # one length, to compile less
    expected = score(model, answers)
    order = np.random.default_rng(2).permutation(len(answers))
    shuffled = score(model, [answers[i] for i in order])
    np.testing.assert_array_equal(shuffled.log_likelihood_N, expected.log_likelihood_N[order])
    np.testing.assert_array_equal(shuffled.is_likeliest_N, expected.is_likeliest_N[order])
    found = score(model, answers, batch_size=7)
    np.testing.assert_allclose(found.log_likelihood_N, expected.log_likelihood_N, rtol=1e-5, atol=1e-5)
    by_question = found.log_likelihood_N.reshape(-1, 3).argmax(1), expected.log_likelihood_N.reshape(-1, 3).argmax(1)
    np.testing.assert_array_equal(*by_question)
    np.testing.assert_array_equal(found.is_likeliest_N, expected.is_likeliest_N)


def test_what_batches_look_like():
    answers = answers_of(3, 40)
    batches = make_batches(answers, 64, N_TOKENS, 2)
    assert sorted(n for batch in batches for n, *_ in batch.members) == list(range(120))
    for batch, other in zip(batches, make_batches(answers[::-1], 64, N_TOKENS, 2), strict=True):  # whatever the order
        np.testing.assert_array_equal(batch.tokens_BS, other.tokens_BS)
        np.testing.assert_array_equal(batch.candidates_BK, other.candidates_BK)
    lengths = [batch.tokens_BS.shape[1] for batch in batches]
    assert lengths == sorted(lengths, reverse=True) and set(lengths) == {32, 48}
    assert len({(*batch.tokens_BS.shape, batch.candidates_BK.shape, batch.n_positions) for batch in batches}) == len(
        set(lengths)
    )
    assert all(len(batch.tokens_BS) % 2 == 0 for batch in batches)
    rows = sum(len({row for _, row, *_ in batch.members}) for batch in batches)
    assert rows == len({answer.ids[:-1].tobytes() for answer in answers}) < 120
    assert [scoring._padded_length(n, 500) for n in (1, 32, 33, 49, 65, 97, 129, 193, 400, 500)] == [
        32, 32, 48, 64, 96, 128, 192, 256, 500, 500,
    ]  # fmt: skip


def test_a_run_can_be_stopped_and_watched(model):
    c, graph, params = model
    scorer = Scorer(graph, sharding.make_mesh(), c.max_seq_len, c.vocab_size, answers_of(1, 30, longest=25), 7)
    asked = []
    assert scorer(params, lambda: len(asked) == 3 or asked.append(0)) is None
    seen = []
    scorer(params, progress=lambda batches, n: seen.append(n) or batches)
    assert seen == [len(scorer.batches)] and len(asked) == 3
