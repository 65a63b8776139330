"""The policy gradient beside the same formulas written out in numpy, answer by answer and token by token."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mateconv_jax.losses.next_token import next_token_loss
from mateconv_jax.losses.policy_gradient import advantages, log_probs, policy_gradient_loss, token_weights
from mateconv_jax.model.transformer import Transformer
from tests import llama

G, A, B, S, MAX_NEW = 4, 2, 8, 12, 9


@pytest.fixture(scope="module")
def model():
    return Transformer(llama.model_config(n_layers=1), nnx.Rngs(0))


@pytest.fixture(scope="module")
def batch():
    """A step of 4 prompts with 4 answers each: prompts of 3 tokens, answers of 1 to 9; log-probabilities as of other weights."""
    random = np.random.default_rng(0)
    n_new = random.integers(1, MAX_NEW + 1, (A, B))
    place = np.arange(S + 1)
    return {
        "tokens": random.integers(0, 96, (A, B, S + 1)).astype(np.int32),
        "length": (3 + n_new).astype(np.int32),
        "learned": (place >= 3) & (place < 3 + n_new[..., None]),
        "old": random.normal(0, 0.3, (A, B, S)).astype(np.float32),
        "reference": random.normal(0, 0.3, (A, B, S)).astype(np.float32),
    }


@pytest.fixture(scope="module")
def rewards():
    """One group has equal rewards, one an answer without a reward."""
    reward_N = np.random.default_rng(1).normal(0, 1, A * B)
    reward_N[4:8] = 0.5
    reward_N[9] = np.nan
    return reward_N


def by_hand(kind, scale, reward_N, log_prob, old, reference, batch, epsilon, epsilon_high, beta):
    """The loss, with loops."""
    counts = batch["learned"].sum(axis=2)
    given = [r for r in reward_N if not math.isnan(r)]
    total = 0.0
    for a in range(A):
        for b in range(B):
            n = a * B + b
            group = [r for r in reward_N[n // G * G : n // G * G + G] if not math.isnan(r)]
            if math.isnan(reward_N[n]) or max(group) == min(group):
                continue
            mean = sum(group) / len(group)
            advantage = reward_N[n] - mean
            if scale != "none":
                values = group if scale == "group" else given
                middle = sum(values) / len(values)
                advantage /= math.sqrt(sum((r - middle) ** 2 for r in values) / (len(values) - 1)) + 1e-4
            losses = []
            for s in range(S):
                if not batch["learned"][a, b, s + 1]:
                    continue
                ratio = math.exp(log_prob[a, b, s] - old[a, b, s])
                clipped = min(max(ratio, 1 - epsilon), 1 + epsilon_high)
                d = reference[a, b, s] - log_prob[a, b, s]
                losses.append(-min(ratio * advantage, clipped * advantage) + beta * (math.exp(d) - d - 1))
            match kind:
                case "grpo":
                    total += sum(losses) / len(losses) / (A * B)
                case "bnpo":
                    total += sum(losses) / counts[a].sum() / A
                case "dapo":
                    total += sum(losses) / counts.sum()
                case "dr_grpo":
                    total += sum(losses) / (A * B * MAX_NEW)
    return total


def fields(batch, rewards, kind, scale="group"):
    advantage_N, teaches_N = advantages(rewards, G, scale)
    weights = token_weights(kind, batch["learned"].sum(axis=2), MAX_NEW) * teaches_N.reshape(A, B)
    rows = {name: batch[name] for name in ("tokens", "length", "learned")}
    return rows | {"advantage": advantage_N.reshape(A, B), "token_weight": weights}


def micro_batches(rows):
    return [{name: jnp.asarray(values[a]) for name, values in rows.items()} for a in range(A)]


@pytest.fixture(scope="module")
def policy(model, batch):
    """log-probabilities of the targets, (A, B, S) float64."""
    given = jax.jit(lambda rows: log_probs(model, rows)[0])
    rows = {name: batch[name] for name in ("tokens", "length", "learned")}
    return np.stack([np.asarray(given(micro), np.float64) for micro in micro_batches(rows)])


@pytest.mark.parametrize(
    "kind, scale, epsilon_high, beta",
    [("grpo", "group", None, 0.0), ("bnpo", "batch", None, 0.04), ("dapo", "group", 0.28, 0.0), ("dr_grpo", "none", None, 0.1)],
)
def test_each_loss_is_its_formula(model, batch, rewards, policy, kind, scale, epsilon_high, beta):
    old = (policy + batch["old"]).astype(np.float32)
    reference = (policy + batch["reference"]).astype(np.float32)
    rows = fields(batch, rewards, kind, scale) | {"old_log_probs": old, "reference_log_probs": reference}
    loss_fn = functools.partial(policy_gradient_loss, epsilon=0.2, epsilon_high=epsilon_high, beta=beta)
    outputs = [loss_fn(model, micro) for micro in micro_batches(rows)]
    loss = sum(float(output.sum) for output in outputs) / sum(float(output.weight) for output in outputs)
    expected = by_hand(kind, scale, rewards, policy, old, reference, batch, 0.2, epsilon_high or 0.2, beta)
    assert loss == pytest.approx(expected, rel=2e-5, abs=1e-7) and abs(expected) > 1e-3
    clipped = outputs[0].metrics["tokens"].clipped
    assert 0 < float(clipped) < float(outputs[0].metrics["tokens"].tokens)


def test_on_policy_the_gradient_is_the_plain_policy_gradient(model, batch, rewards):
    """With ratio 1: of the mean over tokens of advantage x log-probability."""
    rows = micro_batches(fields(batch, rewards, "dapo"))[0]
    graph, params = nnx.split(model)

    def plain(params):
        log_probs_BS, _, _ = log_probs(nnx.merge(graph, params), rows)
        weight_B = rows["token_weight"] * rows["advantage"]
        return -jnp.sum(weight_B[:, None] * log_probs_BS, where=rows["learned"][:, 1:])

    given = jax.grad(lambda params: policy_gradient_loss(nnx.merge(graph, params), rows).objective)(params)
    expected = jax.grad(plain)(params)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest), given, expected)
    assert largest > 1e-3


def test_a_group_of_equal_rewards_gives_no_gradient_and_no_kl(model, batch):
    rows = fields(batch, np.full(A * B, 0.7), "grpo") | {"reference_log_probs": batch["reference"]}
    graph, params = nnx.split(model)
    loss = functools.partial(policy_gradient_loss, beta=0.5)
    gradient = jax.grad(lambda params: loss(nnx.merge(graph, params), micro_batches(rows)[0]).objective)(params)
    assert all(not np.any(g) for g in jax.tree.leaves(gradient))


def test_temperature_and_entropy(model, batch):
    rows = micro_batches({name: batch[name] for name in ("tokens", "length", "learned")})[0]
    log_probs_BS, entropy_BS, _ = log_probs(model, rows, temperature=0.5)
    log_p_BSV = np.asarray(jax.nn.log_softmax(model(rows["tokens"][:, :-1]) / 0.5), np.float64)
    targets_BS = np.asarray(rows["tokens"][:, 1:])
    expected_BS = np.take_along_axis(log_p_BSV, targets_BS[..., None], axis=2)[..., 0]
    np.testing.assert_allclose(log_probs_BS, expected_BS, atol=1e-5)
    np.testing.assert_allclose(entropy_BS, -np.sum(np.exp(log_p_BSV) * log_p_BSV, axis=2), rtol=1e-4)


def test_advantages_by_hand():
    reward_N = [1, 0, 0, 1, 2, 2, np.nan, 2, np.nan, np.nan, np.nan, np.nan, 3, np.nan, 1, np.nan]
    advantage_N, teaches_N = advantages(np.array(reward_N), 4)
    first, last = 0.5 / (math.sqrt(1 / 3) + 1e-4), 1 / (math.sqrt(2) + 1e-4)
    expected = [first, -first, -first, first, 0, 0, 0, 0, 0, 0, 0, 0, last, 0, -last, 0]
    np.testing.assert_allclose(advantage_N, expected, rtol=1e-6)
    assert teaches_N.tolist() == [True] * 4 + [False] * 8 + [True, False, True, False]


def test_a_mixture_of_experts_is_balanced_over_the_answers(batch):
    """Its auxiliary loss is next_token_loss's of the same tokens, for each row as the mean over tokens."""
    model = Transformer(llama.model_config(n_layers=1, use_moe=True), nnx.Rngs(0))
    rows = micro_batches(fields(batch, np.arange(A * B), "grpo"))[0]
    output, text = policy_gradient_loss(model, rows), next_token_loss(model, rows)
    given = output.metrics["tokens"].means(output.weight)
    expected = text.metrics["experts"].means(text.weight)
    for name, value in expected.items():
        assert float(given[name]) == pytest.approx(float(value), rel=1e-5), name
    auxiliary = float(output.objective - output.sum)
    assert auxiliary == pytest.approx(B * float(expected["train/auxiliary_loss"]), rel=1e-4) and auxiliary > 0
