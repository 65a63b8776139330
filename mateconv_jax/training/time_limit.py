"""What a run does by the clock: saves every so often, and ends before a scheduler kills it."""

import math
import os
import time
from pathlib import Path

from absl import logging

from mateconv_jax.runtime.agreement import AgreedStep


class TimeLimit:
    """training.max_hours, counted from the start of the process, less the time that the last checkpoint may take."""

    # Until one has been written: 430 MB took 0.45 to 0.8 s on a local disk, a shared one may take 100 times as long.
    FIRST_SAVE = 60.0  # seconds
    SHARE = 0.1  # of a shorter limit

    def __init__(self, max_hours: float | None):
        """max_hours: None: no limit."""
        self._seconds = math.inf if max_hours is None else 3600 * max_hours
        self._save, self._step = min(self.FIRST_SAVE, self.SHARE * self._seconds), 0.0
        self._last_step: float | None = None
        self._said = False

    def saved_in(self, seconds: float) -> None:
        """A checkpoint took so long, from the loop's call to the disk."""
        self._save = max(self._save, 2 * seconds)  # twice: disks that others use vary

    def stepped(self) -> None:
        """A step is done; evaluations and samples count as part of theirs."""
        now = time.monotonic()
        if self._last_step is not None:
            self._step = max(self._step, now - self._last_step)
        self._last_step = now

    def is_over(self) -> bool:
        """Whether to stop now, while there is still time for the steps that processes take to agree, another, and the save."""
        if math.isinf(self._seconds):
            return False
        if process_age() + self._save + (1 + AgreedStep.AHEAD) * self._step < self._seconds:
            return False
        if not self._said:
            logging.info(
                "training.max_hours: %.3g hours are over in %.0f s: saving a checkpoint, then stopping",
                self._seconds / 3600, max(0.0, self._seconds - process_age()),
            )  # fmt: skip
        self._said = True
        return True


class SaveTimer:
    """training.save_minutes: says when the last checkpoint is that old."""

    def __init__(self, minutes: float | None):
        """minutes: None: never."""
        self._seconds = None if minutes is None else 60 * minutes
        self._agreed = AgreedStep()
        self.restart()

    def restart(self) -> None:
        """A checkpoint has been handed over."""
        self._since = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Every process asks once after the same steps, and gets the same answer."""
        seconds = self._seconds
        return seconds is not None and self._agreed.reached(step, lambda: time.monotonic() - self._since >= seconds)


_IMPORTED = time.monotonic()


def process_age() -> float:
    """Seconds since this process started: imports and joining the other processes count, but not on macOS."""
    try:
        stat = Path("/proc/self/stat").read_text(encoding="utf-8")
    except OSError:
        return time.monotonic() - _IMPORTED
    fields = stat.rpartition(")")[2].split()  # from the third field on; see proc(5)
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
