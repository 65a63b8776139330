"""Start the commands as a user would, and report how they ended."""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu import sizes
from benchmarks.gpu.report import Report
from tests.training.runs import metrics_of


class Runs:
    """Starts `train` with the base configuration, each run in its own folder."""

    def __init__(self, root: Path, args):
        self.root, self.dry_run = root, args.dry_run
        self.steps = 60 if args.dry_run else 200
        keys = {
            "data.train_data_path": args.data, "training.use_ema": True, "training.max_steps": self.steps,
            "training.save_interval": self.steps // 4, "training.eval_interval": self.steps // 2,
            "training.samples_interval": self.steps // 2, "training.log_interval": 1, "training.keep_latest": 10,
        }  # fmt: skip
        if args.dry_run:
            model = {f"model.{key}": value for key, value in sizes.TINY.items()}
            keys |= model | {"model.max_seq_len": 64, "data.seq_len": 64, "training.batch_size": 4}
        self.keys = keys

    def start(self, name: str, cache: str, preallocate: bool = False, **training) -> subprocess.Popen:
        """Start `train` with the run folder ROOT/NAME and the compilation cache ROOT/CACHE; output goes to ROOT/NAME.txt."""
        keys = self.keys | {f"training.{key}": value for key, value in training.items()}
        keys |= {"training.out_dir": self.root / name, "training.compilation_cache_dir": self.root / cache}
        flags = [f"--config.{key}={value}" for key, value in keys.items()]
        return command(self.output(name), "mateconv_jax.train", "--config=configs/base.py", *flags, preallocate=preallocate)

    def output(self, name: str) -> Path:
        return self.root / f"{name}.txt"

    def wait_for(self, name: str, process: subprocess.Popen, step: int, timeout: float = 90) -> bool:
        """Wait until ROOT/NAME has logged `step`. False if it ends before or the time runs out."""
        log, end = self.root / name / "metrics.jsonl", time.monotonic() + timeout
        while process.poll() is None and time.monotonic() < end:
            if log.exists() and any(m["step"] >= step for m in complete_lines(log)):
                return True
            time.sleep(0.005)
        return False


def command(output: Path, module: str, *arguments, preallocate: bool = False, **environment) -> subprocess.Popen:
    """Start a command. preallocate: let JAX take three quarters of the memory at the start, as it does by default."""
    environment = os.environ | environment
    if preallocate:
        environment.pop("XLA_PYTHON_CLIENT_PREALLOCATE", None)
    with output.open("a", encoding="utf-8") as file:
        return subprocess.Popen([sys.executable, "-m", module, *arguments], stdout=file, stderr=file, env=environment)


def complete_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def expect_exit(report: Report, what: str, process: subprocess.Popen, output: Path, code: int, timeout: float = 150) -> None:
    begin = time.perf_counter()
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    ok = process.returncode == code
    waited = f"exit code {process.returncode} after {time.perf_counter() - begin:.0f} s"
    report.row(what, waited, tail(output, 1 if ok else 30), ok)


def tail(path: Path, lines: int = 30) -> str:
    return " / ".join(path.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-lines:])[-3000:]


def facts(report: Report, runs: Runs, name: str, how: str) -> None:
    """Report what a run logged."""
    metrics = [m for m in metrics_of(runs.root / name) if "tokens/s" in m]
    metrics = metrics[len(metrics) // 4 :]
    speed, wait = (statistics.median(m[key] for m in metrics) for key in ("tokens/s", "input_wait"))
    losses = [m["train/loss"] for m in metrics_of(runs.root / name) if "train/loss" in m]
    report.row(
        f"log of {name}",
        f"loss {losses[0]:.3f} to {losses[-1]:.3f}, {speed:,.0f} tokens/s ({how})",
        f"input_wait {wait:.1%}",
        losses[-1] < losses[0],
    )
