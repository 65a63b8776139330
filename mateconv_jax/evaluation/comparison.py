"""Several models on the same documents, questions or prompts: means, intervals and significance by the paired bootstrap.

Each unit, say a document, has a value and a weight for every model; a model's score is the sum of its values over that of its
weights: bits over bytes, right answers over questions. Units are drawn again with replacement, the same for all models
(Efron, 1979; paired as Koehn, 2004), so that what makes a document hard for all of them does not hide their difference.

Dimensions in names: M models, N units, R resamples.
"""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

EVERYTHING = ""  # the group of all units
RESAMPLES = 5000
SEED = 0
AT_ONCE = 50_000_000  # bytes of counts: resamples are made in batches


@dataclasses.dataclass(frozen=True)
class Paired:
    """One measure of M models on the same N units.

    Attributes:
      name: with its unit.
      groups: of each unit, empty where there are none.
      value_MN: float64. NaN: the model has none for the unit, which then counts for no model.
      weight_MN: float64; None: all 1.
      lower_is_better: None: neither is.
      form: how its values are written.
      unit: what the units are.
    """

    name: str
    groups: list[str]
    value_MN: np.ndarray
    weight_MN: np.ndarray | None = None
    lower_is_better: bool | None = False
    form: str = ".4f"
    unit: str = "documents"


@dataclasses.dataclass(frozen=True)
class Plain:
    """A measure without units to draw from: one value for each model, or None."""

    name: str
    group: str
    values: list[float | None]
    form: str = ".4f"


Measure = Paired | Plain


def compare(results: list[dict], measures: list[Measure]) -> dict:
    """What the models' results say of each other.

    Args:
      results: of the same units, each with its model_path, step and weights.

    Returns:
      A dict that JSON can hold: models, [{name, step, weights}]; resamples, seed; and rows, [{measure, group, units, unit,
      form, lower_is_better, scores: [{value, low, high} for each model], differences: [{value, low, high, p} for each but
      the first, from which it differs by this]}]. low and high bound 95 % of the resamples; p is two-sided. A Plain measure
      has units None and no differences.
    """
    paths = [result["model_path"] for result in results]
    models = [
        {"name": name, "step": result.get("step"), "weights": result.get("weights")}
        for name, result in zip(short_names(paths), results, strict=True)
    ]
    rows = [row for measure in measures for row in (_plain(measure) if isinstance(measure, Plain) else _rows(measure))]
    return {"models": models, "resamples": RESAMPLES, "seed": SEED, "rows": rows}


def _rows(measure: Paired) -> Iterator[dict]:
    weight_MN = np.ones_like(measure.value_MN) if measure.weight_MN is None else measure.weight_MN
    names = sorted(set(measure.groups) - {EVERYTHING})
    for group in [EVERYTHING, *(names if len(names) > 1 else [])]:
        in_group_N = np.array([group in (EVERYTHING, name) for name in measure.groups])
        in_group_N &= np.isfinite(measure.value_MN + weight_MN).all(axis=0)
        if in_group_N.any():
            yield {
                "measure": measure.name,
                "group": group,
                "units": int(in_group_N.sum()),
                "unit": measure.unit,
                "form": measure.form,
                "lower_is_better": measure.lower_is_better,
                **bootstrap(measure.value_MN[:, in_group_N], weight_MN[:, in_group_N]),
            }


def _plain(measure: Plain) -> Iterator[dict]:
    scores = [{"value": value, "low": None, "high": None} for value in measure.values]
    about = {
        "measure": measure.name,
        "group": measure.group,
        "units": None,
        "unit": "",
        "form": measure.form,
        "lower_is_better": None,
    }
    yield about | {"scores": scores, "differences": []}


