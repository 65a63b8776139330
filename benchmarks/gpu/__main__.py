"""Check every claim about GPUs on this machine's GPU:  bash benchmarks/gpu.sh [--out DIR] [--part NAME …] [--record] …

Parts, most important first: correct (numerics against float32), resume (repeated, killed and resumed runs), live (sampling
during training, SIGTERM, memory), training and decoding (speed against PyTorch on the same card), host, variants. Each part is
a process with a time limit; a failing part does not stop the others. Results are written to DIR/gpu.json and DIR/gpu.md after
every part, and the JSON is printed at the end. The exit code is 1 if a check failed. Needs PyTorch and transformers in addition
to requirements.txt, and no network.

--record adds the times of training and decoding to the measurements that `plan` expects times from (mateconv_jax/planning/
measurements.json, or FILE), which takes some minutes of compiling. `python -m benchmarks.gpu.record DIR/gpu.json` does the same
later, on any machine.

--dry_run uses tiny sizes and also runs on a CPU: it shows that every part works, but measures nothing.
"""

import argparse
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu import report

# Time limits in seconds, for an H100.
PARTS = {"correct": 220, "resume": 160, "live": 150, "training": 180, "decoding": 170, "host": 40, "variants": 180}
UNTIMED = ("correct", "resume")
COMPILED_AHEAD = ("training", "decoding", "variants")
DATA = Path("data/gpu_demo")
RECORD = (sys.executable, "-m", "benchmarks.gpu.record")
MEASUREMENTS = "mateconv_jax/planning/measurements.json"


def main(args) -> int:
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    results = {"card": card(), "versions": versions(), "started": time.strftime("%Y-%m-%d %H:%M:%S"), "parts": {}}
    print(f"{results['card']}; {', '.join(f'{k} {v}' for k, v in results['versions'].items())}", flush=True)
    data = out / "data" if args.dry_run else DATA
    prepare_data(data, args.dry_run)
    # While the untimed parts run, the timed parts' programs are compiled into the caches.
    ahead = [name for name in COMPILED_AHEAD if name in args.part and args.part[0] in UNTIMED and not args.dry_run]
    ahead = [start_part(name, out, data, args, compile_only=True) for name in ahead]
    for name in args.part:
        print(f"\n==== {name}", flush=True)
        (out / f"{name}.jsonl").unlink(missing_ok=True)
        begin = time.perf_counter()
        for process in ahead if name not in UNTIMED else []:
            kill(process)
        ended = run_part(name, out, data, args)
        seconds = time.perf_counter() - begin
        results["parts"][name] = {"seconds": round(seconds, 1), "ended": ended, "rows": report.read(out, name)}
        print(f"==== {name}: {ended}, {seconds:.0f} s", flush=True)
        (out / "gpu.json").write_text(json.dumps(results))
        header = f"{results['card']}, {results['started']}; {', '.join(f'{k} {v}' for k, v in results['versions'].items())}\n\n"
        (out / "gpu.md").write_text(header + report.markdown(results["parts"]))
    print("\n" + (out / "gpu.md").read_text())
    print(json.dumps(results))
    recorded = 0
    if args.record:
        print("\n==== record", flush=True)
        recorded = subprocess.run([*RECORD, str(out / "gpu.json"), "--to", args.record]).returncode
    failed = [
        part for part in results["parts"].values() if part["ended"] != "done" or any(r["ok"] is False for r in part["rows"])
    ]
    return 1 if failed or recorded else 0


def run_part(name: str, out: Path, data: Path, args) -> str:
    """Run a part to its end: "done", or what went wrong. All processes it started are killed with it."""
    process = start_part(name, out, data, args)
    try:
        code = process.wait(timeout=args.limit or (600 if args.dry_run else PARTS[name]))
        return "done" if code == 0 else f"failed with exit code {code}"
    except subprocess.TimeoutExpired:
        return "out of time"
    finally:
        kill(process)


def start_part(name: str, out: Path, data: Path, args, compile_only: bool = False) -> subprocess.Popen:
    command = [sys.executable, "-m", f"benchmarks.gpu.{name}", "--out", str(out), "--data", str(data)]
    # Several processes share the card, so none may preallocate memory.
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONUNBUFFERED": "1"}
    if args.dry_run:  # tiny programs take longer to compile than to run
        environment["XLA_FLAGS"] = environment.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
    command += ["--case", *args.case] if name == "training" and args.case else []
    command += ["--dry_run"] * args.dry_run + ["--compile_only"] * compile_only
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} if compile_only else {}
    command = ["nice", "-n", "15", *command] if compile_only else command
    return subprocess.Popen(command, env=environment, start_new_session=True, **quiet)


def kill(process: subprocess.Popen) -> None:
    """Kill the process and everything it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def prepare_data(folder: Path, dry_run: bool) -> None:
    """Prepare the demo corpus once, with the base configuration's row length: 1,746 rows of 512 tokens."""
    if (folder / "metadata.json").exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    text = folder.with_suffix(".jsonl")
    shape = ["--vocab_size", "300", "--seq_len", "64"] if dry_run else ["--vocab_size", "2048", "--seq_len", "512"]
    documents = ["--documents", "600"] if dry_run else []
    for command in (
        ["mateconv_jax.data.demo", "--output", str(text), *documents],
        ["mateconv_jax.prepare", "--input", str(text), "--output", str(folder), "--train_tokenizer", *shape],
    ):
        subprocess.run([sys.executable, "-m", *command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def card() -> str:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return f"no NVIDIA GPU, {os.cpu_count()} CPU cores"


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in ("jax", "jaxlib", "flax", "orbax-checkpoint", "torch", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="bash benchmarks/gpu.sh", description=__doc__)
    parser.add_argument("--out", default="runs/gpu", metavar="DIR")
    parser.add_argument("--part", nargs="+", choices=tuple(PARTS), default=list(PARTS), metavar="NAME", help=", ".join(PARTS))
    parser.add_argument("--case", nargs="+", metavar="NAME", help="beginnings of the names of training's sizes (base, 118, …)")
    parser.add_argument("--limit", type=float, metavar="S", help="seconds a part may take, instead of its own limit")
    parser.add_argument("--record", nargs="?", const=MEASUREMENTS, metavar="FILE", help=f"default: {MEASUREMENTS}")
    parser.add_argument("--dry_run", action="store_true")
    arguments = parser.parse_args()
    if arguments.record and arguments.dry_run:
        parser.error("--record: a dry run measures nothing")
    sys.exit(main(arguments))
