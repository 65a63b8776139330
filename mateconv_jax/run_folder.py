"""A run folder holds all that a model needs: it can be moved and sampled from. This is the only place that knows its layout.

config.json          the resolved configuration
tokenizer/           as transformers reads it
data_stats.json      the dataset's stats.json
checkpoints/STEP/    Orbax: `state`, a TrainState, and `progress`, JSON; of a converted model parameters alone
best/STEP/           the same, of the lowest validation loss
unreadable/STEP/     checkpoints that could not be read
metrics.jsonl, train.log, tensorboard/
"""

import dataclasses
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


# ---- checkpoints --------------------------------------------------------------------------------------------------


def checkpoints(folder: str | Path) -> Path:
    """Where a run keeps its newest checkpoints, one folder a step."""
    return Path(os.path.abspath(folder)) / "checkpoints"


def best(folder: str | Path) -> Path:
    """Where it keeps the one with the lowest validation loss."""
    return Path(os.path.abspath(folder)) / "best"


def unreadable(folder: str | Path) -> Path:
    """Where checkpoints go that cannot be read."""
    return Path(os.path.abspath(folder)) / "unreadable"


def latest_step(folder: str | Path) -> int | None:
    """The newest finished checkpoint of a run."""
    return _latest_in(checkpoints(folder))


def _latest_in(folder: Path) -> int | None:
    # Orbax gives unfinished ones other names.
    steps = [int(path.name) for path in folder.glob("*") if path.name.isdigit()] if folder.is_dir() else []
    return max(steps, default=None)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint and the run that it is of.

    Attributes:
      run: the folder that holds config.json and the tokenizer.
      path: the checkpoint's own folder.
    """

    run: Path
    path: Path

    @property
    def step(self) -> int:
        return int(self.path.name)

    @property
    def can_be_resumed(self) -> bool:
        """False where it holds weights alone, as one that was converted does."""
        return (self.path / "progress").is_dir()


def run_of(path: str | Path) -> Path | None:
    """The run folder of RUN, RUN/best, RUN/best/STEP, RUN/checkpoints or RUN/checkpoints/STEP; None: it is none of these."""
    path = Path(os.path.abspath(path))
    candidates = [path]
    if path.name.isdigit():
        path = path.parent
    if path.name in ("best", "checkpoints"):
        candidates.append(path.parent)
    return next((folder for folder in candidates if (folder / "config.json").is_file()), None)


def find_checkpoint(path: str | Path, key: str) -> Checkpoint:
    """The checkpoint that a path means: RUN and RUN/checkpoints the newest, RUN/best the best one, …/STEP itself.

    Raises:
      UserError: no run, or no finished checkpoint there; `key` names the flag or configuration key that gave the path.
    """
    run = run_of(path)
    if run is None:
        raise UserError(f"{key}: no run at {str(path)!r} (expected a folder with config.json, made by training)")
    folder = Path(os.path.abspath(path))
    folder = checkpoints(run) if folder == run else folder
    if folder.name.isdigit():
        if folder.is_dir():
            return Checkpoint(run, folder)
        there = ", ".join(sorted((other.name for other in folder.parent.glob("*") if other.name.isdigit()), key=int))
        raise UserError(f"{key}: no checkpoint at {str(path)!r} (there are: {there or 'none'})")
    step = _latest_in(folder)
    if step is None:
        raise UserError(f"{key}: no finished checkpoint in {str(path)!r} (train a little longer)")
    return Checkpoint(run, folder / str(step))


def load_params(checkpoint: Path, abstract_params, use_ema: bool):
    """Only the parameters of a checkpoint; optimizer state is not read.

    Args:
      checkpoint: its folder.
      abstract_params: the tree to fill, ShapeDtypeStructs, with shardings where the arrays shall be spread.
      use_ema: EMA weights, which must be there, or the raw ones.

    Returns:
      Parameters like `abstract_params`.
    """
    item = {"ema_params" if use_ema else "params": abstract_params}
    restore_args = jax.tree.map(_restore_arg, item)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        args = ocp.args.PyTreeRestore(item, partial_restore=True, restore_args=restore_args)
        restored = checkpointer.restore(checkpoint / "state", args=args)
    return restored["ema_params" if use_ema else "params"]


def write_params(folder: Path, step: int, params) -> None:
    """A checkpoint of weights alone: it can be sampled from, evaluated and started from, but no training can be resumed."""
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(state=ocp.StandardCheckpointHandler())) as checkpointer:
        args = ocp.args.Composite(state=ocp.args.StandardSave({"params": params}))
        checkpointer.save(checkpoints(folder) / str(step), args=args)


def _restore_arg(leaf: jax.ShapeDtypeStruct) -> ocp.ArrayRestoreArgs:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)
