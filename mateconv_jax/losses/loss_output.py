"""What a loss returns."""

from typing import NamedTuple

import jax


class LossOutput(NamedTuple):
    """Sums over a batch, fp32, not means: those of micro-batches and devices add up, so the split of a batch does not matter.

    A loss is a function `loss_fn(model, batch, key) -> LossOutput`. `batch` is a dict of arrays whose first dimension is B
    rows; `key` (B,) holds a random key per row, or is None in evaluation.

    Attributes:
      sum: reported as train/loss = sum / weight.
      weight: what the sums are divided by; for text, the number of targets. A step's gradient is that of the summed objective
        divided by the summed weight.
      objective: the sum that is minimised: `sum` and auxiliary terms.
      metrics: {name: sum}, reported as sum / weight; or {name: totals}, a tree of sums with a method `means(weight)` that
        returns {name: scalar}, for metrics that are not such a quotient.
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
