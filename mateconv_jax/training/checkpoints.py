"""Saving and restoring a run with Orbax.

RUN/checkpoints/STEP/state      TrainState
RUN/checkpoints/STEP/progress   Progress, JSON
RUN/best/STEP/…                 the same, of the lowest validation loss
"""

import contextlib
import dataclasses
import errno
import os
import shutil
from pathlib import Path

import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from mateconv_jax import distributed
from mateconv_jax.errors import UserError
from mateconv_jax.training.train_state import TrainState


@dataclasses.dataclass
class Progress:
    """What a run knows besides its TrainState. Its place in the data is no part of it: a batch follows from the step.

    best_loss, best_step: of all evaluations. bad_evaluations: since the best one. evaluated_step: the last one.
    """

    best_loss: float | None = None
    best_step: int | None = None
    bad_evaluations: int = 0
    evaluated_step: int | None = None

    def evaluated(self, step: int, loss: float) -> bool:
        """Take the loss of an evaluation; whether it is the best so far."""
        self.evaluated_step = step
        if self.best_loss is None or loss < self.best_loss:
            self.best_loss, self.best_step, self.bad_evaluations = loss, step, 0
            return True
        self.bad_evaluations += 1
        return False


class Checkpoints:
    """Asynchronous saves into a run folder. Leaving the block waits for the last one: an exception during an asynchronous save
    would lose it otherwise.
    """

    def __init__(self, run_folder: Path, keep_latest: int, keep_every: int | None, keep_best: bool):
        self._folder = Path(os.path.abspath(run_folder))
        options = ocp.CheckpointManagerOptions(max_to_keep=keep_latest, keep_period=keep_every, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self._folder / "checkpoints", options=options)
        self._best = None
        if keep_best:
            # Two saves of one step at once would else meet at one barrier, where there are several processes.
            barriers = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix="best")
            options = ocp.CheckpointManagerOptions(
                max_to_keep=1, cleanup_tmp_directories=True, multiprocessing_options=barriers
            )
            self._best = ocp.CheckpointManager(self._folder / "best", options=options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for manager in (self._manager, self._best):
            if manager is not None:
                with _clear_errors(self._folder):
                    manager.close()

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, progress: Progress) -> None:
        """Copies the state to the host and returns; writing goes on beside training. Saved already: nothing happens.

        Raises:
          UserError: an earlier save could not be written.
        """
        if step != self._manager.latest_step():
            with _clear_errors(self._folder):
                self._manager.save(step, args=_save_args(state, progress))

    def save_best(self, step: int, state: TrainState, progress: Progress) -> None:
        """The same into `best`, which holds one checkpoint."""
        if self._best is not None and step != self._best.latest_step():
            with _clear_errors(self._folder):
                self._best.save(step, args=_save_args(state, progress))

    def restore(self, abstract_state: TrainState) -> tuple[TrainState, Progress]:
        """The newest checkpoint that can be read, onto the shardings of `abstract_state`; they need not be those it was saved
        from. What cannot be read is said, and moved to RUN/unreadable.

        Raises:
          UserError: none can be read.
        """
        reasons = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state, progress = restore(self._folder / "checkpoints" / str(step), abstract_state)
            except Exception as error:  # whatever the libraries raise for a file that is broken
                reasons.append(f"step {step}: {' '.join(str(error).split())[:200] or type(error).__name__}")
                continue
            break
        else:
            raise UserError(f"training.out_dir: no checkpoint in {self._folder} can be read ({'; '.join(reasons)})")
        for reason, step in zip(reasons, sorted(self._manager.all_steps(), reverse=True), strict=False):
            logging.warning("checkpoint skipped and moved to %s: %s", self._folder / "unreadable", reason)
            if distributed.is_first():
                (self._folder / "unreadable").mkdir(exist_ok=True)
                shutil.rmtree(self._folder / "unreadable" / str(step), ignore_errors=True)
                (self._folder / "checkpoints" / str(step)).rename(self._folder / "unreadable" / str(step))
        if reasons:
            multihost_utils.sync_global_devices("unreadable checkpoints moved")
            self._manager.reload()
        return state, progress


def restore(folder: Path, abstract_state: TrainState) -> tuple[TrainState, Progress]:
    """One checkpoint, RUN/checkpoints/STEP. Raises whatever Orbax does for what it cannot read."""
    handler = ocp.CompositeCheckpointHandler(state=ocp.StandardCheckpointHandler(), progress=ocp.JsonCheckpointHandler())
    with ocp.Checkpointer(handler) as checkpointer:
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), progress=ocp.args.JsonRestore())
        restored = checkpointer.restore(folder, args=args)
    return restored.state, Progress(**restored.progress)


def _save_args(state: TrainState, progress: Progress):
    progress_args = ocp.args.JsonSave(dataclasses.asdict(progress))
    return ocp.args.Composite(state=ocp.args.StandardSave(state), progress=progress_args)


@contextlib.contextmanager
def _clear_errors(folder: Path):
    """A save that failed, at once or since the last call, as a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever Orbax and its storage raise
        full = getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error)
        reason = os.strerror(errno.ENOSPC) if full else " ".join(str(error).split())[:300]
        raise UserError(
            f"training.out_dir: a checkpoint could not be written to {folder} ({reason}; earlier ones stay, and the same "
            "command goes on from the newest)"
        ) from error
