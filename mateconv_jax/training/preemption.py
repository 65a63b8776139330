"""Requests to stop: SIGTERM from a scheduler, SIGINT from Ctrl-C, the time limit."""

import os
import signal
import threading
from typing import TYPE_CHECKING

from absl import logging

if TYPE_CHECKING:  # signals are handled while the libraries are still being imported, which takes seconds
    from mateconv_jax.runtime.notices import Notices
    from mateconv_jax.training.time_limit import TimeLimit

RESUMABLE = 75  # exit code: stopped early, the same command continues (EX_TEMPFAIL; schedulers requeue on it)


class Signals:
    """Within the block the first SIGTERM or SIGINT only requests a stop; a second one ends the process at once.

    Python runs the handler between two bytecode instructions: immediately in the loop, within 0.3 s during a compilation, and
    after the call returns during one into the device's runtime.

    A request to one of several processes stops all of them at the same call of `poll`. jax has a service for that, but it takes
    SIGTERM alone, misses one that comes before the first step of a resumed run, and counts steps that Orbax polls as well;
    distributed.initialize turns it off.
    """

    def __init__(self):
        self._requested = self._signalled = False
        self._notices: Notices | None = None
        self._time_limit: TimeLimit | None = None
        self._vote: Vote | None = None
        self._before = {}

    def __enter__(self):
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def connect(self, notices: "Notices", n_processes: int, time_limit: "TimeLimit") -> None:
        """Share requests with the other processes, and stop at the time limit, too."""
        self._time_limit = time_limit
        if n_processes > 1:
            self._notices, self._vote = notices, Vote(notices, n_processes)
            notices.on("stop", self._vote.called)
            notices.on("vote", self._vote.voted)
            if self._requested:
                notices.post("stop")

    def poll_step(self) -> bool:
        """`poll`, once after every step."""
        if self._time_limit is not None:
            self._time_limit.stepped()
        return self.poll()

    def poll(self) -> bool:
        """Whether to save and stop now. All processes call it at the same places, equally often."""
        if not self._requested and self._time_limit is not None and self._time_limit.is_over():
            self._request()
        return self._requested if self._vote is None else self._vote.poll()

    def _request(self) -> None:
        self._requested = True
        if self._notices is not None:
            self._notices.post("stop")

    def _handle(self, number, frame):
        if self._signalled:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._signalled = True
        self._request()
        logging.info("%s: saving a checkpoint, then stopping (repeat to stop at once)", signal.Signals(number).name)


class Vote:
    """All processes stop at the same call of `poll`: the next that none of them has made.

    When one is asked to stop, each tells how often it has polled, and does not poll again before it knows what the others told.
    """

    def __init__(self, notices: "Notices", n_processes: int):
        self._notices, self._n_processes = notices, n_processes
        self._polls, self._votes = 0, {}
        self._is_called, self._stop_at = False, None
        self._changed = threading.Condition()

    def poll(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._stop_at is not None or not self._is_called)
            self._polls += 1
            return self._stop_at is not None and self._polls >= self._stop_at

    def called(self, process: int, text: str) -> None:
        """A process was asked to stop."""
        with self._changed:
            if not self._is_called:
                self._is_called = True
                self._notices.post("vote", str(self._polls))

    def voted(self, process: int, text: str) -> None:
        """A process has polled that often."""
        self.called(process, text)
        with self._changed:
            self._votes[process] = int(text)
            if len(self._votes) == self._n_processes:
                self._stop_at = max(self._votes.values()) + 1
                self._changed.notify_all()
