"""Repeated, killed and resumed runs:  python -m benchmarks.gpu.resume --out DIR --data DATASET

Which of them are bit-identical, with and without training.deterministic; and 50 asynchronous checkpoints in a row.
"""

import subprocess
import tempfile
from pathlib import Path

import jax
import numpy as np

from benchmarks.gpu import sizes
from benchmarks.gpu.commands import Runs, command, complete_lines, expect_exit, facts, tail
from benchmarks.gpu.report import Report
from tests.training.runs import metrics_of, saved

jax.config.update("jax_platforms", "cpu")  # the GPU is for the commands


def main(args) -> None:
    report = Report(args.out, "resume")
    with tempfile.TemporaryDirectory(dir=args.out, prefix="runs-") as folder:
        runs = Runs(Path(folder), args)
        saving = command(runs.root / "saves.txt", "benchmarks.gpu.saves", "--out", args.out, *["--dry_run"] * args.dry_run)
        same_bits(report, runs)
        expect_exit(report, "asynchronous saves", saving, runs.root / "saves.txt", 0)


def same_bits(report: Report, runs: Runs) -> None:
    modes = {"": {}} if runs.dry_run else {"": {}, "deterministic-": {"deterministic": True}}
    first = {mode: runs.start(f"{mode}first", f"{mode}cache", **keys) for mode, keys in modes.items()}
    for mode, process in first.items():
        expect_exit(report, f"train, {runs.steps} steps {mode.strip('-')}", process, runs.output(f"{mode}first"), 0)
        if process.returncode == 0:
            facts(report, runs, f"{mode}first", "log_interval 1, other runs in parallel")
    others = {}
    for mode, keys in modes.items():
        others[f"{mode}again"] = runs.start(f"{mode}again", f"{mode}cache", **keys)
        others[f"{mode}killed"] = runs.start(f"{mode}killed", f"{mode}cache", **keys)
        if not runs.dry_run:
            others[f"{mode}empty-cache"] = runs.start(f"{mode}empty-cache", f"{mode}cache2", **keys)
    killed = {mode: kill(runs, f"{mode}killed", others.pop(f"{mode}killed")) for mode in modes}
    for mode, keys in modes.items():
        others[f"{mode}killed"] = runs.start(f"{mode}killed", f"{mode}cache", **keys)
    for name, process in others.items():
        if process.wait() != 0:
            report.row(f"train, {name}", f"exit code {process.returncode}", tail(runs.output(name)), False)
    for mode in modes:
        for what, name in (("the same command again", "again"), ("the same with an empty compilation cache", "empty-cache"),
                           (f"killed at step {killed[mode]} and resumed", "killed")):  # fmt: skip
            if f"{mode}{name}" in others and others[f"{mode}{name}"].returncode == first[mode].returncode == 0:
                equal_or_not(report, runs, mode, what, name)


def kill(runs: Runs, name: str, process: subprocess.Popen) -> int:
    """SIGKILL a run between two checkpoints; returns its last logged step."""
    runs.wait_for(name, process, runs.steps * 5 // 8)
    process.kill()
    process.wait()
    return max((m["step"] for m in complete_lines(runs.root / name / "metrics.jsonl")), default=0)


def equal_or_not(report: Report, runs: Runs, mode: str, what: str, name: str) -> None:
    one, other = (saved(runs.root / f"{mode}{which}", runs.steps)[0] for which in ("first", name))
    pairs = list(zip(jax.tree.leaves(one["params"]), jax.tree.leaves(other["params"]), strict=True))
    equal = all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))
    off = max(float(np.max(np.abs(a - b))) for a, b in pairs)
    losses = [
        [m["train/loss"] for m in metrics_of(runs.root / f"{mode}{which}") if "train/loss" in m] for which in ("first", name)
    ]
    until = next((i for i, (a, b) in enumerate(zip(*losses, strict=True), 1) if a != b), None)
    promised = mode and name != "empty-cache" or runs.dry_run  # autotuning for an empty cache may choose other kernels
    report.row(
        f"{what}{', training.deterministic' if mode else ''}",
        "bit-identical" if equal else f"parameters differ by up to {off:.1e}",
        "all losses equal" if until is None else f"losses equal before step {until}",
        equal if promised else None,
    )


if __name__ == "__main__":
    main(sizes.parse_args(__doc__))
