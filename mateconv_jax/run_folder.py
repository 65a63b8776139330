"""Run folders. They are self-contained: one can be moved and then sampled from. Only this module knows their layout.

config.json          the resolved configuration
tokenizer/           in transformers' format
data_stats.json      a copy of the dataset's stats.json
checkpoints/STEP/    Orbax: `state`, a TrainState, and `progress`, JSON; for a converted model, only parameters
best/STEP/           the same, at the lowest validation loss, or the best training.best_metric
unreadable/STEP/     checkpoints that could not be read
reference/           of preferences: log-probabilities under the weights that the run starts from
metrics.jsonl, train.log, tensorboard/
generation_config.json   end tokens, of a converted model that has several
"""

import dataclasses
import json
import os
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from mateconv_jax import config as config_lib, disk, files
from mateconv_jax.errors import UserError


def write_config(folder: Path, config: ConfigDict) -> None:
    files.write_text(folder / "config.json", json.dumps(config.to_dict(), indent=2, ensure_ascii=False) + "\n")


def check_config_is_ours(folder: Path, key: str) -> None:
    """Raises UserError, with `key`, if the folder's config.json is somebody else's, such as a Hugging Face model's."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        return
    except ValueError:
        values = None
    if not isinstance(values, dict) or not all(isinstance(values.get(name), dict) for name in ("model", "data", "training")):
        raise UserError(f"{key}: {str(path)!r} is not a run's and would be replaced (choose another folder)")


def read_config(folder: str | Path, key: str) -> ConfigDict:
    """The resolved configuration of a run.

    Args:
      key: the flag that `folder` came from, for error messages.

    Raises:
      UserError: no run at `folder`, or an invalid config.json.
    """
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{key}: no run at {str(folder)!r} (expected a run folder, which has a config.json)") from error
    except ValueError as error:
        raise UserError(f"{key}: {path} is not valid JSON ({error})") from error
    return config_lib.resolve(config_lib.from_dict(values, str(path)))


def keep_data_statistics(folder: Path, train_data_path: str) -> None:
    """Copy the dataset's stats.json, if there is one, so that the run describes its data wherever it is moved."""
    if (path := Path(train_data_path) / "stats.json").is_file():
        files.write_text(folder / "data_stats.json", path.read_text(encoding="utf-8"))


def read_data_statistics(folder: Path) -> dict | None:
    """The training data's statistics, as in `data.statistics.summary`; None if unknown, as for a .bin file."""
    path = folder / "data_stats.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


# ---- checkpoints --------------------------------------------------------------------------------------------------


def checkpoints(folder: str | Path) -> Path:
    """The folder of a run's newest checkpoints, one subfolder per step."""
    return Path(os.path.abspath(folder)) / "checkpoints"


def best(folder: str | Path) -> Path:
    """The folder of its best checkpoint, by training.best_metric."""
    return Path(os.path.abspath(folder)) / "best"


def rollouts(folder: str | Path) -> Path:
    """The folder of answers that several steps learn from, see training/kept_rollouts.py."""
    return Path(folder) / "rollouts"


def unreadable(folder: str | Path) -> Path:
    """The folder that unreadable checkpoints are moved to."""
    return Path(os.path.abspath(folder)) / "unreadable"


def reference(folder: str | Path) -> Path:
    """The folder of the reference's log-probabilities, see training/reference.py."""
    return Path(os.path.abspath(folder)) / "reference"


def latest_step(folder: str | Path) -> int | None:
    """The step of a run's newest finished checkpoint; None if there is none."""
    return _latest_in(checkpoints(folder))


def _latest_in(folder: Path) -> int | None:
    # Orbax gives unfinished checkpoints non-numeric names.
    steps = [int(path.name) for path in folder.glob("*") if path.name.isdigit()] if folder.is_dir() else []
    return max(steps, default=None)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint and its run.

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
        """False if it holds only weights, as a converted one does."""
        return (self.path / "progress").is_dir()


def run_of(path: str | Path) -> Path | None:
    """RUN for RUN, RUN/best, RUN/best/STEP, RUN/checkpoints and RUN/checkpoints/STEP; None for any other path."""
    path = Path(os.path.abspath(path))
    candidates = [path]
    if path.name.isdigit():
        path = path.parent
    if path.name in ("best", "checkpoints"):
        candidates.append(path.parent)
    return next((folder for folder in candidates if (folder / "config.json").is_file()), None)


def find_checkpoint(path: str | Path, key: str) -> Checkpoint:
    """The checkpoint a path refers to: the newest for RUN and RUN/checkpoints, the best for RUN/best, and …/STEP itself.

    Args:
      key: the flag or configuration key that `path` came from, for error messages.

    Raises:
      UserError: no run or no finished checkpoint at `path`.
    """
    run = run_of(path)
    if run is None:
        raise UserError(f"{key}: no run at {str(path)!r} (expected a run folder, which has a config.json)")
    folder = Path(os.path.abspath(path))
    folder = checkpoints(run) if folder == run else folder
    if folder.name.isdigit():
        if folder.is_dir():
            return Checkpoint(run, folder)
        available = ", ".join(sorted((other.name for other in folder.parent.glob("*") if other.name.isdigit()), key=int))
        raise UserError(f"{key}: no checkpoint at {str(path)!r} (available: {available or 'none'})")
    step = _latest_in(folder)
    if step is None:
        raise UserError(f"{key}: no finished checkpoint in {str(path)!r} (train a little longer)")
    return Checkpoint(run, folder / str(step))


def load_params(checkpoint: Path, abstract_params, use_ema: bool):
    """Read only the parameters of a checkpoint, not the optimizer state.

    Args:
      checkpoint: its folder.
      abstract_params: ShapeDtypeStructs, with a sharding where an array is to be sharded.
      use_ema: read the EMA weights, which must exist, instead of the raw ones.

    Returns:
      Parameters with the tree, dtypes and shardings of `abstract_params`.
    """
    item = {"ema_params" if use_ema else "params": abstract_params}
    restore_args = jax.tree.map(_restore_arg, item)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        args = ocp.args.PyTreeRestore(item, partial_restore=True, restore_args=restore_args)
        restored = checkpointer.restore(checkpoint / "state", args=args)
    return restored["ema_params" if use_ema else "params"]


def read_progress(checkpoint: Path) -> dict:
    """What a checkpoint holds besides the state, without reading that; empty if it is damaged."""
    try:
        return json.loads((checkpoint / "progress" / "metadata").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def write_params(folder: Path, step: int, params) -> None:
    """Write a checkpoint with only weights: good for sampling, evaluation and training.init_from, but not for resuming."""
    disk.quiet_orbax()
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(state=ocp.StandardCheckpointHandler())) as checkpointer:
        args = ocp.args.Composite(state=ocp.args.StandardSave({"params": params}))
        checkpointer.save(checkpoints(folder) / str(step), args=args)


def _restore_arg(leaf: jax.ShapeDtypeStruct) -> ocp.ArrayRestoreArgs:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)
