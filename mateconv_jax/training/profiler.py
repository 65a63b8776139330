"""A trace of a few steps, for TensorBoard's profiler."""

from pathlib import Path

import jax
from absl import logging

N_STEPS = 5


class Profiler:
    """Traces N_STEPS steps from `first_step` on into folder/plugins/profile; None: never."""

    def __init__(self, folder: Path, first_step: int | None):
        self._folder = folder
        self._first_step = first_step
        self._stop_at: int | None = None  # a step, while a trace is taken

    def dispatched(self, step: int) -> None:
        """To be called after each step was dispatched."""
        if self._stop_at is not None and step >= self._stop_at:
            self.close()
        if step == self._first_step:
            try:
                jax.profiler.start_trace(self._folder)
            except RuntimeError as error:  # someone else is tracing: training is worth more than a trace
                logging.warning("training.profile_step: no trace (%s)", error)
            else:
                self._stop_at = step + N_STEPS

    def close(self) -> None:
        """Write the trace, if one is running: also of fewer steps, where training ends early."""
        if self._stop_at is not None:
            self._stop_at = None
            jax.profiler.stop_trace()
