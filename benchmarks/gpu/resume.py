"""The same run twice, killed and continued:  python -m benchmarks.gpu.resume --out DIR --data DATASET

What is equal to the bit, with and without training.deterministic; and 50 asynchronous checkpoints in a row.
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
    kinds = {"": {}} if runs.dry_run else {"": {}, "deterministic-": {"deterministic": True}}
    first = {kind: runs.start(f"{kind}first", f"{kind}cache", **keys) for kind, keys in kinds.items()}
    for kind, process in first.items():
        expect_exit(report, f"train, {runs.steps} steps {kind.strip('-')}", process, runs.output(f"{kind}first"), 0)
        if process.returncode == 0:
            facts(report, runs, f"{kind}first", "log_interval 1, beside other runs")
    others = {}
    for kind, keys in kinds.items():
        others[f"{kind}again"] = runs.start(f"{kind}again", f"{kind}cache", **keys)
        others[f"{kind}killed"] = runs.start(f"{kind}killed", f"{kind}cache", **keys)
        if not runs.dry_run:
            others[f"{kind}empty-cache"] = runs.start(f"{kind}empty-cache", f"{kind}cache2", **keys)
    killed = {kind: kill(runs, f"{kind}killed", others.pop(f"{kind}killed")) for kind in kinds}
    others |= {f"{kind}killed": runs.start(f"{kind}killed", f"{kind}cache", **keys) for kind, keys in kinds.items()}
    for name, process in others.items():
        if process.wait() != 0:
            report.row(f"train, {name}", f"exit code {process.returncode}", tail(runs.output(name)), False)
    for kind in kinds:
        for what, name in (("the same command again", "again"), ("the same with an empty compilation cache", "empty-cache"),
                           (f"killed at step {killed[kind]} and continued", "killed")):  # fmt: skip
            if f"{kind}{name}" in others and others[f"{kind}{name}"].returncode == first[kind].returncode == 0:
                equal_or_not(report, runs, kind, what, name)


def kill(runs: Runs, name: str, process: subprocess.Popen) -> int:
    """SIGKILL between two checkpoints; the last step that was logged."""
    runs.wait_for(name, process, runs.steps * 5 // 8)
    process.kill()
    process.wait()
    return max((m["step"] for m in complete_lines(runs.root / name / "metrics.jsonl")), default=0)


def equal_or_not(report: Report, runs: Runs, kind: str, what: str, name: str) -> None:
    one, other = (saved(runs.root / f"{kind}{which}", runs.steps)[0] for which in ("first", name))
    pairs = list(zip(jax.tree.leaves(one["params"]), jax.tree.leaves(other["params"]), strict=True))
    equal = all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))
    off = max(float(np.max(np.abs(a - b))) for a, b in pairs)
    losses = [
        [m["train/loss"] for m in metrics_of(runs.root / f"{kind}{which}") if "train/loss" in m] for which in ("first", name)
    ]
    until = next((i for i, (a, b) in enumerate(zip(*losses, strict=True), 1) if a != b), None)
    promised = kind and name != "empty-cache" or runs.dry_run  # another cache may hold other kernels
    report.row(
        f"{what}{', training.deterministic' if kind else ''}",
        "equal to the bit" if equal else f"parameters up to {off:.1e} apart",
        "all losses equal" if until is None else f"losses equal before step {until}",
        equal if promised else None,
    )


if __name__ == "__main__":
    main(sizes.parse_args(__doc__))
