"""The commands as a user gives them:  python -m benchmarks.gpu.real --out DIR --data DATASET

The same run twice, killed and continued, with and without training.deterministic: what is equal to the bit. Sampling while it
trains, SIGTERM, the memory beside what `plan` said, the largest batch that fits and one that does not.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks.gpu import sizes
from benchmarks.gpu.report import Report
from mateconv_jax.planning import target
from tests.training.runs import metrics_of, saved

jax.config.update("jax_platforms", "cpu")  # the GPU is for the commands


class Runs:
    """Starts `train` on the base configuration, each run in a folder of its own."""

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
        """`train` into ROOT/NAME, with the compilation cache ROOT/CACHE; its output goes to ROOT/NAME.txt."""
        keys = self.keys | {f"training.{key}": value for key, value in training.items()}
        keys |= {"training.out_dir": self.root / name, "training.compilation_cache_dir": self.root / cache}
        flags = [f"--config.{key}={value}" for key, value in keys.items()]
        return command(self.output(name), "mateconv_jax.train", "--config=configs/base.py", *flags, preallocate=preallocate)

    def output(self, name: str) -> Path:
        return self.root / f"{name}.txt"

    def wait_for(self, name: str, process: subprocess.Popen, step: int, timeout: float = 90) -> bool:
        """Until ROOT/NAME has logged `step`. False where it ended before."""
        log, end = self.root / name / "metrics.jsonl", time.monotonic() + timeout
        while process.poll() is None and time.monotonic() < end:
            if log.exists() and any(m["step"] >= step for m in complete_lines(log)):
                return True
            time.sleep(0.005)
        return False


def command(output: Path, module: str, *arguments, preallocate: bool = False, **environment) -> subprocess.Popen:
    """preallocate: as jax does by itself, three quarters of the memory at the start."""
    environment = os.environ | environment
    if preallocate:
        environment.pop("XLA_PYTHON_CLIENT_PREALLOCATE", None)
    with output.open("a") as file:
        return subprocess.Popen([sys.executable, "-m", module, *arguments], stdout=file, stderr=file, env=environment)


def complete_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def main(args) -> None:
    report = Report(args.out, "real")
    root = Path(tempfile.mkdtemp(dir=args.out, prefix="runs-"))
    try:
        runs = Runs(root, args)
        # `plan` for an imaginary card of this kind, as before one is rented.
        planning = command(root / "plan.json", "mateconv_jax.plan", *plan_flags(runs), "--json", **NO_GPU)
        saving = command(root / "saves.txt", "benchmarks.gpu.saves", "--out", args.out, *["--dry_run"] * args.dry_run)
        same_bits(report, runs)
        expect_exit(report, "asynchronous saves", saving, root / "saves.txt", 0)
        sample_while_training(report, runs)
        memory(report, runs, planning)
    finally:
        shutil.rmtree(root, ignore_errors=True)


# ---- bits -----------------------------------------------------------------------------------------------------------


def same_bits(report: Report, runs: Runs) -> None:
    kinds = {"": {}} if runs.dry_run else {"": {}, "deterministic-": {"deterministic": True}}
    first = {kind: runs.start(f"{kind}first", f"{kind}cache", **keys) for kind, keys in kinds.items()}
    for kind, process in first.items():
        expect_exit(report, f"train, {runs.steps} steps {kind.strip('-')}", process, runs.output(f"{kind}first"), 0)
        if process.returncode == 0:
            facts(report, runs, f"{kind}first")
    others = {}
    for kind, keys in kinds.items():
        others[f"{kind}again"] = runs.start(f"{kind}again", f"{kind}cache", **keys)
        others[f"{kind}killed"] = runs.start(f"{kind}killed", f"{kind}cache", **keys)
        if not runs.dry_run:
            others[f"{kind}empty-cache"] = runs.start(f"{kind}empty-cache", f"{kind}cache2", **keys)
    too_large = runs.start("too-large", "cache3", batch_size=TOO_MANY_ROWS, max_steps=4) if this_gpu() else None
    killed = {kind: kill(runs, f"{kind}killed", others.pop(f"{kind}killed")) for kind in kinds}
    others |= {f"{kind}killed": runs.start(f"{kind}killed", f"{kind}cache", **keys) for kind, keys in kinds.items()}
    for name, process in others.items():
        if process.wait() != 0:
            report.row(f"train, {name}", f"exit code {process.returncode}", tail(runs.output(name)), False)
    if too_large is not None:
        out_of_memory(report, runs, too_large)
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


def facts(report: Report, runs: Runs, name: str) -> None:
    """What a run says of itself."""
    metrics = [m for m in metrics_of(runs.root / name) if "tokens/s" in m][runs.steps // 4 :]
    speed, wait = (float(np.median([m[key] for m in metrics])) for key in ("tokens/s", "input_wait"))
    losses = [m["train/loss"] for m in metrics_of(runs.root / name) if "train/loss" in m]
    report.row(
        f"its log, {name}",
        f"loss {losses[0]:.3f} to {losses[-1]:.3f}, {speed:,.0f} tokens/s at log_interval 1 beside other runs",
        f"input_wait {wait:.1%}",
        losses[-1] < losses[0],
    )


# ---- sampling, stopping ---------------------------------------------------------------------------------------------


def sample_while_training(report: Report, runs: Runs) -> None:
    """Both with jax's own memory settings."""
    steps, save_interval = (20_000, 50) if runs.dry_run else (1_000_000, 400)
    training = runs.start(
        "long", "cache", preallocate=True, max_steps=steps, save_interval=save_interval, samples_interval=steps,
        eval_interval=steps, log_interval=10,
    )  # fmt: skip
    if not runs.wait_for("long", training, 60):
        training.kill()
        report.row("train with jax's own memory settings", "no step 60", tail(runs.output("long")), False)
        return
    while not list((runs.root / "long" / "checkpoints").glob("[0-9]*")):
        time.sleep(0.1)
    text, prompt = runs.root / "sample.txt", "--prompt=春天的一个早晨"
    flags = [f"--model_path={runs.root / 'long'}", prompt, "--greedy", "--max_new_tokens=40"]
    sampling = command(text, "mateconv_jax.sample", *flags, preallocate=True)
    expect_exit(report, "sample while the run trains", sampling, text, 0, timeout=60)
    training.send_signal(signal.SIGTERM)
    expect_exit(report, "SIGTERM: a checkpoint, then exit code 75", training, runs.output("long"), 75, timeout=60)


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
    return " / ".join(path.read_text(errors="replace").strip().splitlines()[-lines:])[-3000:]


