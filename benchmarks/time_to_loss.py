"""Training time to reach a loss, compared with PyTorch:  python -m benchmarks.time_to_loss [--loss 1.0]

configs/demo.py on the quickstart's data/demo, with the same weights, batches and schedule for ours and PyTorch's compiled model
(see benchmarks/train.py). They take turns of 25 steps until the mean loss of their last 10 steps is at most --loss. Start-up
and compilation are reported separately. Prints a table and then one JSON line. Needs requirements-dev.txt (PyTorch) and
data/demo.
"""

import argparse
import itertools
import json
import sys
import time

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.train import Side
from configs import demo
from mateconv_jax import config as config_lib
from mateconv_jax.data import loader
from mateconv_jax.data.dataset import open_dataset

TURN, OVER = 25, 10  # steps


def main(args):
    config = config_lib.resolve(demo.get_config())
    training = config.training
    rows = open_dataset(config.data.train_data_path, "data.train_data_path", config.data.seq_len).rows("train")
    read = loader.training_batches(rows, training.batch_size, training.seed, config.data.shuffle, 0, num_workers=1)
    batches = list(itertools.islice(read, training.max_steps))
    report = {name: {"seconds": 0.0, "losses": []} for name in ("ours", "PyTorch, compile")}
    sides = {}
    for name, r in report.items():  # the first step includes compilation
        start = time.perf_counter()
        sides[name] = Side(name, config, batches[0], training.max_steps)
        r["losses"].append(sides[name].step(batches[0])[-1])
        r["start_and_first_step_s"] = round(time.perf_counter() - start, 1)

    def done(r: dict) -> bool:
        return np.mean(r["losses"][-OVER:]) <= args.loss or len(r["losses"]) == len(batches)

    while not all(map(done, report.values())):
        for name, r in report.items():
            for _ in range(TURN):
                if done(r):
                    break
                seconds, _, loss = sides[name].step(batches[len(r["losses"])])
                r["seconds"] += seconds
                r["losses"].append(loss)
            print(
                f"{name}: step {len(r['losses'])}, loss {r['losses'][-1]:.3f}, {r['seconds']:.1f} s",
                file=sys.stderr,
                flush=True,
            )

    table = Table(
        "", "steps", "seconds", "start and compilation, s", "loss", title=f"{OVER} steps with a mean loss of {args.loss}"
    )
    for name, r in report.items():
        losses = r.pop("losses")
        r |= {"steps": len(losses), "seconds": round(r["seconds"], 1), "loss": round(float(np.mean(losses[-OVER:])), 3)}
        table.add_row(name, f"{r['steps']}", f"{r['seconds']}", f"{r['start_and_first_step_s']}", f"{r['loss']}")
    Console().print(table)
    print(json.dumps(report))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.time_to_loss", description=__doc__)
    parser.add_argument("--loss", type=float, default=1.0)
    main(parser.parse_args())
