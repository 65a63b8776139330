"""Batches of rows. What a step reads is a pure function of (seed, step), whatever the number of processes."""

from collections.abc import Iterator

import grain
import jax
import numpy as np

from mateconv_jax.data.dataset import Rows

Batch = dict[str, np.ndarray]  # tokens (B, seq_len + 1), length (B,)


def training_batches(rows: Rows, batch_size: int, seed: int, start_step: int, num_workers: int) -> Iterator[Batch]:
    """This process's part of every global batch from `start_step` on, without end.

    Every epoch is another permutation of the rows, by seed; a batch may span two epochs.

    Args:
      rows: the training split.
      batch_size: rows of a global batch.
      num_workers: threads that read ahead.
    """
    # The pipeline carries row numbers; a batch is one read. Row by row through Grain would be 4,000 rows/s instead of
    # 33,000.
    part = _this_process(batch_size)
    indices = grain.MapDataset.range(len(rows)).seed(seed).shuffle().repeat().batch(batch_size)
    batches = indices.map(lambda index_B: rows.read(index_B[part]))
    iterator = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=num_workers, prefetch_buffer_size=2 * num_workers)))
    iterator.set_state({"next_index": start_step})
    return iterator


def validation_batches(rows: Rows, batch_size: int, max_batches: int) -> Iterator[Batch]:
    """This process's part of the first `max_batches` batches, in order; the last is filled up with rows of length 0."""
    for start in range(0, min(len(rows), max_batches * batch_size), batch_size):
        batch = rows.read(np.arange(start, min(start + batch_size, len(rows))))
        missing = batch_size - len(batch["length"])
        filled = {key: np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) for key, x in batch.items()}
        yield {key: x[_this_process(batch_size)] for key, x in filled.items()}


def _this_process(batch_size: int) -> slice:
    share = batch_size // jax.process_count()
    return slice(jax.process_index() * share, (jax.process_index() + 1) * share)
