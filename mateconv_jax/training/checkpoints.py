"""Saving and restoring a run with Orbax.

A checkpoint is a folder (see run_folder.py) with `state`, a TrainState, and `progress`, a Progress as JSON.
"""

import contextlib
import dataclasses
import math
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import jax
import orbax.checkpoint as ocp
from absl import logging

from mateconv_jax import disk, run_folder
from mateconv_jax.errors import UserError, is_out_of_memory
from mateconv_jax.runtime import agreement, device_memory, distributed
from mateconv_jax.training.train_state import TrainState


@dataclasses.dataclass
class Progress:
    """What a run knows besides its TrainState.

    Attributes:
      best_loss, best_step: of all evaluations on what is measured now; None: there is none. With training.best_metric the best
        value of that.
      bad_evaluations: since the best one.
      evaluated_step: of the last evaluation.
      rows, train_data, measured: rows read so far; fingerprints of what is read, see `reads`. None in older checkpoints.
      reference: fingerprints of the reference's weights, rows and numbers, see reference.py; None: the loss has none.
      mixture: what is read of each dataset, see mixing.py; None: the run has never read but one.
    """

    best_loss: float | None = None
    best_step: int | None = None
    bad_evaluations: int = 0
    evaluated_step: int | None = None
    rows: int | None = None
    train_data: str | None = None
    measured: str | None = None
    reference: dict[str, str] | None = None
    mixture: dict[str, Any] | None = None

    def reads(self, train_data: str, measured: str | None) -> list[str]:
        """Record fingerprints of the training rows, and of the rows that a validation loss is measured on (None: there are
        none). If those are others than before, best_loss and bad_evaluations start anew. Returns a line for the log for each
        change.
        """
        changes = []
        if self.train_data not in (None, train_data):
            changes.append("not an exact continuation: the training rows are not those that it read so far")
        self.train_data = train_data
        if measured is None:
            return changes
        if self.measured not in (None, measured):
            changes.append(
                "what decides the best checkpoint is measured on other rows than before: best and patience start anew"
            )
            self.best_loss, self.best_step, self.bad_evaluations = None, None, 0
        self.measured = measured
        return changes

    def evaluated(self, step: int, loss: float, shall_be_high: bool = False) -> bool:
        """Record an evaluation's loss, or other metric that decides. Returns whether it is the best so far; NaN and infinity
        never are.
        """
        self.evaluated_step = step
        # NaN: older versions took it for the best, and nothing is below it.
        sign = -1 if shall_be_high else 1
        best = math.inf if self.best_loss is None or math.isnan(self.best_loss) else sign * self.best_loss
        if math.isfinite(loss) and sign * loss < best:
            self.best_loss, self.best_step, self.bad_evaluations = loss, step, 0
            return True
        self.bad_evaluations += 1
        return False


class Checkpoints:
    """Asynchronous saves into a run folder. Leaving the block waits for the last save, which an exception would lose otherwise.

    The loop only dispatches a copy of the state on its devices; a thread calls Orbax. Called by the loop, Orbax blocked it for
    45 to 115 ms of the 0.45 to 0.8 s that writing 430 MB takes, most of it in Python.
    """

    def __init__(
        self,
        run: Path,
        keep_latest: int,
        keep_every: int | None,
        keep_best: bool,
        on_written: Callable[[float], None] = lambda seconds: None,
        on_failed: Callable[[Exception], object] = lambda error: None,
    ):
        """
        Args:
          on_written: called, in another thread, with the seconds that a checkpoint took to reach the disk.
          on_failed: called, in another thread, with the error of a failed save, which the next one raises.
        """
        disk.quiet_orbax()
        self._folder = Path(os.path.abspath(run))
        self._thread = ThreadPoolExecutor(1, "checkpoints")  # one: all processes reach Orbax's barriers in the same order
        self._latest = _Saves(
            self._thread, run_folder.checkpoints(run), on_written, on_failed, max_to_keep=keep_latest, keep_period=keep_every
        )
        self._best, self._copies = None, _Copies()
        if keep_best:
            self._best = _Saves(self._thread, run_folder.best(run), on_written, on_failed, max_to_keep=1)
            self._best.last_step = None  # the run may return to an earlier step, and do that one again

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.ExitStack() as stack:  # all are closed, whatever one raises
            stack.callback(self._thread.shutdown)
            for saves in (self._latest, self._best):
                if saves is not None:
                    stack.callback(saves.close)

    def leave_room_for(self, compiled_step: jax.stages.Compiled) -> None:
        """Copy the state only where this program fits beside the copy. Before, it is not copied."""
        self._copies.step_bytes = device_memory.of_program(compiled_step)

    def latest_step(self) -> int | None:
        return self._latest.last_step

    def save(self, step: int, state: TrainState, progress: Progress) -> None:
        """Copy the state and return; it is written while training continues. A step that is saved already is not saved again.

        Raises:
          UserError: an earlier save could not be written.
        """
        self._latest.save(step, state, progress, self._copies)

    def save_best(self, step: int, state: TrainState, progress: Progress) -> None:
        """Save into `best`, which holds one checkpoint."""
        if self._best is not None:
            self._best.save(step, state, progress, self._copies)

    def restore(self, abstract_state: TrainState) -> tuple[TrainState, Progress]:
        """The newest readable checkpoint, placed as `abstract_state` is sharded, which need not be as it was saved. Unreadable
        ones are logged and moved to RUN/unreadable.

        Raises:
          UserError: none can be read.
        """
        reasons = []
        steps = agreement.from_first("checkpoints", self._latest.all_steps())
        for step in steps:
            found = read(self._latest.folder / str(step), abstract_state)
            if not isinstance(found, str):
                break
            reasons.append(f"step {step}: {found}")
        else:
            raise UserError(f"training.out_dir: no checkpoint in {self._folder} can be read ({'; '.join(reasons)})")
        for reason, step in zip(reasons, steps, strict=False):
            unreadable = run_folder.unreadable(self._folder)
            logging.warning("checkpoint skipped and moved to %s: %s", unreadable, reason)
            if distributed.is_first():
                unreadable.mkdir(exist_ok=True)
                shutil.rmtree(unreadable / str(step), ignore_errors=True)
                (self._latest.folder / str(step)).rename(unreadable / str(step))
        if reasons:
            agreement.gather("unreadable checkpoints moved")
            self._latest.reload()
        return found


