"""Training speed: tokens per second, share of time spent waiting for input, peak memory."""

import contextlib
import resource
import sys
import time
from collections.abc import Generator

import jax

from mateconv_jax.runtime import device_memory


class Throughput:
    """Measures from one logged step to the next, without what is not training.

    Args:
      tokens_per_step: over all devices.
      mfu_per_token: the share of all devices' peak FLOP/s that one token per second uses; None: the peak is unknown.
    """

    def __init__(self, tokens_per_step: int, mfu_per_token: float | None):
        self._tokens_per_step = tokens_per_step
        self._mfu_per_token = mfu_per_token
        self._step: int | None = None  # the window starts at the end of this step,
        self._start = 0.0  # at this time, moved forward by what was not training
        self._waited = 0.0  # seconds in the window

    def measure(self, step: int) -> dict[str, float]:
        """Call at the end of `step`. Since the last call: tokens/s, step_time_s, input_wait (share of the time), memory_gb and,
        if the peak is known, mfu. Empty at the first call.
        """
        now = time.perf_counter()
        scalars = {}
        if self._step is not None:
            elapsed = now - self._start
            step_time = elapsed / (step - self._step)
            scalars = {"tokens/s": self._tokens_per_step / step_time, "step_time_s": step_time}
            scalars |= {"input_wait": self._waited / elapsed, "memory_gb": _peak_memory() / 1e9}
            if self._mfu_per_token is not None:
                scalars["mfu"] = scalars["tokens/s"] * self._mfu_per_token
        self._step, self._start, self._waited = step, now, 0.0
        return scalars

    @contextlib.contextmanager
    def waiting_for_input(self) -> Generator[None]:
        """The time inside counts as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def not_training(self) -> Generator[None]:
        """The time inside does not count."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start


def _peak_memory() -> int:
    """Peak bytes in use on the fullest device of this process; on the CPU, of the process."""
    peaks = [device_memory.peak(device) for device in jax.local_devices()]
    known = [peak for peak in peaks if peak is not None]
    if known:
        return max(known)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # macOS says bytes
