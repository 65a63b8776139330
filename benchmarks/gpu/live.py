"""Concurrent commands and device memory:  python -m benchmarks.gpu.live --out DIR --data DATASET

Sampling while a run trains, SIGTERM, memory compared with `plan`'s prediction, the largest batch that fits and one that does
not.
"""

import json
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import jax

from benchmarks.gpu import sizes
from benchmarks.gpu.commands import Runs, command, expect_exit, facts, tail
from benchmarks.gpu.report import Report
from mateconv_jax.planning import target
from tests.training.runs import metrics_of

jax.config.update("jax_platforms", "cpu")  # the GPU is for the commands


def main(args) -> None:
    report = Report(args.out, "live")
    with tempfile.TemporaryDirectory(dir=args.out, prefix="runs-") as folder:
        runs = Runs(Path(folder), args)
        # `plan` without access to the card, as before renting one.
        planning = command(runs.root / "plan.json", "mateconv_jax.plan", *plan_flags(runs), "--json", **NO_GPU)
        sample_while_training(report, runs)
        memory(report, runs, planning)


# ---- sampling, stopping ---------------------------------------------------------------------------------------------


def sample_while_training(report: Report, runs: Runs) -> None:
    """Both with JAX's default memory settings."""
    steps, save_interval = (20_000, 50) if runs.dry_run else (1_000_000, 400)
    training = runs.start(
        "long", "cache", preallocate=True, max_steps=steps, save_interval=save_interval, samples_interval=steps,
        eval_interval=steps, log_interval=10,
    )  # fmt: skip
    if not runs.wait_for("long", training, 100 if runs.dry_run else 600):
        training.kill()
        report.row("train with JAX's default memory settings", "ended early", tail(runs.output("long")), False)
        return
    while not list((runs.root / "long" / "checkpoints").glob("[0-9]*")):
        time.sleep(0.1)
    facts(report, runs, "long", "alone, log_interval 10")
    text, prompt = runs.root / "sample.txt", "--prompt=春天的一个早晨"
    flags = [f"--model_path={runs.root / 'long'}", prompt, "--greedy", "--max_new_tokens=40"]
    sampling = command(text, "mateconv_jax.sample", *flags, preallocate=True)
    expect_exit(report, "sample while the run trains", sampling, text, 0, timeout=60)
    training.send_signal(signal.SIGTERM)
    expect_exit(report, "SIGTERM: a checkpoint, then exit code 75", training, runs.output("long"), 75, timeout=60)


TOO_MANY_ROWS = 4096  # 300 GB


# ---- memory ---------------------------------------------------------------------------------------------------------

NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}


def this_gpu() -> str | None:
    """`plan --gpu`'s name for this machine's card; None if there is none."""
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
    used = max(m.get("memory_gb", 0) for m in metrics_of(runs.root / "long"))
    if this_gpu() is None:
        report.row("memory against plan", f"{used:.2f} GB, {planned:.2f} GB planned", "skipped: no data sheet of this device")
        return
    report.row(
        "peak device memory, with checkpoints", f"{used:.2f} GB",
        f"planned step {planned:.2f} GB, plus a copy of the state {copy_of(plan):.2f} GB", None,
    )  # fmt: skip
    rows = plan["largest_rows_per_device"]["none"]
    planning = command(
        root_plan := runs.root / "largest.json", "mateconv_jax.plan", *plan_flags(runs, batch_size=rows), "--json", **NO_GPU
    )
    largest = runs.start("largest", "cache", preallocate=True, batch_size=rows, max_steps=4, eval_interval=4, save_interval=4)
    expect_exit(
        report,
        f"train with plan's largest batch, {rows} rows, saved as best and latest",
        largest,
        runs.output("largest"),
        0,
    )
    plan = read_plan(report, planning, root_plan)
    if plan is not None and (runs.root / "largest" / "metrics.jsonl").exists():
        planned = plan["training"]["memory"]["peak"] / 1e9
        used = max(m.get("memory_gb", 0) for m in metrics_of(runs.root / "largest"))
        off = used / planned - 1
        report.row(f"memory at {rows} rows", f"{used:.2f} GB", f"plan {planned:.2f} GB: {off:+.1%}", abs(off) <= 0.1)

    too_large = runs.start("too-large", "cache3", batch_size=TOO_MANY_ROWS, max_steps=4)
    out_of_memory(report, runs, too_large)


def out_of_memory(report: Report, runs: Runs, process: subprocess.Popen) -> None:
    expect_exit(report, f"{TOO_MANY_ROWS:,} rows do not fit: one line, exit code 2", process, runs.output("too-large"), 2)
    text = runs.output("too-large").read_text(errors="replace")
    report.row("… without a traceback", "traceback" if "Traceback" in text else "one line", "", "Traceback" not in text)


def copy_of(plan: dict) -> float:
    parts = plan["training"]["memory"]["parts"]
    return sum(parts[name] for name in ("parameters", "EMA", "optimizer")) / 1e9


def read_plan(report: Report, planning: subprocess.Popen, path: Path) -> dict | None:
    planning.wait(120)
    found = re.findall(r"^\{.*\}$", path.read_text(encoding="utf-8"), re.MULTILINE)
    if planning.returncode != 0 or not found:
        report.row("plan", f"exit code {planning.returncode}", tail(path), False)
        return None
    return json.loads(found[-1])


if __name__ == "__main__":
    main(sizes.parse_args(__doc__))
