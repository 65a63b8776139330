"""Batches of rows. What a batch holds is a pure function of (seed, its first row), whatever the number of processes."""

import functools
from collections.abc import Callable, Iterator

import grain
import jax
import numpy as np

from mateconv_jax.data.dataset import Rows
from mateconv_jax.data.rows import Batch

# What is read ahead at least: 100 ms of the 20 M tokens/s that 8 H100 may train, in rows of 512 tokens, where other processes
# on a busy machine held the threads up for 40; but no more than so many small batches.
ROWS_AHEAD, BATCHES_AHEAD = 4096, 16


def training_batches(
    rows: Rows, batch_size: int, seed: int, shuffle: bool, start_row: int, num_workers: int, accumulation_steps: int = 1,
    row_numbers: Callable[[np.ndarray, int, bool], np.ndarray] | None = None,
) -> Iterator[Batch]:  # fmt: skip
    """This process's part of every step's global batch, without end.

    Args:
      rows: at least one.
      batch_size: rows of a micro-batch over all devices, divisible by the number of processes.
      shuffle: every epoch is another permutation of the rows, by seed; otherwise every epoch reads them in order.
      start_row: the first row of the first batch, a place in the endless sequence of epochs.
      num_workers: threads that read ahead.
      accumulation_steps: micro-batches of a step.
      row_numbers: (positions, seed, shuffle) -> which rows stand there, such as mixture.Order.rows_at; None: as `rows_at`.

    Returns:
      Batches of accumulation_steps * batch_size / processes rows, see data/rows.py.
    """
    # Of every micro-batch its share, not of the step's rows one block: a row's place in its micro-batch decides what dropout
    # drops, and must not depend on the number of processes.
    part = (np.arange(accumulation_steps)[:, None] * batch_size + _this_process(batch_size)).ravel()
    rows_per_step = accumulation_steps * batch_size

    def read(step: int) -> Batch:
        positions = start_row + step * rows_per_step + part
        if row_numbers is None:
            return rows.read(rows_at(positions, len(rows), seed, shuffle))
        return rows.read(row_numbers(positions, seed, shuffle))

    # A step is one element and one read: Grain's own shuffle, repeat and batch of row numbers take 400 us a batch of 32 rows,
    # rows_at 110.
    batches = grain.MapDataset.range(np.iinfo(np.int64).max).map(read)
    ahead = max(2 * num_workers, min(BATCHES_AHEAD, ROWS_AHEAD // len(part)))
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=num_workers, prefetch_buffer_size=ahead)))


def rows_at(position_B: np.ndarray, n_rows: int, seed: int, shuffle: bool) -> np.ndarray:
    """Which rows (B,) int64 stand at positions of the endless sequence of epochs; shuffled, each is its own permutation."""
    if not shuffle:
        return position_B % n_rows
    epoch_B, place_B = (part.tolist() for part in np.divmod(position_B, n_rows))
    # Hashed, not seed + epoch: the second epoch would be the first of the next seed's run.
    seeds = {epoch: hashed(seed, epoch) for epoch in set(epoch_B)}
    shuffled = grain.experimental.index_shuffle
    return np.array(
        [shuffled(place, n_rows - 1, seeds[epoch], 4) for epoch, place in zip(epoch_B, place_B, strict=True)], np.int64
    )


@functools.lru_cache(maxsize=1024)
def hashed(seed: int, *numbers: int) -> int:
    """A seed of 32 bits for each number."""
    return int(np.random.SeedSequence((seed, *numbers)).generate_state(1)[0])


def validation_batches(rows: Rows, batch_size: int, max_batches: int, first_row: int = 0) -> Iterator[Batch]:
    """This process's part of the first `max_batches` batches, from `first_row` on, in order; the last is filled up with rows of
    length 0.
    """
    part = _this_process(batch_size)
    for start in range(first_row, min(len(rows), max_batches * batch_size), batch_size):
        numbers = start + part
        batch = rows.read(numbers[numbers < len(rows)])
        missing = len(part) - len(batch["length"])
        yield {key: np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) for key, x in batch.items()}


def _this_process(batch_size: int) -> np.ndarray:
    share = batch_size // jax.process_count()
    return jax.process_index() * share + np.arange(share)


def micro_batches(batch: Batch, accumulation_steps: int) -> Batch:
    """A step's rows as (A, B, …)."""
    return {key: x.reshape(accumulation_steps, -1, *x.shape[1:]) for key, x in batch.items()}
