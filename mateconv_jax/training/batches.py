"""Where a step's batch comes from.

A source is called with the step, counted from 0, and the current parameters, which it may ignore. What it returns is a pure
function of the two, so a run resumes exactly.
"""

from collections.abc import Iterator
from typing import Protocol

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mateconv_jax.data import loader
from mateconv_jax.data.dataset import Rows
from mateconv_jax.data.mixture import Order
from mateconv_jax.data.rows import Batch
from mateconv_jax.runtime import sharding
from mateconv_jax.training.batch_shape import BatchShape, Position


class Source(Protocol):
    def __call__(self, step: int, params: nnx.State) -> dict[str, jax.Array] | None:
        """Arrays (A micro-batches, B rows, …) on the devices; None: the run was asked to stop before they were there."""
        ...

    def metrics(self, step: int) -> dict[str, float]:
        """What is known of the batch of that step, the last that was asked for, without the model's training step."""
        ...

    def rows_before(self, step: int) -> int:
        """Rows of the dataset that are read before a step's batch."""
        ...

    def describe(self, step: int) -> str:
        """What the batch is made of, in words."""
        ...


class RowBatches:
    """Rows of a dataset or a mixture, read ahead by threads; the parameters are ignored."""

    def __init__(
        self, rows: Rows, shape: BatchShape, seed: int, shuffle: bool, num_workers: int, mesh: Mesh, start: Position,
        order: Order | None = None,
    ):  # fmt: skip
        """
        Args:
          seed, shuffle, num_workers: see loader.training_batches.
          start: from where on steps are of this shape.
          order: of a mixture's rows; None: that of loader.rows_at.
        """
        self._rows, self._shape, self._mesh, self._start, self._order = rows, shape, mesh, start, order
        self._seed, self._shuffle, self._num_workers = seed, shuffle, num_workers
        self._read_ahead: Iterator[Batch] | None = None
        self._next_step = 0
        self._last: tuple[int, dict[str, jax.Array]] | None = None

    def __call__(self, step: int, params: nnx.State) -> dict[str, jax.Array]:
        """Arrays (A micro-batches, B rows, …) on the devices, see data/rows.py. Fast when steps come in order."""
        if self._last is None or self._last[0] != step:
            self._last = step, self._read(step)
        return self._last[1]

    def metrics(self, step: int) -> dict[str, float]:
        return {}

    def _read(self, step: int) -> dict[str, jax.Array]:
        if self._read_ahead is None or step != self._next_step:
            self._read_ahead = loader.training_batches(
                self._rows, self._shape.batch_size, self._seed, self._shuffle, self.rows_before(step), self._num_workers,
                self._shape.accumulation_steps, None if self._order is None else self._order.rows_at,
            )  # fmt: skip
        self._next_step = step + 1
        batch = loader.micro_batches(next(self._read_ahead), self._shape.accumulation_steps)
        return sharding.to_devices(batch, self._mesh, rows_axis=1)

    def rows_before(self, step: int) -> int:
        """Rows that are read before a step's batch."""
        return self._start.rows + (step - self._start.step) * self._shape.rows

    def describe(self, step: int) -> str:
        positions = self.rows_before(step) + np.arange(self._shape.rows)
        if self._order is not None:
            return self._order.describe(self._order.rows_at(positions, self._seed, self._shuffle))
        return f"rows {loader.rows_at(positions, len(self._rows), self._seed, self._shuffle).tolist()}"
