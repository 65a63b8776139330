"""Requests to stop: SIGTERM from a scheduler, SIGINT from Ctrl-C, the time limit."""

import os
import signal

import jax
from absl import logging
from jax.experimental import multihost_utils

from mateconv_jax.runtime.agreement import AgreedStep
from mateconv_jax.training.time_limit import TimeLimit

RESUMABLE = 75  # exit code: stopped early, the same command continues (EX_TEMPFAIL; schedulers requeue on it)


class Signals:
    """Within the block the first SIGTERM or SIGINT only sets `stop`; a second one ends the process at once.

    Python runs the handler between two bytecode instructions: immediately in the loop, within 0.3 s during a compilation, and
    after the call returns during one into the device's runtime.

    With several processes jax's coordinator, which has a handler of its own, relays a SIGTERM of any of them, so that all stop
    after the same step. They stop at the time limit when the first process says so.
    """

    def __init__(self, time_limit: TimeLimit):
        self._time_limit, self._time_limit_step = time_limit, AgreedStep()
        self._stop = self._signalled = False
        self._before = {}

    def __enter__(self):
        if jax.process_count() == 1:
            self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def stop(self) -> bool:
        """Whether to save and stop. With several processes it changes only in `poll`."""
        if jax.process_count() == 1 and self._time_limit.is_over():
            self._stop = True
        return self._stop

    def poll(self, step: int) -> bool:
        """`stop`, after asking the other processes, if any. Every process must call it at every step."""
        self._time_limit.stepped()
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self._stop = True
        if self._time_limit_step.reached(step, self._time_limit.is_over):
            self._stop = True
        return self.stop

    def _handle(self, number, frame):
        if self._signalled:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._stop = self._signalled = True
        logging.info("%s: saving a checkpoint, then stopping (repeat to stop at once)", signal.Signals(number).name)
