"""Tiny runs, and what lies in their folders."""

import copy
import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from mateconv_jax import config as config_lib
from mateconv_jax.training import loop

ROOT = Path(__file__).parents[2]


def training(**changes):
    """The default training section with high learning rates and `changes`."""
    config = config_lib.default_config()
    config.training.update(dict(learning_rate=1e-2, min_lr=1e-3) | changes)
    return config.training


def metrics_of(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def losses_of(folder):
    return {(m["step"], key): value for m in metrics_of(folder) for key, value in m.items() if "loss" in key}


def train(config, out_dir=None, **changes):
    config = copy.deepcopy(config)
    config.training.update(({"out_dir": str(out_dir)} if out_dir else {}) | changes)
    return loop.train(config_lib.resolve(config))


def saved(folder, step):
    """Everything in a checkpoint, as it lies on the disk."""
    path = Path(folder).absolute() / "checkpoints" / str(step)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        state = checkpointer.restore(path / "state")
    progress = json.loads((path / "progress" / "metadata").read_text())
    return state, progress


def assert_equal_checkpoints(a, b, step):
    (state_a, progress_a), (state_b, progress_b) = saved(a, step), saved(b, step)
    assert jax.tree.structure(state_a) == jax.tree.structure(state_b)
    jax.tree.map(np.testing.assert_array_equal, state_a, state_b)
    assert progress_a == progress_b


def steps_in(folder):
    return sorted(int(path.name) for path in (Path(folder) / "checkpoints").iterdir() if path.name.isdigit())


def flags_of(config, out_dir):
    """The command line that trains as `config` does."""
    values = {f"{section}.{key}": value for section in config if section != "wandb" for key, value in config[section].items()}
    values["training.out_dir"] = out_dir
    overrides = [f"--config.{key}={value}" for key, value in values.items() if value is not None]
    return [f"--config={ROOT / 'configs' / 'base.py'}", *overrides]
