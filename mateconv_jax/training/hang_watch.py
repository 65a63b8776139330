"""training.hang_timeout: a run that goes on no more ends by itself, and says where it hangs."""

import contextlib
import faulthandler
import sys
import threading
import time
from collections.abc import Generator

import jax

from mateconv_jax.runtime import agreement, notices
from mateconv_jax.training.preemption import RESUMABLE

FOLDER = "mateconv_jax/progress/"
# After which a process ends whose interpreter is stuck as well, in a call that holds its lock.
SPARE_SECONDS = 10.0
STDERR = 2


class HangWatch:
    """Within the block a thread looks whether any process still makes progress: completes a step, or an evaluation's batch. If
    none has for `timeout` seconds, every process prints the stacks of all its threads and exits with RESUMABLE, on which
    launch/slurm.sbatch starts the run again from its newest checkpoint.

    One process may keep all others waiting, when it compiles or writes samples; so all must be stuck. What takes long without
    a sign of life counts as progress while it lasts (`paused`), and so does all before the first step.
    """

    def __init__(self, timeout: float):
        """timeout: in seconds; 0: never."""
        self._timeout = timeout
        self._steps, self._pauses, self._begun, self._ended = 0, 0, False, threading.Event()

    def __enter__(self):
        if self._timeout:
            threading.Thread(target=self._watch, name="hang watch", daemon=True).start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        if self._timeout:
            faulthandler.cancel_dump_traceback_later()

    def progress(self) -> None:
        """The main thread has completed something."""
        self._begun = True
        self._steps += 1

    @contextlib.contextmanager
    def paused(self) -> Generator[None]:
        """While the main thread does something that takes as long as it takes."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    def _watch(self) -> None:
        alive, last, since = 0, None, time.monotonic()
        while not self._ended.wait(min(1.0, self._timeout / 4)):
            faulthandler.dump_traceback_later(self._timeout + SPARE_SECONDS, exit=True, file=STDERR)
            alive += not self._begun or self._pauses > 0
            try:
                now = _exchange(f"{self._steps}, {alive}")
            except jax.errors.JaxRuntimeError:  # the coordinator is gone: jax ends this process
                return
            if now != last:
                last, since = now, time.monotonic()
            elif time.monotonic() - since > self._timeout and not self._ended.is_set():
                self._give_up()

    def _give_up(self) -> None:
        who = f"process {jax.process_index()} of {jax.process_count()}"
        print(f"error: training.hang_timeout: no progress for {self._timeout:g} s; the stacks of {who}:", file=sys.stderr)
        sys.stderr.flush()
        faulthandler.dump_traceback(file=STDERR, all_threads=True)
        notices.leave(RESUMABLE)


def _exchange(value: str) -> list[tuple[str, str]]:
    """What all processes say of their progress, after this one has said `value`."""
    if jax.process_count() == 1:
        return [("", value)]
    store = agreement.store()
    store.key_value_set(f"{FOLDER}{jax.process_index()}", value, allow_overwrite=True)
    return sorted(store.key_value_dir_get(FOLDER))
