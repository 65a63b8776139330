"""Steps whose update was skipped."""

import dataclasses
import math
from collections.abc import Callable

from absl import logging

from mateconv_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class BadStep:
    """A step whose update was skipped: how many there are now in a row, and the gradient's norm by leaf."""

    step: int
    in_a_row: int
    loss: float
    leaf_norms: dict[str, float]

    def reason(self) -> str:
        finite = all(map(math.isfinite, (self.loss, *self.leaf_norms.values())))
        return f"the loss {self.loss:.4f} is a spike" if finite else "the gradient is not finite"

    def largest(self, n: int = 5) -> str:
        """The leaves with the largest norms, those that are not finite first."""
        order = sorted(self.leaf_norms.items(), key=lambda item: (math.isfinite(item[1]), -item[1]))
        return ", ".join(f"{name} {norm:.3g}" for name, norm in order[:n])


class SkippedSteps:
    """Says which they were, and ends a run in which too many follow each other."""

    def __init__(self, describe: Callable[[int], str], max_bad_steps: int):
        """describe: says of a step, counted from 0, what its batch was made of."""
        self._describe, self._max_bad_steps = describe, max_bad_steps

    def check(self, bad_step: BadStep | None, step: int, save: Callable[[], None]) -> None:
        """Take what Metrics found; None: the update was made.

        Args:
          step: the one that the run has come to since.
          save: writes a checkpoint of it.

        Raises:
          UserError: training.max_bad_steps in a row were skipped. A checkpoint is saved then.
        """
        if bad_step is None:
            return
        logging.warning(
            "step %d: %s, the update is skipped (%d in a row); %s; largest norms: %s",
            bad_step.step, bad_step.reason(), bad_step.in_a_row, self._describe(bad_step.step - 1), bad_step.largest(),
        )  # fmt: skip
        if bad_step.in_a_row >= self._max_bad_steps:
            save()
            raise UserError(
                f"training.max_bad_steps: {bad_step.in_a_row} steps in a row were skipped, the last because "
                f"{bad_step.reason()}; the parameters of step {bad_step.step - bad_step.in_a_row} are kept, in the "
                f"checkpoint of step {step} (expected a lower training.learning_rate, a longer warm-up, or other data)"
            )
