"""Losses of a run's first steps, as JSON:  python -m benchmarks.gpu.losses --out FILE --data DATASET --dtype bfloat16

Trains the base model on the batches that `train` would read, without writing a run folder.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import jax

from benchmarks.gpu.sizes import Case


def main(args) -> None:
    if args.platform:
        jax.config.update("jax_platforms", args.platform)
    from mateconv_jax import config as config_lib
    from mateconv_jax.runtime import sharding
    from mateconv_jax.training import objective as objective_lib, setup
    from mateconv_jax.training.batch_shape import START
    from mateconv_jax.training.open_data import DataOptions, open_data

    training = dict(dtype=args.dtype, max_steps=args.steps, warmup_steps=10)
    config = Case("", {}, args.rows, 512).config(args.dry_run, **training)
    config.data.train_data_path = args.data
    data = config.data
    objective = objective_lib.of(config)
    rows, _, tokenizer = open_data(
        config_lib.options(DataOptions, data), config.model.vocab_size, config.training.document_mask, objective.check
    )
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    run = setup.build(config, setup.model_config(config), mesh, args.steps, objective)
    batches = objective.source(run.c, mesh, rows, tokenizer, START, None)
    state, losses = run.fresh_state(), []
    if args.round_weights:
        rounded = jax.tree.map(lambda p: p.astype(args.round_weights).astype(p.dtype), state.params)
        state = dataclasses.replace(state, params=rounded)
    for step in range(args.steps):
        state, metrics = run.train_step(state, batches(step, state.params))
        losses.append(metrics["train/loss"])
    Path(args.out).write_text(json.dumps([float(loss) for loss in losses]), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.losses", description=__doc__)
    parser.add_argument("--out", required=True, metavar="FILE")
    parser.add_argument("--data", required=True, metavar="DATASET")
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--platform")
    parser.add_argument("--round_weights", metavar="DTYPE", help="round the initial weights to it once")
    parser.add_argument("--dry_run", action="store_true")
    main(parser.parse_args())
