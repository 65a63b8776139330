"""Read the config.json and metrics.jsonl of finished and running trainings, without JAX."""

import dataclasses
import json
import math
import os
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from mateconv_jax.errors import UserError

MADE_BY = "mateconv_jax report"  # in the metadata of pages and images: tells a report from what is not to be replaced


@dataclasses.dataclass(frozen=True)
class Curve:
    """The finite values of one metric.

    Attributes:
      steps: int64, ascending.
      values: float64.
    """

    steps: np.ndarray
    values: np.ndarray

    def __len__(self):
        return len(self.steps)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's configuration and metrics.

    Attributes:
      name: the shortest path that distinguishes it from the other runs.
      config: {"section.key": value} from config.json.
      curves: {metric: Curve}.
      last_step: the highest step in metrics.jsonl.
      last_written: modification time of metrics.jsonl, seconds since the epoch.
      not_finite: logged steps whose training loss or gradient norm is NaN or infinite.
    """

    name: str
    config: dict[str, object]
    curves: dict[str, Curve]
    last_step: int
    last_written: float
    not_finite: list[int]

    def curve(self, key: str) -> Curve:
        """The metric's curve; empty if the run does not have it."""
        return self.curves.get(key, Curve(np.empty(0, np.int64), np.empty(0)))

    @property
    def learns_preferences(self) -> bool:
        """Whether its rows are pairs of answers."""
        return "dpo/margin" in self.curves

    @property
    def learns_from_reward(self) -> bool:
        return "grpo/reward" in self.curves

    @property
    def validation_sets(self) -> list[str]:
        """Names of data.val_data_path; none where the run has a single set."""
        parts = [key.split("/") for key in self.curves]
        return [part[1] for part in parts if len(part) == 3 and part[0] == "val" and part[2] == "loss"]

    @property
    def task_metrics(self) -> list[str]:
        """tasks/NAME/acc, or what else is the number that counts of each of training.eval_tasks."""
        others = ("_macro", "_norm", "_bytes", "/perplexity", "/chance")
        return [key for key in self.curves if key.startswith("tasks/") and not key.endswith(others)]

    @property
    def tokens_per_step(self) -> int | None:
        """None if the config does not determine it."""
        sizes = [self.config.get(key) for key in ("training.batch_size", "data.seq_len")]
        sizes.append(self.config.get("training.accumulation_steps", 1))  # older runs do not have the key
        sizes.append(2 if self.learns_preferences else 1)
        known = [size for size in sizes if isinstance(size, int)]
        return math.prod(known) if len(known) == len(sizes) else None

    def training_seconds(self) -> float | None:
        """Time of the measured steps, excluding the first (compilation), validation and saving; None: not measured."""
        measured, logged = self.curve("step_time_s"), self.curve("train/loss").steps
        if not len(measured):
            return None
        logged = np.union1d(logged, measured.steps)
        since_last = np.diff(logged, prepend=0)[np.searchsorted(logged, measured.steps)]
        return float(np.sum(measured.values * since_last))


def read_runs(folders: list[str]) -> list[Run]:
    """The runs in these folders.

    Raises:
      UserError: a folder twice, one that holds no run, or none that has metrics.
    """
    paths = [Path(folder).resolve() for folder in folders]
    for folder, path in zip(folders, paths, strict=True):
        if paths.count(path) > 1:
            raise UserError(f"RUN: {folder!r} is given twice (expected different run folders)")
    above = os.path.commonpath([path.parent for path in paths])
    return [
        _read_run(folder, os.path.relpath(path, above).replace(os.sep, "/"))
        for folder, path in zip(folders, paths, strict=True)
    ]


def _read_run(folder: str, name: str) -> Run:
    config = _read_config(folder)
    path = Path(folder) / "metrics.jsonl"
    try:
        *finished, last = path.read_bytes().split(b"\n")
        last_written = path.stat().st_mtime
    except OSError as error:
        raise UserError(f"RUN: no metrics yet in {folder!r} (expected metrics.jsonl; train a little longer)") from error
    lines = [_parse(line) for line in finished if line.strip()]
    if unreadable := lines.count(None):
        print(f"warning: {path}: skipped {unreadable:,} lines that are not a JSON object with a step", file=sys.stderr)
    lines = [line for line in [*lines, _parse(last)] if line is not None]  # the last line may be incomplete
    if not lines:
        raise UserError(f"RUN: no metrics yet in {folder!r} (metrics.jsonl has no complete line; train a little longer)")

    points = defaultdict(dict)  # metric -> {step: value}; a step repeated after a resume replaces the earlier one
    for line in lines:
        for key, value in line.items():
            if isinstance(value, int | float):
                points[key][line["step"]] = value
    not_finite, curves = set(), {}
    for key, values_by_step in points.items():
        steps = np.array(sorted(values_by_step), np.int64)
        values = np.array([values_by_step[step] for step in steps.tolist()], np.float64)
        finite = np.isfinite(values)
        curves[key] = Curve(steps[finite], values[finite])
        if key in ("train/loss", "grad_norm"):
            not_finite.update(steps[~finite].tolist())
    return Run(name, config, curves, max(line["step"] for line in lines), last_written, sorted(not_finite))


def _read_config(folder: str) -> dict[str, object]:
    path = Path(folder) / "config.json"
    try:
        sections = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"RUN: no run at {folder!r} (expected a run folder, which has a config.json)") from error
    except ValueError as error:
        raise UserError(f"RUN: {str(path)!r} is not valid JSON ({error})") from error
    if not isinstance(sections, dict) or not all(isinstance(section, dict) for section in sections.values()):
        raise UserError(f"RUN: {str(path)!r} is not a run's configuration (expected sections of keys)")
    return {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}


def _parse(line: bytes) -> dict | None:
    """The line's metrics; None if it is not a JSON object with a step."""
    try:
        metrics = json.loads(line)
    except ValueError:
        return None
    return metrics if isinstance(metrics, dict) and isinstance(metrics.get("step"), int) else None


# ---- curves -------------------------------------------------------------------------------------------------------


def smoothed(curve: Curve, over: float) -> Curve:
    """An exponential moving average: a point `over` steps back has weight 1/e, independent of the log interval. 0 returns the
    curve unchanged.

    Debiased: it is a weighted mean of the points so far, so it starts at the first value instead of 0.
    """
    if not over or not len(curve):
        return curve
    keep = np.exp(-np.diff(curve.steps, prepend=curve.steps[0]) / over)
    values, total, weight = [], 0.0, 0.0
    for kept, value in zip(keep.tolist(), curve.values.tolist(), strict=True):
        total = kept * total + value
        weight = kept * weight + 1
        values.append(total / weight)
    return Curve(curve.steps, np.array(values))


def thinned(curve: Curve, buckets: int) -> Curve:
    """Keep the minimum and maximum of each bucket of neighbouring points, and both end points, so that spikes survive."""
    if len(curve) <= 2 * buckets:
        return curve
    kept = {0, len(curve) - 1}
    for bucket in np.array_split(np.arange(len(curve)), buckets):
        kept |= {int(bucket[np.argmin(curve.values[bucket])]), int(bucket[np.argmax(curve.values[bucket])])}
    kept = sorted(kept)
    return Curve(curve.steps[kept], curve.values[kept])
