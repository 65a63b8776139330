"""Preference losses against the papers' formulas, worked out in numpy from the model's own logits."""

import numpy as np
import pytest
from flax import nnx

from mateconv_jax import config as config_lib
from mateconv_jax.losses.preference import PreferenceOptions, preference_loss, score_answers
from mateconv_jax.model.config import ModelConfig, ModelOptions
from mateconv_jax.model.transformer import Transformer


def model_of(**changes):
    config = config_lib.default_config()
    config.model.update(dict(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=40, max_seq_len=16) | changes)
    config.data.seq_len = 12
    options = config_lib.options(ModelOptions, config_lib.resolve(config).model)
    return Transformer(ModelConfig.make(options, "float32"), nnx.Rngs(0))


@pytest.fixture(scope="module")
def model():
    return model_of()


def pairs():
    random, n = np.random.default_rng(0), 5
    length = random.integers(7, 14, (n, 2))
    place = np.arange(13)
    return {
        "tokens": random.integers(0, 40, (n, 2, 13)).astype(np.uint16),
        "length": length.astype(np.int32),
        "learned": (place >= 4) & (place < length[..., None]) & (random.random((n, 2, 13)) < 0.8) | (place == 5),
        "reference": random.normal(-20, 4, (n, 2)).astype(np.float32),
    }


def options(kind="sigmoid", beta=0.3, label_smoothing=0.0, gamma=0.5, sft_coef=0.0):
    return PreferenceOptions(kind, beta, label_smoothing, gamma, sft_coef)


def log_probs(model, batch):
    """(log-probability of each answer, its tokens), (n, 2) each, token by token in float64."""
    sums = np.zeros(batch["length"].shape)
    counts = np.zeros(batch["length"].shape)
    all_ids = batch["tokens"].astype(np.int32)
    all_logits = np.asarray(model(all_ids.reshape(-1, 13)[:, :-1]), np.float64).reshape(*sums.shape, 12, -1)
    for i in np.ndindex(sums.shape):
        ids, logits = all_ids[i], all_logits[i]
        log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        for t in range(1, batch["length"][i]):
            if batch["learned"][i][t]:
                sums[i] += log_p[t - 1, ids[t]]
                counts[i] += 1
    return sums, counts


def log_sigmoid(x):
    return -np.log1p(np.exp(-x))


def expected(kind, sums, counts, reference, beta, label_smoothing, gamma, sft_coef):
    """Per pair: sigmoid from Rafailov et al. (2023), eq. 7, and Mitchell's cDPO note, eq. 3; ipo, simpo and orpo from TRL 0.24's
    DPOTrainer, CPOTrainer and ORPOTrainer.
    """
    (w, r), (n_w, n_r) = sums.T, counts.T
    ref_w, ref_r = reference.T
    if kind == "sigmoid":
        h = beta * ((w - ref_w) - (r - ref_r))
        loss = -(1 - label_smoothing) * log_sigmoid(h) - label_smoothing * log_sigmoid(-h)
    elif kind == "ipo":
        loss = ((w / n_w - ref_w / n_w) - (r / n_r - ref_r / n_r) - 1 / (2 * beta)) ** 2
    elif kind == "simpo":
        h = beta * (w / n_w - r / n_r - gamma / beta)
        loss = -(1 - label_smoothing) * log_sigmoid(h) - label_smoothing * log_sigmoid(-h)
    else:
        p_w, p_r = np.exp(w / n_w), np.exp(r / n_r)
        odds_ratio = (p_w / (1 - p_w)) / (p_r / (1 - p_r))
        loss = -w / n_w - beta * log_sigmoid(np.log(odds_ratio))
    return loss - sft_coef * w / n_w


@pytest.mark.parametrize(
    "kind, label_smoothing, sft_coef",
    [
        ("sigmoid", 0.0, 0.0),
        ("sigmoid", 0.2, 0.7),
        ("ipo", 0.0, 0.0),
        ("simpo", 0.0, 0.0),
        ("simpo", 0.1, 0.0),
        ("orpo", 0.0, 0.5),
    ],
)
def test_the_loss_is_the_formula(model, kind, label_smoothing, sft_coef):
    batch = pairs()
    output = preference_loss(model, batch, options=options(kind, 0.3, label_smoothing, 0.5, sft_coef))
    sums, counts = log_probs(model, batch)
    losses = expected(kind, sums, counts, batch["reference"].astype(float), 0.3, label_smoothing, 0.5, sft_coef)
    assert float(output.weight) == 5 and float(output.sum) == pytest.approx(losses.sum(), rel=1e-5)
    assert output.objective is output.sum


def test_what_is_watched(model):
    batch = pairs()
    sums, _ = log_probs(model, batch)
    ratios = sums - batch["reference"]
    metrics = preference_loss(model, batch, options=options()).metrics
    assert {name: float(total) / 5 for name, total in metrics.items()} == pytest.approx(
        {
            "dpo/margin": 0.3 * (ratios[:, 0] - ratios[:, 1]).mean(),
            "dpo/accuracy": (ratios[:, 0] > ratios[:, 1]).mean(),
            "dpo/chosen_logp": sums[:, 0].mean(),
            "dpo/rejected_logp": sums[:, 1].mean(),
            "dpo/kl": (ratios**2).mean() / 2,
        },
        rel=1e-4,
    )
    without = preference_loss(model, {**batch, "reference": None}, options=options("simpo")).metrics
    assert "dpo/kl" not in without  # there is no reference


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_a_model_that_is_its_own_reference_has_a_loss_of_ln_2(model, label_smoothing):
    batch = pairs()
    batch["reference"] = score_answers(model, batch).log_prob_B2
    output = preference_loss(model, batch, options=options(label_smoothing=label_smoothing))
    assert float(output.sum / output.weight) == pytest.approx(np.log(2), abs=1e-6)


def test_rows_that_only_fill_a_batch_count_nothing(model):
    batch = pairs()
    filled = {name: np.concatenate([x[:3], np.zeros_like(x[3:])]) for name, x in batch.items()}
    sums, counts = (x[:3] for x in log_probs(model, batch))
    for kind in ("sigmoid", "orpo"):
        together = preference_loss(model, filled, options=options(kind))
        losses = expected(kind, sums, counts, batch["reference"][:3].astype(float), 0.3, 0.0, 0.5, 0.0)
        assert float(together.weight) == 3 and float(together.sum) == pytest.approx(losses.sum(), rel=1e-5)
        assert float(together.metrics["dpo/chosen_logp"]) == pytest.approx(sums[:, 0].sum(), rel=1e-5)
        assert all(np.isfinite(float(total)) for total in together.metrics.values())


@pytest.mark.slow
def test_experts_are_balanced_per_pair():
    """The auxiliary loss is a mean over a pair's two rows, whatever their lengths."""
    model, batch = model_of(use_moe=True, aux_loss_alpha=0.5), pairs()
    output = preference_loss(model, batch, options=options())
    auxiliary = []
    for i in np.ndindex(5, 2):
        row = {name: batch[name][i][None] for name in ("tokens", "length", "learned")}
        ids = row["tokens"].astype(np.int32)
        learned = row["learned"][:, 1:] & (np.arange(12) < row["length"][:, None] - 1)
        _, routing = model.logits_and_routing(ids[:, :-1], is_real_BS=learned)
        auxiliary.append(float(routing.auxiliary_loss.sum()) / learned.sum())
    assert float(output.objective - output.sum) == pytest.approx(5 * np.mean(auxiliary), rel=1e-4)
    means = output.means(output.weight)
    assert 0 < float(means["experts/entropy"]) <= np.log(4) + 1e-5