class _Saves:
    """Orbax's manager of one folder, called by `thread`."""

    def __init__(self, thread: ThreadPoolExecutor, folder: Path, on_written: Callable, on_failed: Callable, **keep):
        # Active processes: barriers that do not go through the devices, where another thread trains. Key prefix: saves of one
        # step into two folders would share a barrier.
        processes = ocp.options.MultiprocessingOptions(
            active_processes=set(range(jax.process_count())), barrier_sync_key_prefix=folder.name
        )
        folder.mkdir(parents=True, exist_ok=True)  # Orbax does not with `active_processes`
        options = ocp.CheckpointManagerOptions(
            create=False, cleanup_tmp_directories=True, multiprocessing_options=processes,
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._written), **keep,
        )  # fmt: skip
        self._manager = ocp.CheckpointManager(folder, options=options)
        self._thread, self.folder, self._on_written, self._begin = thread, folder, on_written, 0.0
        self._on_failed = on_failed
        self._handed_over: Future | None = None
        self.last_step = self._manager.latest_step()

    def save(self, step: int, state: TrainState, progress: Progress, copies: "_Copies") -> None:
        """See Checkpoints. What a run saved before it returned to an earlier step is replaced, unless it comes out the same."""
        is_saved = step == self.last_step or run_folder.read_progress(self.folder / str(step)) == dataclasses.asdict(progress)
        if agreement.from_first("is saved", is_saved):
            return
        with _clear_errors(self.folder.parent):
            self._wait_for_last_save()
            self._manager.check_for_errors()
            replaces = agreement.from_first("replaces a checkpoint", step in self._manager.all_steps())
            # The next step overwrites the state. Without a copy, wait: Orbax returns when the state is on the host.
            copy = copies.take(step, state)
            saved = state if copy is None else copy
            self._handed_over = self._thread.submit(
                self._write, step, replaces, saved, dataclasses.asdict(progress), time.monotonic()
            )
            if copy is None:
                self._wait_for_last_save()
            else:
                self._handed_over.add_done_callback(copies.give_back)
        self.last_step = step

    def _write(self, step: int, replaces: bool, state: TrainState, progress: dict, begin: float) -> None:
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress))
        try:
            with _clear_errors(self.folder.parent):
                if replaces:
                    self._manager.delete(step)
                self._manager.wait_until_finished()
                self._begin = begin
                # Forced: otherwise Orbax answers False, and saves nothing, for a step below its last. It keeps what was saved
                # last.
                if not self._manager.save(step, args=args, force=True):
                    raise RuntimeError(f"Orbax did not save step {step}")
        except Exception as error:
            self._on_failed(error)
            raise

    def _written(self) -> None:
        self._on_written(time.monotonic() - self._begin)

    def all_steps(self) -> list[int]:
        """Newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def reload(self) -> None:
        self._manager.reload()
        self.last_step = self._manager.latest_step()

    def close(self) -> None:
        with _clear_errors(self.folder.parent):
            try:
                self._wait_for_last_save()
                self._manager.wait_until_finished()
            except BaseException:
                with contextlib.suppress(Exception):
                    self._manager.close()
                if distributed.is_first():  # what Orbax wrote of it would keep a full disk full
                    for unfinished in self.folder.glob("*.orbax-checkpoint-tmp"):
                        disk.remove(unfinished)
                raise
            self._manager.close()

    def _wait_for_last_save(self) -> None:
        last, self._handed_over = self._handed_over, None
        if last is not None:
            last.result()


class _Copies:
    """The state as it was at a step, on its devices: at most one copy at a time, which `best` and `checkpoints` share.

    Attributes:
      step_bytes: what the training step takes on a device beside its arguments; None: not known yet.
    """

    def __init__(self):
        self.step_bytes: int | None = None
        self._step, self._copy, self._users = 0, None, 0
        self._changed = threading.Condition()
        self._peaks: list[int | None] | None = None  # of each device before the first copy

    def take(self, step: int, state: TrainState) -> TrainState | None:
        """The copy of that step, made now if need be, until `give_back`; None: there is no room for one. Waits until the copy
        of another step is given back.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._copy is None or self._step == step)
            if self._copy is None and all(agreement.gather("copy fits", self._fit(state))):
                shardings = jax.tree.map(lambda x: x.sharding, state)
                self._step, self._copy = step, jax.device_put(state, shardings, may_alias=False)
            self._users += self._copy is not None
            return self._copy

    def give_back(self, *_) -> None:
        """One of those who took it does not need it any more. The last one frees it: Orbax would keep it until its files are
        written, although it reads only what it has copied to the host.
        """
        with self._changed:
            self._users -= 1
            if not self._users:
                jax.tree.map(lambda x: x.delete(), self._copy)
                self._copy = None
                self._changed.notify_all()

    def _fit(self, state: TrainState) -> bool:
        """Whether every device of this process has room for a copy beside the training step and whatever else has run so far,
        such as an evaluation or rollouts. CPUs use the host's memory, which is not looked at.
        """
        devices = jax.local_devices()
        if self._peaks is None:
            self._peaks = [device_memory.peak(device) for device in devices]
        size = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
        for device, peak in zip(devices, self._peaks, strict=True):
            limit, in_use = device_memory.limit(device), device_memory.in_use(device)
            if limit is None and device.platform == "cpu":
                continue
            if limit is None or in_use is None or self.step_bytes is None:
                return False
            if max(in_use + self.step_bytes, peak or 0) + size > limit:
                return False
        return True


