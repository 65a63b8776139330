"""The time a program is expected to take on a GPU, from its roofline and what was measured on such GPUs.

The model: T = sum over groups of kernels (bound / efficiency) + kernels x gap. Its five coefficients, slowdowns of at least 1,
are fitted to the measured programs by non-negative least squares on relative errors. Where a trace shows a group's own time,
that is one more equation. With few measurements the fit would have no unique answer, so the coefficients are pulled towards the
one slowdown that all programs have in common (ridge regression); a single measurement gives just that.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.optimize import nnls

from mateconv_jax.planning.hlo_report import GROUPS
from mateconv_jax.planning.measurements import Measurement
from mateconv_jax.planning.roofline import LAUNCH, Roofline

# Of 0.01, 0.1 and 0.3 the one that predicts an H100's training steps best when each is left out (docs/planning.md).
PULL = 0.1


@dataclasses.dataclass(frozen=True)
class Expected:
    """An expectation.

    Attributes:
      seconds: of one run of the program.
      groups: seconds of each of hlo_report.GROUPS, of "launches" and of "network", which sum up to `seconds`.
      error: root mean square of the relative errors with which the measured programs are predicted when each is left out of
        the fit; None for a single one.
      source: what was measured, on which card, by which version, in words.
    """

    seconds: float
    groups: dict[str, float]
    error: float | None
    source: str


def expected_seconds(bounds: Roofline, program: str, dtype: str, card: str, measured: Sequence[Measurement]) -> Expected | None:
    """The time of one run of a program on a card of jax's device kind `card`, from measurements of the same kind of program in
    the same dtype on that card; None if there are none. Communication between devices counts with its bound.

    Args:
      bounds: of the program, on that card.
      program: one of measurements.PROGRAMS.
    """
    known = relevant(measured, program, dtype, card)
    if not known:
        return None
    slowdowns = fit(known)
    work = np.array([bounds.groups[group] for group in GROUPS] + [bounds.kernels * LAUNCH])
    groups = dict(zip((*GROUPS, "launches"), (work * slowdowns).tolist(), strict=True)) | {"network": bounds.network}
    return Expected(sum(groups.values()), groups, _error(known), _describe(known))


def relevant(measured: Sequence[Measurement], program: str, dtype: str, card: str) -> list[Measurement]:
    """The newest measurement of each configuration."""
    newest: dict[str, Measurement] = {}
    for m in measured:
        is_relevant = (m.program, m.dtype, m.card) == (program, dtype, card)
        if is_relevant and (m.what not in newest or newest[m.what].date <= m.date):
            newest[m.what] = m
    return list(newest.values())


def fit(measured: Sequence[Measurement]) -> np.ndarray:
    """Slowdowns, at least 1, of the kernels of each of GROUPS and of the launches: (5,)."""
    rows, targets = [], []
    for m in measured:
        rows.append(_work(m) / m.ms)
        targets.append(1.0)
        for i, group in enumerate(GROUPS):
            if group in m.groups_ms:
                rows.append(np.eye(len(GROUPS) + 1)[i] * _work(m) / m.ms)
                targets.append(m.groups_ms[group] / m.ms)
    common = max(float(np.median([m.ms / _work(m).sum() for m in measured])), 1.0)
    n = len(GROUPS) + 1
    matrix = np.vstack([*rows, PULL * np.eye(n)])
    target = np.concatenate([targets, np.full(n, PULL * common)])
    return 1 + nnls(matrix, target - matrix.sum(axis=1))[0]


def left_out(measured: Sequence[Measurement]) -> list[float]:
    """Milliseconds that are expected of each, from all others. At least two."""
    others = [[m for j, m in enumerate(measured) if j != i] for i in range(len(measured))]
    return [float(_work(m) @ fit(rest)) for m, rest in zip(measured, others, strict=True)]


def _error(measured: Sequence[Measurement]) -> float | None:
    if len(measured) < 2:
        return None
    errors = [ms / m.ms - 1 for ms, m in zip(left_out(measured), measured, strict=True)]
    return float(np.sqrt(np.mean(np.square(errors))))


def _work(m: Measurement) -> np.ndarray:
    """(5,) milliseconds, by bounds."""
    return np.array([m.bound_ms.get(group, 0.0) for group in GROUPS] + [m.launches * LAUNCH * 1e3])


def source(measured: Sequence[Measurement], program: str, dtype: str, card: str) -> str:
    """What an expectation comes from, or why there is none. An expectation is not carried over from another card: which share
    of its peaks a kernel reaches is a property of the card, and nothing would tell how wrong it is.
    """
    known = relevant(measured, program, dtype, card)
    if known:
        return _describe(known)
    if not measured:
        return "nothing expected: no GPU has been measured yet (bash benchmarks/gpu.sh --record does)"
    of_card = any(m.card == card for m in measured)
    in_dtype = f" as a {program} in {dtype}" if of_card else ""
    return f"nothing expected: nothing was measured on a {card}{in_dtype} (bash benchmarks/gpu.sh --record there does)"


def _describe(measured: Sequence[Measurement]) -> str:
    """Such as "14 training steps measured on NVIDIA H100 80GB HBM3, jax 0.11.2, 2026-11-26"."""
    m, plural = measured[0], "s" * (len(measured) > 1)
    versions = ", ".join(sorted({m.jax for m in measured}))
    dates = sorted({m.date for m in measured})
    period = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{len(measured)} {m.program}{plural} measured on {m.card}, jax {versions}, {period}"
