"""A trace of a few steps, for TensorBoard's profiler."""

from pathlib import Path

import jax
from absl import logging

N_STEPS = 5


class Profiler:
    """Traces N_STEPS steps from `first_step` on into folder/plugins/profile; first_step None: no trace."""

    def __init__(self, folder: Path, first_step: int | None):
        self._folder = folder
        self._first_step = first_step
        self._stop_at: int | None = None  # while tracing

    def dispatched(self, step: int) -> None:
        """Call after dispatching each step."""
        if self._stop_at is not None and step >= self._stop_at:
            self.close()
        if step == self._first_step:
            try:
                jax.profiler.start_trace(self._folder)
            except RuntimeError as error:  # another trace is running: training matters more
                logging.warning("training.profile_step: no trace (%s)", error)
            else:
                self._stop_at = step + N_STEPS

    def close(self) -> None:
        """Write the trace if one is running, of fewer steps if training ends early."""
        if self._stop_at is not None:
            self._stop_at = None
            jax.profiler.stop_trace()