def read(folder: Path, abstract_state: TrainState) -> tuple[TrainState, Progress] | str:
    """A checkpoint from its own folder; where a process cannot read it, all of them get the reason."""
    found, reason = None, None
    try:
        found = restore(folder, abstract_state)
    except Exception as error:  # the libraries raise anything for a broken file
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
    reasons = agreement.gather("checkpoint read", reason)
    failed = [process for process, reason in enumerate(reasons) if reason is not None]
    if found is not None and not failed:
        return found
    return reasons[failed[0]] + (f" (process {failed[0]} of {len(reasons)})" if len(reasons) > 1 else "")


def restore(folder: Path, abstract_state: TrainState) -> tuple[TrainState, Progress]:
    """A checkpoint from its own folder. Raises whatever Orbax raises for what it cannot read. It waits for no other process."""
    if _has_no_clipping(folder):
        clipping, optimizer = cast(tuple, abstract_state.opt_state)
        state, progress = _restore(folder, dataclasses.replace(abstract_state, opt_state=optimizer))
        return dataclasses.replace(state, opt_state=(clipping, state.opt_state)), progress
    return _restore(folder, abstract_state)


def _restore(folder: Path, abstract_state: TrainState) -> tuple[TrainState, Progress]:
    handler = ocp.CompositeCheckpointHandler(state=ocp.StandardCheckpointHandler(), progress=ocp.JsonCheckpointHandler())
    # Each process alone: by default Orbax waits for those that could not read it.
    alone = ocp.options.MultiprocessingOptions(primary_host=None, active_processes={jax.process_index()})
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), progress=ocp.args.JsonRestore())
        restored = checkpointer.restore(folder, args=args)
    return restored.state, Progress(**restored.progress)


def _has_no_clipping(folder: Path) -> bool:
    """Whether an older version saved this with training.grad_clip 0: the optimizer's state then did not begin with that of the
    clipping, which is empty.
    """
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        saved = checkpointer.metadata(folder / "state").item_metadata.tree
    opt_state = saved.get("opt_state")
    return opt_state is not None and not (isinstance(opt_state, list) and len(opt_state) == 2 and opt_state[0] is None)


@contextlib.contextmanager
def _clear_errors(folder: Path):
    """Turns the error of a save, this one or an earlier one, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # Orbax and its storage raise anything
        if is_out_of_memory(error):
            raise
        code = disk.code_of(error, folder)
        reason = os.strerror(code) if code else " ".join(str(error).split())[:300]
        raise UserError(
            f"training.out_dir: cannot write a checkpoint to {folder} ({reason}; earlier ones stay, and the same command "
            "continues from the newest)"
        ) from error
