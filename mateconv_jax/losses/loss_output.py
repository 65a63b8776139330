"""What a loss returns."""

from typing import NamedTuple

import jax


class LossOutput(NamedTuple):
    """Sums over a batch, fp32: those of micro-batches and devices add up, and a batch means the same however it is cut.

    A loss is a function `loss_fn(model, batch, key) -> LossOutput`. `batch` is a dict of arrays whose first dimension is B
    rows; `key` (B,) holds a random key for each row, or is None in evaluation.

    Attributes:
      sum: what is reported, train/loss, as sum / weight.
      weight: how much was learned from, for text the number of targets. The gradient of a step is that of the summed objective
        over the summed weight.
      objective: what is minimised, a sum as well: `sum` and whatever else is to be made small.
      metrics: {name: sum}, reported as sum / weight; or {name: totals}, a tree of sums with a method `means(weight)` that gives
        {name: scalar}, where a quotient is not what is wanted.
    """

    sum: jax.Array
    weight: jax.Array
    objective: jax.Array
    metrics: dict[str, jax.Array]

    def means(self, weight: jax.Array) -> dict[str, jax.Array]:
        """Scalars to report: train/loss and the metrics."""
        scalars = {"train/loss": self.sum / weight}
        for name, total in self.metrics.items():
            scalars |= total.means(weight) if hasattr(total, "means") else {name: total / weight}
        return scalars
