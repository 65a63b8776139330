"""Where a step's batch comes from.

A source is called with the step, counted from 0, and the current parameters, which it may use or not. What it returns is a pure
function of the two: so a run is resumed exactly. `describe(step)` says in words what the batch was made of.
"""

from collections.abc import Iterator

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mateconv_jax.data import loader
from mateconv_jax.data.dataset import Rows
from mateconv_jax.data.rows import Batch
from mateconv_jax.runtime import sharding
from mateconv_jax.training.setup import rows_per_step


class RowBatches:
    """Rows of a dataset, read ahead by threads: the parameters do not matter."""

    def __init__(self, config: ConfigDict, rows: Rows, mesh: Mesh):
        self._config, self._rows, self._mesh = config, rows, mesh
        self._read_ahead: Iterator[Batch] | None = None
        self._next_step = 0
        self._last: tuple[int, dict[str, jax.Array]] | None = None

    def __call__(self, step: int, params: nnx.State) -> dict[str, jax.Array]:
        """On the devices: arrays (A micro-batches, B rows, …), see data/rows.py. Steps in order are the fast case."""
        if self._last is None or self._last[0] != step:
            self._last = step, self._read(step)
        return self._last[1]

    def _read(self, step: int) -> dict[str, jax.Array]:
        training, data = self._config.training, self._config.data
        if self._read_ahead is None or step != self._next_step:
            self._read_ahead = loader.training_batches(
                self._rows, rows_per_step(training), training.seed, data.shuffle, step, data.num_workers
            )
        self._next_step = step + 1
        batch = loader.micro_batches(next(self._read_ahead), training.accumulation_steps)
        return sharding.to_devices(batch, self._mesh, rows_axis=1)

    def describe(self, step: int) -> str:
        training = self._config.training
        positions = step * rows_per_step(training) + np.arange(rows_per_step(training))
        rows = loader.rows_at(positions, len(self._rows), training.seed, self._config.data.shuffle)
        return f"rows {rows.tolist()}"
