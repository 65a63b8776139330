"""Where a run starts: the newest checkpoint in its own folder > resume_from > init_from > scratch."""

import dataclasses
import errno
from pathlib import Path

import jax
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerFast

from mateconv_jax import config as config_lib, run_folder
from mateconv_jax.config_keys import KEYS, OnResume
from mateconv_jax.errors import UserError
from mateconv_jax.interop.formats import open_model
from mateconv_jax.interop.stored_model import StoredModel
from mateconv_jax.run_folder import Checkpoint
from mateconv_jax.training import checkpoints as checkpoints_lib, initial_weights
from mateconv_jax.training.checkpoints import Checkpoints, Progress
from mateconv_jax.training.train_state import TrainState

FROM_SCRATCH = "from scratch"


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a run starts.

    Attributes:
      key: the configuration key that decided: training.out_dir, training.resume_from or training.init_from; None: scratch.
      checkpoint: for the first two.
      model: for training.init_from.
    """

    key: str | None = None
    checkpoint: Checkpoint | None = None
    model: StoredModel | None = None


def find_origin(config: ConfigDict) -> Origin:
    """The first that exists: the newest checkpoint in out_dir > resume_from > init_from > scratch.

    Raises:
      UserError: what a key names cannot be used, or out_dir holds a run and training.resume forbids continuing it.
    """
    training = config.training
    if run_folder.latest_step(training.out_dir) is not None:
        if training.resume == "never":
            raise UserError(
                f"training.resume: never, but there is a run in {str(training.out_dir)!r} (expected auto, or another "
                "training.out_dir)"
            )
        key, path = "training.out_dir", training.out_dir
    elif training.resume_from:
        key, path = "training.resume_from", training.resume_from
    elif training.init_from:
        model = open_model(training.init_from, "training.init_from", n_heads=config.model.n_heads)
        return Origin("training.init_from", model=model)
    else:
        return Origin()
    checkpoint = run_folder.find_checkpoint(path, key)
    if not checkpoint.can_be_resumed:
        raise UserError(
            f"{key}: {str(checkpoint.run)!r} holds only weights, not a training state to resume (start a new run with "
            f"training.init_from={checkpoint.run})"
        )
    return Origin(key, checkpoint)


def with_model_of(origin: Origin, config: ConfigDict) -> tuple[ConfigDict, str | None]:
    """The config with the model of the weights that the run starts from: every key of `model` that decides what the weights
    mean, and max_seq_len, takes their value where it has its default. Others must agree, see check_compatible.

    Returns:
      The config, and a line for the log: which keys took another value; None: none did.
    """
    if origin.model is not None:
        theirs = origin.model.config
    elif origin.checkpoint and origin.key and (config.training.init_from or config.training.resume_from):
        theirs = run_folder.read_config(origin.checkpoint.run, origin.key)
    else:
        return config, None
    default, merged, taken = config_lib.resolve(config_lib.default_config()), config.copy_and_resolve_references(), []
    for key in KEYS:
        section, name = key.path.split(".")
        decides = section == "model" and (key.on_resume is OnResume.FIXED or name == "max_seq_len")
        if decides and config.model[name] == default.model[name] != theirs.model[name]:
            merged.model[name] = theirs.model[name]
            taken.append(f"{name} {theirs.model[name]}")
    return merged, f"the model's shape is that of the weights: {', '.join(taken)}" if taken else None


def check_compatible(origin: Origin, config: ConfigDict, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Compare `config` with that of the run that it resumes, or with the model whose weights it starts from.

    Returns:
      A line for the log for every changed key that makes the resumed run diverge.

    Raises:
      UserError: a key was changed that a resumed run must keep.
    """
    if origin.model is not None:
        return initial_weights.check(origin.model, config, tokenizer)
    if origin.checkpoint is None or origin.key is None:
        return []
    theirs = run_folder.read_config(origin.checkpoint.run, origin.key)
    differences = []
    for key in KEYS:
        section, name = key.path.split(".")
        was, now = theirs[section][name], config[section][name]
        if was == now or key.on_resume is OnResume.FREE:
            continue
        only_one_has_loss_scale = key.path == "training.dtype" and "float16" in (was, now)
        if key.on_resume is OnResume.FIXED or only_one_has_loss_scale:
            raise UserError(
                f"{key.path}: {now}, but the run in {str(origin.checkpoint.run)!r} has {was} (expected the same, or another "
                "training.out_dir)"
            )
        differences.append(f"the resumed run diverges: {key.path} was {was}, now {now}")
    return differences


def start(origin: Origin, checkpoints: Checkpoints, init, abstract: TrainState) -> tuple[TrainState, Progress, str]:
    """The state to train from, the run's progress so far, and where they come from, in words.

    Args:
      init: makes a fresh TrainState; called inside jit.
      abstract: its shapes with their shardings.

    Raises:
      UserError: the checkpoint cannot be read.
    """
    if origin.key == "training.out_dir":
        state, progress = checkpoints.restore(abstract)
        return state, progress, f"step {int(state.step):,}, resumed"
    if origin.checkpoint is not None:
        path = origin.checkpoint.path
        try:
            state, progress = checkpoints_lib.restore(path, abstract)
        except Exception as error:  # the libraries raise anything for a broken file
            raise UserError(
                f"training.resume_from: {str(path)!r} cannot be read ({' '.join(str(error).split())[:300]})"
            ) from error
        return state, progress, f"step {int(state.step):,} of {path}"
    state = jax.jit(init, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))()
    if origin.model is None:
        return state, Progress(), FROM_SCRATCH
    params = initial_weights.read(origin.model, abstract.params)
    ema_params = None if state.ema_params is None else jax.tree.map(lambda x: x.copy(), params)
    return state.replace(params=params, ema_params=ema_params), Progress(), f"the weights of {origin.model.path}"


def make_folder(folder: Path) -> None:
    """Create the run folder. Raises UserError where it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{jax.process_index()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        full = " (free some space)" if error.errno == errno.ENOSPC else ""
        raise UserError(f"training.out_dir: cannot write to {str(folder)!r}: {error.strerror}{full}") from error
