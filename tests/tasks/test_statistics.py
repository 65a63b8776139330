import itertools
import math

import numpy as np
import pytest
from scipy import stats

from mateconv_jax.tasks import statistics


@pytest.mark.parametrize("n_right, n, choices", [(0, 5, 4), (30, 100, 4), (25, 100, 4), (520, 1000, 2)])
def test_the_p_value_is_scipys_binomial_test(n_right, n, choices):
    assert statistics.p_value(n_right, [choices] * n) == pytest.approx(
        stats.binomtest(n_right, n, 1 / choices).pvalue, rel=1e-9
    )


def test_the_p_value_of_questions_with_different_numbers_of_choices():
    """Against all 2 to the power of 5 outcomes."""
    n_choices = [2, 3, 4, 4, 5]
    probability = np.zeros(6)
    for outcome in itertools.product((0, 1), repeat=5):
        probability[sum(outcome)] += math.prod(
            1 / n if right else 1 - 1 / n for right, n in zip(outcome, n_choices, strict=True)
        )
    for n_right in range(6):
        expected = probability[probability <= probability[n_right] * (1 + 1e-7)].sum()
        assert statistics.p_value(n_right, n_choices) == pytest.approx(expected)


def test_errors_and_intervals():
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    assert statistics.stderr(values) == pytest.approx(np.std(values, ddof=1) / math.sqrt(5))  # lm_eval's mean_stderr
    assert statistics.stderr([1.0]) is None
    low, high = statistics.interval(values)
    assert stats.binom.sf(2, 5, low) == pytest.approx(0.025) and stats.binom.cdf(3, 5, high) == pytest.approx(0.025)
    assert statistics.interval([0.0, 0.0])[0] == 0 and statistics.interval([0.5]) is None
    assert statistics.interval([0.5, 1.0]) == pytest.approx([0.75 - 1.96 * 0.25, 0.75 + 1.96 * 0.25])
    assert statistics.stderr_of_macro([0.3, 0.4]) == pytest.approx(0.25) and statistics.stderr_of_macro([0.3, None]) is None