def short_names(paths: list[str]) -> list[str]:
    """The shortest ends of paths that tell them apart; the paths themselves where nothing does."""
    if len(paths) == 1:
        return [Path(paths[0]).name or paths[0]]
    whole = [Path(os.path.abspath(path)) for path in paths]
    above = os.path.commonpath([path.parent for path in whole])
    names = [os.path.relpath(path, above) for path in whole]
    return names if len(set(names)) == len(names) else paths


def bootstrap(value_MN: np.ndarray, weight_MN: np.ndarray) -> dict:
    """Scores, differences from the first model, 95 % intervals (percentiles) and p; see `compare`."""
    M, N = value_MN.shape
    score_M = ratio(value_MN.sum(axis=1), weight_MN.sum(axis=1))
    sums = np.concatenate([value_MN, weight_MN]).T  # (N, 2M)
    rng = np.random.default_rng(SEED)
    drawn_R2M = np.empty((RESAMPLES, 2 * M))
    batch = max(1, AT_ONCE // (8 * N))
    for start in range(0, RESAMPLES, batch):
        n = min(batch, RESAMPLES - start)
        place = rng.integers(0, N, (n, N)) + np.arange(n)[:, None] * N
        times_drawn_nN = np.bincount(place.ravel(), minlength=n * N).reshape(n, N)
        drawn_R2M[start : start + n] = times_drawn_nN.astype(float) @ sums
    score_RM = ratio(drawn_R2M[:, :M], drawn_R2M[:, M:])
    difference_RM = score_RM - score_RM[:, :1]
    return {
        "scores": [_interval(score_M[m], score_RM[:, m]) for m in range(M)],
        "differences": [
            _interval(score_M[m] - score_M[0], difference_RM[:, m]) | {"p": _p(difference_RM[:, m])} for m in range(1, M)
        ],
    }


def ratio(value: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """NaN where the weight is 0."""
    return np.divide(value, weight, out=np.full(np.shape(value), np.nan), where=weight != 0)


def _interval(value: float, value_R: np.ndarray) -> dict[str, float | None]:
    low, high = np.nanpercentile(value_R, [2.5, 97.5]) if np.isfinite(value_R).any() else (np.nan, np.nan)
    return {name: float(x) if np.isfinite(x) else None for name, x in (("value", value), ("low", low), ("high", high))}


def _p(difference_R: np.ndarray) -> float:
    """How often resamples fall on the rarer side of 0, twice; at least 2 / (R + 1), and 1 where there is no difference."""
    rarer = min((difference_R <= 0).sum(), (difference_R >= 0).sum())
    return min(1.0, 2 * (int(rarer) + 1) / (len(difference_R) + 1))


# ---- table --------------------------------------------------------------------------------------------------------


def print_comparison(compared: dict) -> None:
    """Print what `compare` returns as a table."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    names = [model["name"] for model in compared["models"]]
    table = Table(box=box.SIMPLE)
    for heading in ("", "units", *names, *(f"{name} − {names[0]}" for name in names[1:])):
        table.add_column(escape(heading), justify="left" if not heading else "right")
    for row in compared["rows"]:
        name = f"  {row['group']}" if row["group"] else row["measure"]
        scores = [_written(score["value"], row["form"]) for score in row["scores"]]
        differences = [difference_text(difference, row["form"]) for difference in row["differences"]]
        table.add_row(escape(name), "" if row["units"] is None else f"{row['units']:,}", *scores, *differences)
    console = Console()
    console.print(table)
    if len(names) > 1:
        about = f"[low, high]: 95 % of {compared['resamples']:,} paired bootstrap resamples; p: two-sided, of one comparison"
        console.print(about, markup=False, highlight=False, soft_wrap=True)


def difference_text(difference: dict, form: str) -> str:
    """+0.012 [0.010, 0.014], p 0.001"""
    if difference["low"] is None:
        return "-"
    low, high = (_written(difference[side], form) for side in ("low", "high"))
    return f"{difference['value']:+{form}} [{low}, {high}] p {p_text(difference['p'])}"


def p_text(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _written(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
