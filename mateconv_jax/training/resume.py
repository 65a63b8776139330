"""Where a run starts: the newest checkpoint in its own folder > resume_from > init_from > scratch."""

import dataclasses
import shutil
import time
from pathlib import Path

import jax
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerFast

from mateconv_jax import config as config_lib, files, run_folder
from mateconv_jax.config_keys import KEYS, OnResume
from mateconv_jax.data.tokenizer.tokenizer import fingerprint, load
from mateconv_jax.errors import UserError
from mateconv_jax.interop.formats import open_model
from mateconv_jax.interop.stored_model import StoredModel, read_end_ids
from mateconv_jax.run_folder import Checkpoint
from mateconv_jax.runtime import agreement, distributed, out_of_memory
from mateconv_jax.training import checkpoints as checkpoints_lib, initial_weights
from mateconv_jax.training.batch_shape import START, Position
from mateconv_jax.training.checkpoints import Checkpoints, Progress
from mateconv_jax.training.train_state import TrainState

FROM_SCRATCH = "from scratch"
LATE_SECONDS = 70  # NFS shows a folder that another machine made after up to 60 s

# Where there is no room for parameters, moments and EMA, a smaller batch does not help.
STATE_ALONE = "mesh.fsdp", "the training state alone does not fit: split it over more devices, or turn training.use_ema off"


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

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """Of the run or the model; None: it has none."""
        if self.checkpoint is None:
            return None if self.model is None else self.model.tokenizer
        folder = self.checkpoint.run / "tokenizer"
        return load(folder, str(self.checkpoint.run)) if folder.is_dir() else None


def find_origin(config: ConfigDict) -> Origin:
    """The first that exists: the newest checkpoint in out_dir > resume_from > init_from > scratch.

    Raises:
      UserError: what a key names cannot be used, out_dir holds a run and training.resume forbids continuing it, its config.json
        is not a run's, or processes see different checkpoints.
    """
    looks_left = LATE_SECONDS  # counted, not timed: all processes give up at the same look
    while True:
        origin = _find_origin(config)
        seen = agreement.gather("origin", [origin.key, origin.checkpoint and origin.checkpoint.step])
        other = next((process for process, what in enumerate(seen) if what != seen[0]), None)
        if other is None:
            return origin
        if looks_left == 0:
            break
        looks_left -= 1
        time.sleep(1)
    steps = [f"{'no checkpoint' if step is None else f'step {step}'} in process {i}" for i, (_, step) in enumerate(seen)]
    raise UserError(
        f"training.out_dir: newest is {steps[0]}, {steps[other]} (expected a folder on a disk that all processes share)"
    )


def _find_origin(config: ConfigDict) -> Origin:
    training = config.training
    run_folder.check_config_is_ours(Path(training.out_dir), "training.out_dir")
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
    _check_tokenizer(origin, tokenizer)
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
        differences.append(f"not an exact continuation: {key.path} was {was}, now {now}")
    was, now = (c.training.batch_size * c.training.accumulation_steps for c in (theirs, config))
    if was != now:
        differences.append(f"the global batch was {was:,} rows, now {now:,}: the run goes on at the next row")
    return differences


def _check_tokenizer(origin: Origin, tokenizer: PreTrainedTokenizerFast) -> None:
    theirs = origin.tokenizer
    if theirs is not None and fingerprint(theirs) != fingerprint(tokenizer):
        assert origin.checkpoint is not None
        raise UserError(
            f"data.tokenizer_path: the run in {str(origin.checkpoint.run)!r} has another tokenizer than the data (expected the "
            "same; training.init_from takes its weights for a new run)"
        )


def bring_best(origin: Origin, folder: Path) -> None:
    """Copy the best checkpoint of the run that training.resume_from names, if it is what the best loss so far belongs to."""
    if origin.checkpoint is None or origin.key != "training.resume_from":
        return
    best_step = run_folder.read_progress(origin.checkpoint.path).get("best_step")
    source, target = (run_folder.best(run) / str(best_step) for run in (origin.checkpoint.run, folder))
    if distributed.is_first() and source.is_dir() and not target.is_dir():
        target.parent.mkdir(exist_ok=True)
        with files.aside(target) as written:
            shutil.copytree(source, written)
    agreement.gather("best checkpoint copied")


def end_ids(origin: Origin, vocab_size: int) -> tuple[int, ...]:
    """The tokens that end an answer of the model that the run starts from, where that says more than its tokenizer does."""
    if origin.model is not None:
        return origin.model.end_ids
    return () if origin.checkpoint is None else read_end_ids(origin.checkpoint.run, vocab_size)


def position(origin: Origin) -> Position:
    """Where a run from `origin` starts, without reading the state."""
    if origin.checkpoint is None or origin.key is None:
        return START
    step = int(origin.checkpoint.path.name)
    rows = run_folder.read_progress(origin.checkpoint.path).get("rows")
    return Position(step, _rows_read(origin, step) if rows is None else rows)


def _rows_read(origin: Origin, step: int) -> int:
    """In a run of an older version."""
    assert origin.checkpoint is not None and origin.key is not None
    training = run_folder.read_config(origin.checkpoint.run, origin.key).training
    return step * training.batch_size * training.accumulation_steps


def start(origin: Origin, checkpoints: Checkpoints, init, abstract: TrainState) -> tuple[TrainState, Progress, Position, str]:
    """The state to train from, the run's progress so far, where it stands, and where they come from, in words.

    Args:
      init: makes a fresh TrainState; called inside jit.
      abstract: its shapes with their shardings.

    Raises:
      UserError: the checkpoint cannot be read.
    """
    if origin.checkpoint is not None:
        if origin.key == "training.out_dir":
            with out_of_memory.as_user_error(*STATE_ALONE):
                state, progress = checkpoints.restore(abstract)
            words = f"step {int(state.step):,}, resumed"
        else:
            with out_of_memory.as_user_error(*STATE_ALONE):
                found = checkpoints_lib.read(origin.checkpoint.path, abstract)
            if isinstance(found, str):
                raise UserError(f"training.resume_from: {str(origin.checkpoint.path)!r} cannot be read ({found})")
            state, progress = found
            words = f"step {int(state.step):,} of {origin.checkpoint.path}"
        if progress.rows is None:
            progress.rows = _rows_read(origin, int(state.step))
        return state, progress, Position(int(state.step), progress.rows), f"{words}, {progress.rows:,} rows read"
    with out_of_memory.as_user_error(*STATE_ALONE):
        state = jax.jit(init, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))()
        if origin.model is None:
            return state, Progress(), START, FROM_SCRATCH
        params = initial_weights.read(origin.model, abstract.params)
        ema_params = None if state.ema_params is None else jax.tree.map(lambda x: x.copy(), params)
        state = state.replace(params=params, ema_params=ema_params)
    return state, Progress(), START, f"the weights of {origin.model.path}"
