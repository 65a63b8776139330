"""How long a checkpoint blocks the training loop:  python -m benchmarks.checkpoint [--repeat 10]

Saves the base model's training state (parameters, AdamW moments, EMA) alternately as `train` does and by calling Orbax from the
loop. Blocked: until the loop may overwrite the state. Written: until the checkpoint is complete. Medians of --repeat saves.
Prints a table and then one JSON line.
"""

import argparse
import functools
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from rich.console import Console
from rich.table import Table

from mateconv_jax import config as config_lib
from mateconv_jax.model.config import ModelConfig, ModelOptions
from mateconv_jax.runtime import sharding
from mateconv_jax.training import setup
from mateconv_jax.training.checkpoints import Checkpoints, Progress


def main(args):
    config = config_lib.resolve(config_lib.default_config())
    config.training.use_ema = True
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    c = ModelConfig.make(config_lib.options(ModelOptions, config.model), "float32")
    state = setup.build(config, c, mesh, 1).fresh_state()
    times = {"Checkpoints.save": [], "Orbax called by the loop": []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.repeat + 1):
            for name, save in (("Checkpoints.save", ours), ("Orbax called by the loop", orbax)):
                state = jax.block_until_ready(next_state(state))
                times[name].append(save(Path(folder) / name.split()[0] / str(turn), state))
    megabytes = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6
    table = Table(
        "", "blocked, ms", "written, ms", "share", title=f"{megabytes:.0f} MB in {len(jax.tree.leaves(state))} arrays"
    )
    report = {"megabytes": round(megabytes)}
    for name, turns in times.items():
        blocked, written = (1000 * statistics.median(column) for column in zip(*turns[1:], strict=True))
        table.add_row(name, f"{blocked:.0f}", f"{written:.0f}", f"{blocked / written:.1%}")
        report[name] = {"blocked_ms": round(blocked, 1), "written_ms": round(written)}
    Console().print(table)
    print(json.dumps(report))


@functools.partial(jax.jit, donate_argnums=0)
def next_state(state):
    """Reuse the old state's memory, as the training step does."""
    return jax.tree.map(lambda x: x + 1, state)


def ours(folder: Path, state) -> tuple[float, float]:
    """(seconds blocked, seconds until written)."""
    with Checkpoints(folder, keep_latest=1, keep_every=None, keep_best=False) as checkpoints:
        start = time.perf_counter()
        checkpoints.save(1, state, Progress())
        blocked = time.perf_counter() - start
    return blocked, time.perf_counter() - start


def orbax(folder: Path, state) -> tuple[float, float]:
    with ocp.CheckpointManager(folder) as manager:
        start = time.perf_counter()
        manager.save(1, args=ocp.args.StandardSave(state))
        blocked = time.perf_counter() - start
    return blocked, time.perf_counter() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__)
    parser.add_argument("--repeat", type=int, default=10)
    main(parser.parse_args())
