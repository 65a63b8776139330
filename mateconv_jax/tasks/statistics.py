"""How sure a mean over questions is, and whether guessing would have reached it.

scipy.stats is imported where it is used: that takes 1.5 s, and training may never need it.
"""

import math
from collections import Counter

import numpy as np


def stderr(values: list[float]) -> float | None:
    """Standard error of the mean, from the sample's standard deviation (n - 1), as lm_eval's; None: fewer than two values."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def interval(values: list[float]) -> list[float] | None:
    """95 % confidence interval of the mean: of rights and wrongs the exact one (Clopper and Pearson, 1934), otherwise 1.96
    standard errors on both sides; None: a single value that is neither 0 nor 1.
    """
    from scipy import stats

    if set(values) <= {0.0, 1.0}:
        found = stats.binomtest(int(sum(values)), len(values)).proportion_ci(0.95, "exact")
        return [float(found.low), float(found.high)]
    return around(float(np.mean(values)), stderr(values))


def around(mean: float, error: float | None) -> list[float] | None:
    return None if error is None else [mean - 1.96 * error, mean + 1.96 * error]


def p_value(n_right: int, n_choices: list[int]) -> float:
    """Probability that guessing gets a number of right answers that is at most as likely as n_right: the exact two-sided
    binomial test, where the numbers of choices are all the same. Otherwise the exact distribution of a sum of binomials.
    """
    from scipy import stats

    pmf = np.ones(1)
    for choices, n in Counter(n_choices).items():
        pmf = np.convolve(pmf, stats.binom.pmf(np.arange(n + 1), n, 1 / choices))
    return float(min(1.0, pmf[pmf <= pmf[n_right] * (1 + 1e-7)].sum()))  # the tolerance is scipy's binomtest's


def stderr_of_macro(errors: list[float | None]) -> float | None:
    """Of the mean of the means of independent groups (lm_eval's unweighted_mean_stderr); None: one has none."""
    known = [error for error in errors if error is not None]
    return math.sqrt(sum(error**2 for error in known)) / len(known) if len(known) == len(errors) else None
