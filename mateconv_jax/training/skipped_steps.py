"""Steps whose update is skipped: their gradient is not finite, or their loss a spike."""

import dataclasses
import math
from collections.abc import Callable

from absl import logging

from mateconv_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class BadStep:
    """A step whose update was skipped.

    Attributes:
      in_a_row: consecutive skipped updates, this one included.
      leaf_norms: {name of the parameter: norm of its gradient}.
    """

    step: int
    in_a_row: int
    loss: float
    leaf_norms: dict[str, float]

    def reason(self) -> str:
        finite = all(map(math.isfinite, (self.loss, *self.leaf_norms.values())))
        return f"the loss {self.loss:.4f} is a spike" if finite else "the gradient is not finite"

    def largest(self, n: int = 5) -> str:
        """The n parameters with the largest gradient norms, non-finite ones first."""
        order = sorted(self.leaf_norms.items(), key=lambda item: (math.isfinite(item[1]), -item[1]))
        return ", ".join(f"{name} {norm:.3g}" for name, norm in order[:n])


class SkippedSteps:
    """Logs skipped updates and ends a run with too many in a row."""

    def __init__(self, describe: Callable[[int], str], max_bad_steps: int):
        """describe: says what the batch of a step, counted from 0, was made of."""
        self._describe, self._max_bad_steps = describe, max_bad_steps

    def check(self, bad_step: BadStep | None, step: int, save: Callable[[], None]) -> None:
        """Log a skipped update; None: the update was applied.

        Args:
          step: the run's current step.
          save: writes a checkpoint of it.

        Raises:
          UserError: training.max_bad_steps updates in a row were skipped. A checkpoint is saved first.
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
                f"training.max_bad_steps: {bad_step.in_a_row} updates in a row were skipped, the last because "
                f"{bad_step.reason()}; the checkpoint of step {step} holds the parameters of step "
                f"{bad_step.step - bad_step.in_a_row} (try a lower training.learning_rate, a longer warm-up, or other data)"
            )
