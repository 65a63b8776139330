"""Being asked to stop: SIGTERM from a scheduler, SIGINT from Ctrl-C."""

import os
import signal

from absl import logging

RESUMABLE = 75  # exit code: stopped before the end, give the same command to go on (EX_TEMPFAIL; schedulers requeue on it)


class Signals:
    """Inside the block the first SIGTERM or SIGINT sets `stop` and no more; a second one ends the process at once.

    Python runs the handler between two of its instructions: at once in the loop, within 0.3 s of a compilation, and after a
    call into the device's runtime returns.
    """

    def __init__(self):
        self.stop = False

    def __enter__(self):
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if self.stop:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.stop = True
        logging.info("%s: saving a checkpoint, then stopping (once more stops at once, without)", signal.Signals(number).name)
