"""A run folder holds all that a model needs: it can be moved and sampled from.

config.json          the resolved configuration
tokenizer/           as transformers reads it
data_stats.json      the dataset's stats.json
checkpoints/STEP/    Orbax, one item `state`: step, params, ema_params, opt_state
metrics.jsonl, train.log, tensorboard/
"""

import json
import os
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from mateconv_jax import config as config_lib, files
from mateconv_jax.errors import UserError


def write_config(folder: Path, config: ConfigDict) -> None:
    files.write_text(folder / "config.json", json.dumps(config.to_dict(), indent=2, ensure_ascii=False) + "\n")


def read_config(folder: str | Path, key: str) -> ConfigDict:
    """The resolved configuration of a run. `key` names the flag that gave the folder, for the error.

    Raises:
      UserError: no run there, or a broken or foreign config.json.
    """
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{key}: no run at {str(folder)!r} (expected a folder with config.json, made by training)") from error
    except ValueError as error:
        raise UserError(f"{key}: {path} is not JSON ({error})") from error
    return config_lib.resolve(config_lib.from_dict(values, str(path)))


def keep_data_statistics(folder: Path, train_data_path: str) -> None:
    """A copy of the dataset's stats.json, so that the run can say what it learned from when it is elsewhere."""
    if (path := Path(train_data_path) / "stats.json").is_file():
        files.write_text(folder / "data_stats.json", path.read_text(encoding="utf-8"))


def read_data_statistics(folder: Path) -> dict | None:
    """What `data.statistics.summary` found out about the training data; None where it is not known, as of a .bin file."""
    path = folder / "data_stats.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def latest_step(folder: str | Path) -> int | None:
    """The newest finished checkpoint; Orbax names unfinished ones otherwise."""
    checkpoints = Path(folder) / "checkpoints"
    steps = [int(path.name) for path in checkpoints.glob("*") if path.name.isdigit()] if checkpoints.is_dir() else []
    return max(steps, default=None)


def finished_step(folder: str | Path, key: str) -> int:
    """`latest_step`. Raises UserError where there is none."""
    step = latest_step(folder)
    if step is None:
        raise UserError(f"{key}: no finished checkpoint in {str(folder)!r} (train a little longer)")
    return step


def load_params(folder: str | Path, step: int, abstract_params, use_ema: bool):
    """Only the parameters of a checkpoint; optimizer state is not read.

    Args:
      abstract_params: the tree to fill, ShapeDtypeStructs, with shardings where the arrays shall be spread.
      use_ema: EMA weights, which must be there, or the raw ones.

    Returns:
      Parameters like `abstract_params`.
    """
    path = Path(os.path.abspath(folder)) / "checkpoints" / str(step) / "state"
    item = {"ema_params" if use_ema else "params": abstract_params}
    restore_args = jax.tree.map(_restore_arg, item)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(path, ocp.args.PyTreeRestore(item, partial_restore=True, restore_args=restore_args))
    return restored["ema_params" if use_ema else "params"]


def _restore_arg(leaf: jax.ShapeDtypeStruct) -> ocp.ArrayRestoreArgs:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)
