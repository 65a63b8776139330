"""Where a run starts: its own run folder's newest checkpoint > resume_from > init_from > scratch."""

import dataclasses
import errno
from pathlib import Path

import jax
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerFast

from mateconv_jax import run_folder
from mateconv_jax.data.tokenizer.tokenizer import fingerprint
from mateconv_jax.errors import UserError
from mateconv_jax.interop.formats import open_model
from mateconv_jax.interop.stored_model import StoredModel
from mateconv_jax.run_folder import Checkpoint
from mateconv_jax.training import checkpoints as checkpoints_lib
from mateconv_jax.training.checkpoints import Checkpoints, Progress
from mateconv_jax.training.train_state import TrainState

FROM_SCRATCH = "from scratch"

# Keys that may change while a run goes on exactly as it would have.
_FREE = {
    "model.attention", "model.experts", "data.num_workers", "data.tokenizer_path", "data.val_data_path", "training.out_dir",
    "training.eval_interval", "training.eval_iters", "training.save_interval", "training.log_interval",
    "training.early_stopping", "training.patience", "training.keep_latest", "training.keep_every", "training.keep_best",
    "training.samples_interval", "training.sample_prompts", "training.max_bad_steps", "training.profile_step",
    "training.resume", "training.resume_from", "training.init_from", "training.compilation_cache_dir",
}  # fmt: skip
# Keys that decide which arrays there are: a checkpoint of another value cannot be used.
_SHAPES = {"training.use_ema", "training.optimizer_type"}


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a run starts.

    Attributes:
      key: the configuration key that decided: training.out_dir, training.resume_from or training.init_from; None: from scratch.
      checkpoint: of the first two.
      model: of training.init_from.
    """

    key: str | None = None
    checkpoint: Checkpoint | None = None
    model: StoredModel | None = None


def find_origin(config: ConfigDict) -> Origin:
    """The first that is there: the newest checkpoint in out_dir > resume_from > init_from > scratch.

    Raises:
      UserError: what a key names cannot be used, or there is a run and training.resume forbids to go on with it.
    """
    training = config.training
    if run_folder.latest_step(training.out_dir) is not None:
        if training.resume == "never":
            raise UserError(
                f"training.resume: never, but there is a run in {str(training.out_dir)!r} (choose another training.out_dir, or "
                "auto)"
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
            f"{key}: {str(checkpoint.run)!r} holds weights alone, and no training that could go on (start a new one with "
            f"training.init_from={checkpoint.run})"
        )
    return Origin(key, checkpoint)


def check_compatible(origin: Origin, config: ConfigDict, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Compare `config` with that of the run that it resumes, or of the model whose weights it starts with.

    Returns:
      "KEY was theirs, now ours" for each changed key that makes the resumed run diverge.

    Raises:
      UserError: the run is of another model or optimizer.
    """
    if origin.model is not None:
        return _check_weights(origin.model, config, tokenizer)
    if origin.checkpoint is None or origin.key is None:
        return []
    theirs = run_folder.read_config(origin.checkpoint.run, origin.key)
    differences = []
    for section in ("model", "data", "training"):  # how it is spread over devices may change
        for name, value in config[section].items():
            path, there = f"{section}.{name}", theirs[section][name]
            if there == value or path in _FREE:
                continue
            if _changes_arrays(path, there, value):
                raise UserError(
                    f"{path}: {value}, but the run in {str(origin.checkpoint.run)!r} has {there} (expected the same, or "
                    "another training.out_dir)"
                )
            differences.append(f"{path} was {there}, now {value}")
    return differences


def _changes_arrays(path: str, there, value) -> bool:
    """Whether a checkpoint of `there` cannot be used with `value`."""
    if path == "training.dtype":
        return "float16" in (there, value)  # which alone has a loss scale
    return path in _SHAPES or path.startswith("model.") and path not in ("model.dropout", "model.aux_loss_alpha")


def start(
    origin: Origin, config: ConfigDict, checkpoints: Checkpoints, init, abstract: TrainState
) -> tuple[TrainState, Progress, str]:
    """The state to train from, what is known about the run so far, and in words where they come from.

    Args:
      init: makes a fresh TrainState; called inside jit.
      abstract: its shapes with their shardings.

    Raises:
      UserError: a checkpoint that is named cannot be read.
    """
    if origin.key == "training.out_dir":
        state, progress = checkpoints.restore(abstract)
        return state, progress, f"step {int(state.step):,}, resumed"
    if origin.checkpoint is not None:
        path = origin.checkpoint.path
        try:
            state, progress = checkpoints_lib.restore(path, abstract)
        except Exception as error:  # whatever the libraries raise for a file that is broken
            raise UserError(
                f"training.resume_from: {str(path)!r} cannot be read ({' '.join(str(error).split())[:300]})"
            ) from error
        return state, progress, f"step {int(state.step):,} of {path}"
    state = jax.jit(init, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))()
    if origin.model is None:
        return state, Progress(), FROM_SCRATCH
    params = origin.model.params(abstract.params)
    ema_params = None if state.ema_params is None else jax.tree.map(lambda x: x.copy(), params)
    return state.replace(params=params, ema_params=ema_params), Progress(), f"the weights of {config.training.init_from}"


def _check_weights(model: StoredModel, config: ConfigDict, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    differences = []
    for name, value in config.model.items():
        path, there = f"model.{name}", model.config.model[name]
        if there == value or path in _FREE or name in ("dropout", "multiple_of", "max_seq_len"):
            continue
        if name != "norm_eps" and not name.startswith("rope_"):
            raise UserError(f"{path}: {value}, but the weights in {str(model.path)!r} have {there} (expected the same)")
        differences.append(f"{path} was {there}, now {value}")
    if model.tokenizer is not None and fingerprint(model.tokenizer) != fingerprint(tokenizer):
        differences.append(f"the tokenizer of {model.path} is another than the data's: ids mean other texts")
    return differences


def make_folder(folder: Path) -> None:
    """Raises UserError where it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{jax.process_index()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        full = " (free some space)" if error.errno == errno.ENOSPC else ""
        raise UserError(f"training.out_dir: cannot write to {str(folder)!r}: {error.strerror}{full}") from error
