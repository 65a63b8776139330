"""The paired bootstrap beside scipy's, and what a comparison says."""

import numpy as np
import pytest
import scipy.stats

from mateconv_jax.evaluation import comparison
from mateconv_jax.evaluation.comparison import Paired, Plain, bootstrap, compare, short_names


def units(N=80, seed=3):
    """Bits and bytes of N documents under three models; the second is 2 % worse, the third equals the first."""
    rng = np.random.default_rng(seed)
    bytes_N = rng.integers(20, 2000, N).astype(float)
    hard_N = rng.uniform(0.5, 3, N)  # the same for all models, and much more than what they differ by
    a_N = bytes_N * hard_N
    return np.stack([a_N, a_N * rng.normal(1.02, 0.03, N), a_N]), np.stack([bytes_N] * 3)


def test_intervals_and_p_equal_scipys():
    value_MN, weight_MN = units()
    ours = bootstrap(value_MN, weight_MN)

    def difference(a, b, n, axis=-1):
        return (b.sum(axis) - a.sum(axis)) / n.sum(axis)

    data = (value_MN[0], value_MN[1], weight_MN[0])
    theirs = scipy.stats.bootstrap(data, difference, paired=True, vectorized=True, n_resamples=5000, method="percentile", rng=7)
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    found = ours["differences"][0]
    assert found["value"] == pytest.approx(difference(*data), rel=1e-12)
    assert found["low"] == pytest.approx(theirs.confidence_interval.low, abs=0.06 * width)
    assert found["high"] == pytest.approx(theirs.confidence_interval.high, abs=0.06 * width)
    assert width < 0.2 * (ours["scores"][0]["high"] - ours["scores"][0]["low"])  # paired: the documents' hardness is gone
    assert found["p"] < 0.001
    assert bootstrap(value_MN, weight_MN) == ours


def test_p_of_a_case_that_can_be_counted():
    """Of ten questions one is answered by the second model alone: a resample lacks it with probability 0.9^10."""
    value_MN = np.zeros((2, 10))
    value_MN[1, 4] = 1
    [difference] = bootstrap(value_MN, np.ones((2, 10)))["differences"]
    assert difference["value"] == pytest.approx(0.1) and difference["low"] == 0
    assert difference["p"] == pytest.approx(2 * 0.9**10, abs=0.03)


def test_equal_models_do_not_differ():
    value_MN, weight_MN = units()
    assert bootstrap(value_MN, weight_MN)["differences"][1] == {"value": 0, "low": 0, "high": 0, "p": 1}


def test_batches_of_resamples_change_nothing(monkeypatch):
    value_MN, weight_MN = units()
    whole = bootstrap(value_MN, weight_MN)
    monkeypatch.setattr(comparison, "AT_ONCE", 8 * 80 * 999)
    again = bootstrap(value_MN, weight_MN)
    assert [score["low"] for score in again["scores"]] == pytest.approx([score["low"] for score in whole["scores"]], rel=1e-12)


def test_groups_and_what_a_model_lacks(capsys):
    value_MN, weight_MN = units(6)
    value_MN[1, 5] = np.nan  # as a dialogue is to a tokenizer without a chat template
    results = [{"model_path": path, "step": step} for path, step in (("runs/a", 3), ("runs/[b]", None), ("c", 1))]
    measures = [Paired("bits", ["x", "x", "x", "y", "y", "y"], value_MN, weight_MN, True), Plain("gzip", "", [1.5, 1.5, None])]
    compared = compare(results, measures)
    assert [(row["measure"], row["group"], row["units"]) for row in compared["rows"]] == [
        ("bits", "", 5), ("bits", "x", 3), ("bits", "y", 2), ("gzip", "", None)
    ]  # fmt: skip
    assert [model["name"] for model in compared["models"]] == ["runs/a", "runs/[b]", "c"]
    total = value_MN[0, :5].sum() / weight_MN[0, :5].sum()
    assert compared["rows"][0]["scores"][0]["value"] == pytest.approx(total)
    comparison.print_comparison(compared)
    printed = capsys.readouterr().out
    assert f"{total:.4f}" in printed and "1.5000" in printed and "p 1.000" in printed


@pytest.mark.parametrize(
    "paths, names",
    [
        (["runs/out"], ["out"]),
        (["runs/a", "runs/b"], ["a", "b"]),
        (["a/out", "b/out/best"], ["a/out", "b/out/best"]),
        (["x", "x"], ["x", "x"]),
    ],
)
def test_names(paths, names):
    assert short_names(paths) == names
