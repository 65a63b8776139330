"""A run folder holds all that a model needs: it can be moved and sampled from.

config.json          the resolved configuration
tokenizer/           as transformers reads it
checkpoints/STEP/    Orbax, one item `state`: step, params, ema_params, opt_state
metrics.jsonl, train.log, tensorboard/
"""

import json
import os
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from etils import epath
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


def latest_step(folder: str | Path) -> int | None:
    """The newest finished checkpoint; Orbax names unfinished ones otherwise."""
    checkpoints = Path(folder) / "checkpoints"
    steps = [int(path.name) for path in checkpoints.glob("*") if path.name.isdigit()] if checkpoints.is_dir() else []
    return max(steps, default=None)


def load_params(folder: str | Path, abstract_params, use_ema: bool | None, key: str):
    """Only the parameters of the newest checkpoint; optimizer state is not read.

    Args:
      folder: a run folder.
      abstract_params: the tree to fill, ShapeDtypeStructs, with shardings where the arrays shall be spread.
      use_ema: EMA weights or the raw ones; None takes EMA when the run has it.

    Returns:
      Parameters like `abstract_params`.

    Raises:
      UserError: no finished checkpoint, no EMA weights where they are asked for.
    """
    step = latest_step(folder)
    if step is None:
        raise UserError(f"{key}: no finished checkpoint in {str(folder)!r} (train a little longer)")
    path = Path(os.path.abspath(folder)) / "checkpoints" / str(step) / "state"
    handler = ocp.PyTreeCheckpointHandler()
    has_ema = bool(handler.metadata(epath.Path(path)).tree.get("ema_params"))
    if use_ema and not has_ema:
        raise UserError(f"--use_ema: the run {str(folder)!r} has no EMA weights (it was trained with training.use_ema=False)")
    name = "ema_params" if (has_ema if use_ema is None else use_ema) else "params"
    item = {name: abstract_params}
    restore_args = jax.tree.map(_restore_arg, item)
    with ocp.Checkpointer(handler) as checkpointer:
        restored = checkpointer.restore(path, ocp.args.PyTreeRestore(item, partial_restore=True, restore_args=restore_args))
    return restored[name]


def _restore_arg(leaf: jax.ShapeDtypeStruct) -> ocp.ArrayRestoreArgs:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)
