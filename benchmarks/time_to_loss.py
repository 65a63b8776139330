"""Seconds of training until a loss is reached, beside PyTorch:  python -m benchmarks.time_to_loss [--loss 1.0]

configs/demo.py on the quickstart's data/demo: the same weights, batches and schedule for ours and for PyTorch's compiled model
(see benchmarks/train.py), which take turns of 25 steps until the mean loss of one's last 10 steps is as low. Compilation
counts apart. Prints a table and ends in one JSON line. Needs requirements-dev.txt (PyTorch) and data/demo.
"""

import argparse
import itertools
import json
import sys
import time

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.train import our_step, their_step
from configs import demo
from mateconv_jax import config as config_lib
from mateconv_jax.data import dataset, input_pipeline
from mateconv_jax.model.transformer import ModelConfig

TURN, OVER = 25, 10  # steps


def main(args):
    config = config_lib.resolve(demo.get_config())
    c, training = ModelConfig.make(config.model, "float32"), config.training
    rows = dataset.open_rows(config.data.train_data_path, "train", config.data.seq_len, "data.train_data_path")
    read = input_pipeline.training_batches(rows, training.batch_size, training.seed, config.data.shuffle, 0, num_workers=1)
    batches = list(itertools.islice(read, training.max_steps))
    makers = {
        "ours": lambda: our_step(config, c, batches[0], training.max_steps),
        "PyTorch, compile": lambda: their_step(config, c, True, training.max_steps),
    }
    report = {name: {"steps": 0, "seconds": 0.0, "losses": []} for name in makers}
    steps = {}
    for name, make in makers.items():  # the first step of each is compilation too
        start = time.perf_counter()
        steps[name] = make()
        report[name]["losses"].append(steps[name](batches[0]))
        report[name] |= {"compile_and_first_step_s": round(time.perf_counter() - start, 1), "steps": 1}

    def done(r: dict) -> bool:
        return np.mean(r["losses"][-OVER:]) <= args.loss or r["steps"] == len(batches)

    while not all(map(done, report.values())):
        for name, r in report.items():
            start = time.perf_counter()
            for _ in range(TURN):
                if done(r):
                    break
                r["losses"].append(steps[name](batches[r["steps"]]))
                r["steps"] += 1
            r["seconds"] += time.perf_counter() - start
            print(f"{name}: step {r['steps']}, loss {r['losses'][-1]:.3f}, {r['seconds']:.1f} s", file=sys.stderr, flush=True)

    table = Table("", "steps", "seconds", "compilation, s", "loss", title=f"{OVER} steps with a mean loss of {args.loss}")
    for name, r in report.items():
        r["seconds"], r["loss"] = round(r["seconds"], 1), round(float(np.mean(r.pop("losses")[-OVER:])), 3)
        table.add_row(name, f"{r['steps']}", f"{r['seconds']}", f"{r['compile_and_first_step_s']}", f"{r['loss']}")
    Console().print(table)
    print(json.dumps(report))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.time_to_loss", description=__doc__)
    parser.add_argument("--loss", type=float, default=1.0)
    main(parser.parse_args())
