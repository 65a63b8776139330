"""Requests to stop: SIGTERM from a scheduler, SIGINT from Ctrl-C."""

import os
import signal

import jax
from absl import logging
from jax.experimental import multihost_utils

RESUMABLE = 75  # exit code: stopped early, the same command continues (EX_TEMPFAIL; schedulers requeue on it)


class Signals:
    """Within the block the first SIGTERM or SIGINT only sets `stop`; a second one ends the process at once.

    Python runs the handler between two bytecode instructions: immediately in the loop, within 0.3 s during a compilation, and
    after the call returns during one into the device's runtime.

    With several processes jax's coordinator, which has a handler of its own, relays a SIGTERM of any of them, so that all stop
    after the same step.
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
        """`stop`, after asking the other processes, if any. Every process must call it at every step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.stop = True
        return self.stop

    def _handle(self, number, frame):
        if self.stop:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.stop = True
        logging.info("%s: saving a checkpoint, then stopping (repeat to stop at once)", signal.Signals(number).name)
