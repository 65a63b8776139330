"""Asynchronous checkpoints are byte-identical to the state:  python -m benchmarks.gpu.saves --out DIR

Trains like the loop and hands each of 50 consecutive states to `Checkpoints.save`; the next step overwrites each at once. Every
checkpoint is compared with a copy that a separate program made on the device.
"""

import argparse
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.report import Report
from benchmarks.gpu.sizes import Case
from mateconv_jax.planning import programs
from mateconv_jax.runtime import sharding
from mateconv_jax.training import setup
from mateconv_jax.training.checkpoints import Checkpoints, Progress
from tests.training.runs import saved


def main(args) -> None:
    steps = 5 if args.dry_run else 50
    case = Case("", dict(dim=256, n_layers=4, n_heads=8, n_kv_heads=8), 8, 512)  # 5 M parameters: 4 GB of checkpoints
    config = case.config(args.dry_run, use_ema=True)
    run = programs.training_step(config, setup.model_config(config), None, steps)
    state, copies = run.fresh_state(), {}
    copy = jax.jit(lambda state: jax.tree.map(jnp.copy, state))
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        with Checkpoints(Path(folder), steps, None, False) as checkpoints:
            for number in range(1, steps + 1):
                batch = sharding.to_devices(programs.random_batch(run, seed=number), run.mesh, rows_axis=1)
                state, _ = run.train_step(state, batch)
                on_device = copy(state)
                checkpoints.save(number, state, Progress())
                copies[number] = on_device
                if number > 1:  # the previous one, because reading this one would wait for its step
                    copies[number - 1] = jax.device_get(copies[number - 1])
        equal = []
        for number, expected in copies.items():
            found, expected = map(sorted_leaves, (saved(folder, number)[0], jax.device_get(expected)))
            equal.append(all(map(np.array_equal, found, expected)))
    megabytes = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6
    report = Report(args.out, "resume")
    report.row(
        f"asynchronous saves at {steps} consecutive steps, {megabytes:.0f} MB each",
        f"{sum(equal)} of {steps} byte-identical",
        "a copy on the device before the next step",
        all(equal),
    )


def sorted_leaves(tree) -> list[np.ndarray]:
    """The leaves in an order independent of the tree's type, because Orbax restores dictionaries."""
    return sorted(map(np.asarray, jax.tree.leaves(tree)), key=lambda x: (x.shape, x.dtype.str, x.tobytes()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--dry_run", action="store_true")
    main(parser.parse_args())
