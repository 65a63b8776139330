"""How long each command takes to start:  python -m benchmarks.startup [--repeat 3]

Imports: `python -m mateconv_jax.NAME --help`, and separately all modules that the command imports after checking its command
line. First step: `train --config=CONFIG` for one step of 8 rows, with evaluation and checkpoint. First text: `sample` from that
run. The last two run with an empty compilation cache and again with the cache filled. The best of --repeat counts. Prints two
tables and then one JSON line. Needs the quickstart's data/demo, or --config and --data.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

DEFERRED_IMPORTS = {  # what a command imports after checking its command line
    "train": "mateconv_jax.training.loop",
    "sample": "mateconv_jax.inference.text_generator",
    "evaluate": "mateconv_jax.evaluation.held_out",
    "convert": "mateconv_jax.interop.formats",
    "plan": "mateconv_jax.planning.plan",
    "prepare": "mateconv_jax.data.build.statistics_plot",
    "tokenizer": "mateconv_jax.data.tokenizer.report",
    "report": "mateconv_jax.reporting.report_page",
}


def main(args):
    console = Console()
    python = seconds(["-c", ""], args.repeat)
    report = {"python_s": python, "help_s": {}, "imports_s": {}}
    table = Table("command", "--help", "all imports", title=f"seconds, of which Python itself takes {python:.2f}")
    for name, module in DEFERRED_IMPORTS.items():
        report["help_s"][name] = seconds(["-m", f"mateconv_jax.{name}", "--help"], args.repeat)
        report["imports_s"][name] = seconds(["-c", f"import mateconv_jax.{name}, {module}"], args.repeat)
        table.add_row(name, *(f"{report[key][name]:.2f}" for key in ("help_s", "imports_s")))
    console.print(table)

    starts = {"train": [], "sample": []}  # (empty cache, warm cache), each turn
    for _ in range(args.repeat):
        with tempfile.TemporaryDirectory() as folder:
            turns = [first_step_and_text(args.config, args.data, Path(folder), str(i)) for i in range(2)]
        for name in starts:
            starts[name].append([turn[name] for turn in turns])
    table = Table("", "empty compilation cache", "warm", title=f"{args.config}: seconds from start to end of the command")
    for name, what in (("train", "train, one step"), ("sample", "sample, one token")):
        report[f"{name}_s"] = [round(min(times), 2) for times in zip(*starts[name], strict=True)]
        table.add_row(what, *(f"{time:.1f}" for time in report[f"{name}_s"]))
    console.print(table)
    print(json.dumps(report))


def seconds(arguments: list[str], repeat: int = 1, env=None) -> float:
    """Best run time of a Python process."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], env=env, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return round(min(times), 3)


def first_step_and_text(config: str, data: str, folder: Path, name: str) -> dict[str, float]:
    """Seconds of training for one step and of sampling from that run; the compilation cache is in `folder`."""
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    flags = {"max_steps": 1, "batch_size": 8, "eval_iters": 1, "out_dir": folder / name}
    train = ["mateconv_jax.train", f"--config={config}", f"--config.data.train_data_path={data}"]
    train += [f"--config.training.{key}={value}" for key, value in flags.items()]
    sample = ["mateconv_jax.sample", f"--model_path={folder / name}", "--prompt=中国", "--max_new_tokens=1"]
    return {"train": seconds(["-m", *train], env=env), "sample": seconds(["-m", *sample], env=env)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    parser.add_argument("--config", default="configs/demo.py")
    parser.add_argument("--data", default="data/demo", metavar="DATASET", help="a dataset folder for the configuration")
    parser.add_argument("--repeat", type=int, default=3)
    main(parser.parse_args())
