"""Being asked to stop: SIGTERM from a scheduler, SIGINT from Ctrl-C."""

import os
import signal

import jax
from absl import logging
from jax.experimental import multihost_utils

RESUMABLE = 75  # exit code: stopped before the end, give the same command to go on (EX_TEMPFAIL; schedulers requeue on it)


class Signals:
    """Inside the block the first SIGTERM or SIGINT sets `stop` and no more; a second one ends the process at once.

    Python runs the handler between two of its instructions: at once in the loop, within 0.3 s of a compilation, and after a
    call into the device's runtime returns.

    Where there are several processes a SIGTERM of any of them goes through jax's coordinator, which installed its own handler
    and lets all of them stop after the same step.
    """

    def __init__(self):
        self.stop = False
        self._before = {}

    def __enter__(self):
        if jax.process_count() == 1:
            self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def poll(self, step: int) -> bool:
        """`stop`, after asking the other processes, if there are any. Every process has to ask at every step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.stop = True
        return self.stop

    def _handle(self, number, frame):
        if self.stop:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.stop = True
        logging.info("%s: saving a checkpoint, then stopping (once more stops at once, without)", signal.Signals(number).name)