TOO_MANY_ROWS = 4096  # 300 GB


# ---- memory ---------------------------------------------------------------------------------------------------------

NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}


def this_gpu() -> str | None:
    """The name that `plan --gpu` has for this machine's card."""
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        name = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None
    return next((key for key, gpu in target.GPUS.items() if gpu.device_kind == name), None)


def plan_flags(runs: Runs, **training) -> list[str]:
    keys = runs.keys | {f"training.{key}": value for key, value in training.items()}
    gpu = this_gpu() or "this"
    quick = ["--quick"] if gpu == "this" or training else []
    return [f"--gpu={gpu}", *quick, "--config=configs/base.py", *(f"--config.{key}={value}" for key, value in keys.items())]


def memory(report: Report, runs: Runs, planning: subprocess.Popen) -> None:
    plan = read_plan(report, planning, runs.root / "plan.json")
    if plan is None:
        return
    planned = plan["training"]["memory"]["peak"] / 1e9
    used = max(m.get("memory_gb", 0) for m in metrics_of(runs.root / "first"))
    if this_gpu() is None:
        report.row("memory beside plan", f"{used:.2f} GB, {planned:.2f} GB planned", "left out: no figures of this device")
        return
    report.row(
        "device memory at most, with evaluation and both checkpoints", f"{used:.2f} GB",
        f"the plan's step {planned:.2f} GB, and a copy of the state {copy_of(plan):.2f} GB", None,
    )  # fmt: skip
    rows = plan["largest_rows_per_device"]["none"]
    planning = command(
        root_plan := runs.root / "largest.json", "mateconv_jax.plan", *plan_flags(runs, batch_size=rows), "--json", **NO_GPU
    )
    largest = runs.start("largest", "cache", preallocate=True, batch_size=rows, max_steps=4, eval_interval=4, save_interval=4)
    expect_exit(
        report,
        f"train with the largest batch of plan, {rows} rows, saved as best and latest",
        largest,
        runs.output("largest"),
        0,
    )
    plan = read_plan(report, planning, root_plan)
    if plan is not None and (runs.root / "largest" / "metrics.jsonl").exists():
        planned = plan["training"]["memory"]["peak"] / 1e9
        used = max(m.get("memory_gb", 0) for m in metrics_of(runs.root / "largest"))
        off = used / planned - 1
        report.row(f"its memory, {rows} rows", f"{used:.2f} GB", f"plan {planned:.2f} GB: {off:+.1%}", abs(off) <= 0.1)


def out_of_memory(report: Report, runs: Runs, process: subprocess.Popen) -> None:
    expect_exit(report, f"{TOO_MANY_ROWS:,} rows do not fit: one line, exit code 2", process, runs.output("too-large"), 2)
    text = runs.output("too-large").read_text(errors="replace")
    report.row("… without a traceback", "traceback" if "Traceback" in text else "one line", "", "Traceback" not in text)


def copy_of(plan: dict) -> float:
    parts = plan["training"]["memory"]["parts"]
    return sum(parts[name] for name in ("parameters", "EMA", "optimizer")) / 1e9


def read_plan(report: Report, planning: subprocess.Popen, path: Path) -> dict | None:
    planning.wait(120)
    found = re.findall(r"^\{.*\}$", path.read_text(), re.MULTILINE)
    if planning.returncode != 0 or not found:
        report.row("plan", f"exit code {planning.returncode}", tail(path), False)
        return None
    return json.loads(found[-1])


if __name__ == "__main__":
    main(sizes.parse_args(__doc__))
