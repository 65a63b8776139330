"""The loss on held-out rows."""

import collections
import dataclasses
import math
import sys
from collections.abc import Callable, Iterable

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mateconv_jax.data import loader
from mateconv_jax.data.dataset import Rows
from mateconv_jax.data.tokenizer.token_bytes import target_bytes
from mateconv_jax.runtime import sharding

LAG = 4  # batches dispatched but not yet read: the device always has work, but holds few batches


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What was scored.

    Attributes:
      rows: number of rows.
      tokens: number of targets; for another loss, what it divides its sum by.
      bytes: of the text that the targets encode; 0 where that has no meaning.
      nats: {name of the weights: summed cross-entropy, or other loss}.
      sums: {name of the weights: {metric: sum}}, those of LossOutput.metrics that are plain sums.
    """

    rows: int
    tokens: int
    bytes: int
    nats: dict[str, float]
    sums: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

    def loss(self, name: str) -> float:
        """Nats per token."""
        return self.nats[name] / self.tokens if self.tokens else math.nan

    def metrics(self, name: str) -> dict[str, float]:
        return {metric: total / self.tokens if self.tokens else math.nan for metric, total in self.sums.get(name, {}).items()}

    def bits_per_byte(self, name: str) -> float:
        """Nats of all targets including control tokens, in bits, per byte of text; NaN without text."""
        return self.nats[name] / math.log(2) / self.bytes if self.bytes else math.nan


class Evaluator:
    """Scores weights of one model on the same rows, in order; the last batch is padded with rows of length 0."""

    def __init__(
        self,
        eval_step: Callable,
        rows: Rows,
        bytes_per_token_V: np.ndarray | None,
        batch_size: int,
        max_batches: int | None,
        mesh: Mesh,
    ):
        """Of one model and one set of rows.

        Args:
          eval_step: see step.make_eval_step.
          bytes_per_token_V: see token_bytes; None: bytes are not counted.
          batch_size: divisible by the number of devices.
          max_batches: None: all rows.
        """
        self._eval_step, self._rows, self._bytes_per_token_V, self._mesh = eval_step, rows, bytes_per_token_V, mesh
        self._batch_size = batch_size
        self._n_batches = min(-(-len(rows) // batch_size), max_batches or sys.maxsize)

    def __call__(
        self,
        weights: dict[str, nnx.State],
        should_stop: Callable[[], bool] = lambda: False,
        progress: Callable[[Iterable, int], Iterable] = lambda batches, n: batches,
    ) -> Evaluation | None:
        """Score {name: parameters}, which are on the mesh. None if `should_stop` became true before the end.

        Args:
          progress: wraps the iteration over n batches, to show its progress.
        """
        totals = {name: (np.float64(0), np.float64(0), {}) for name in weights}  # a sum, a weight, {metric: sum}
        n_bytes = 0
        pending = collections.deque()

        def read_oldest():
            for name, sums in jax.device_get(pending.popleft()).items():
                total, weight, metrics = totals[name]
                metrics = {metric: metrics.get(metric, 0.0) + np.float64(x) for metric, x in sums[2].items()}
                totals[name] = total + np.float64(sums[0]), weight + np.float64(sums[1]), metrics

        batches = loader.validation_batches(self._rows, self._batch_size, self._n_batches)
        for batch in progress(batches, self._n_batches):
            if should_stop():
                return None
            if self._bytes_per_token_V is not None:
                n_bytes += target_bytes(self._bytes_per_token_V, batch)
            on_devices = sharding.to_devices(batch, self._mesh)
            pending.append({name: self._eval_step(params, on_devices) for name, params in weights.items()})
            if len(pending) > LAG:
                read_oldest()
        while pending:
            read_oldest()
        n_bytes = int(np.sum(multihost_utils.process_allgather(np.int64(n_bytes))))  # each process read its rows
        n_tokens = int(next(iter(totals.values()))[1])
        n_rows = min(len(self._rows), self._n_batches * self._batch_size)
        nats = {name: float(total) for name, (total, _, _) in totals.items()}
        metrics = {name: jax.tree.map(float, sums) for name, (_, _, sums) in totals.items()}
        return Evaluation(n_rows, n_tokens, n_bytes, nats, metrics)
