"""Where a run starts: its own run folder's newest checkpoint > resume_from > init_from > scratch."""

import errno
from pathlib import Path

import jax
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerFast

from mateconv_jax import run_folder
from mateconv_jax.data.tokenizer.tokenizer import fingerprint
from mateconv_jax.errors import UserError
from mateconv_jax.interop.formats import open_model
from mateconv_jax.interop.stored_model import Model
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
_SHAPES = {"training.use_ema", "training.optimizer_type", "training.dtype"}


def check(folder: Path, config: ConfigDict, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Compare `config` with that of the run which it would go on with, or of the model whose weights it would start with.

    Returns:
      "KEY was theirs, now ours" for each key that makes the continuation another than it would have been.

    Raises:
      UserError: the run is of another model or optimizer, or there is one and training.resume forbids to use it.
    """
    training = config.training
    if run_folder.latest_step(folder) is not None:
        if training.resume == "never":
            raise UserError(
                f"training.resume: never, but there is a run in {str(folder)!r} (choose another training.out_dir, or auto)"
            )
        source, key = folder, "training.out_dir"
    elif training.resume_from:
        source, key = _run_of(training.resume_from), "training.resume_from"
    elif training.init_from:
        return _check_init_from(config, tokenizer)
    else:
        return []
    theirs = run_folder.read_config(source, key)
    checkpoint = _checkpoint_of(str(folder) if key == "training.out_dir" else training.resume_from)
    if not (checkpoint / "progress").is_dir():
        raise UserError(
            f"{key}: {str(source)!r} holds weights alone, and no training that could go on (start a new one with "
            f"training.init_from={source})"
        )
    differences = []
    for section in ("model", "data", "training"):  # how it is spread over devices may change
        for name, value in config[section].items():
            path, there = f"{section}.{name}", theirs[section][name]
            if there == value or path in _FREE:
                continue
            half = "float16" in (there, value)  # which alone has a loss scale
            if (
                section == "model"
                and name not in ("dropout", "aux_loss_alpha")
                or path in _SHAPES
                and (path != "training.dtype" or half)
            ):
                raise UserError(
                    f"{path}: {value}, but the run in {str(source)!r} has {there} (expected the same, or another "
                    "training.out_dir)"
                )
            differences.append(f"{path} was {there}, now {value}")
    return differences


def start(config: ConfigDict, checkpoints: Checkpoints, init, abstract: TrainState) -> tuple[TrainState, Progress, str]:
    """The state to train from, what is known about the run so far, and in words where they come from.

    Args:
      init: makes a fresh TrainState; called inside jit.
      abstract: its shapes with their shardings.

    Raises:
      UserError: a checkpoint that is named cannot be read.
    """
    training = config.training
    if checkpoints.latest_step() is not None:
        state, progress = checkpoints.restore(abstract)
        return state, progress, f"step {int(state.step):,}, resumed"
    if training.resume_from:
        path = _checkpoint_of(training.resume_from)
        try:
            state, progress = checkpoints_lib.restore(path, abstract)
        except Exception as error:  # whatever the libraries raise for a file that is broken
            raise UserError(
                f"training.resume_from: {str(path)!r} cannot be read ({' '.join(str(error).split())[:300]})"
            ) from error
        return state, progress, f"step {int(state.step):,} of {path}"
    state = jax.jit(init, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))()
    if training.init_from:
        params = _open_init_from(config).params(abstract.params)
        ema_params = None if state.ema_params is None else jax.tree.map(lambda x: x.copy(), params)
        return state.replace(params=params, ema_params=ema_params), Progress(), f"the weights of {training.init_from}"
    return state, Progress(), FROM_SCRATCH


def _open_init_from(config: ConfigDict) -> Model:
    return open_model(config.training.init_from, "training.init_from", n_heads=config.model.n_heads)


def _check_init_from(config: ConfigDict, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    model = _open_init_from(config)
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


def _run_of(path: str) -> Path:
    """RUN, given RUN or RUN/checkpoints/STEP or RUN/best/STEP."""
    return Path(path).parents[1] if Path(path).name.isdigit() and (Path(path) / "state").is_dir() else Path(path)


def _checkpoint_of(path: str) -> Path:
    if _run_of(path) != Path(path):
        return Path(path).absolute()
    step = run_folder.latest_step(path)
    if step is None:
        raise UserError(f"training.resume_from: no checkpoint in {path!r} (expected RUN or RUN/checkpoints/STEP)")
    return (Path(path) / "checkpoints" / str(step)).absolute()
