import itertools
import threading
import time

import jax
import numpy as np
import pytest
from hypothesis import given, strategies as st

from mateconv_jax.data import loader
from mateconv_jax.data.dataset import open_dataset


class NumberedRows:
    """Rows whose every token is the row's number."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def read(self, indices):
        return {"tokens": np.repeat(indices[:, None], 3, axis=1), "length": np.full(len(indices), 3)}


def numbers(n_batches, rows=10, batch_size=4, seed=0, start_step=0, shuffle=True):
    batches = loader.training_batches(NumberedRows(rows), batch_size, seed, shuffle, start_step * batch_size, num_workers=2)
    return np.concatenate([batch["tokens"][:, 0] for batch in itertools.islice(batches, n_batches)])


def test_every_epoch_is_another_permutation():
    seen = numbers(10).reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in seen)
    assert len({tuple(epoch) for epoch in seen}) == 4


def test_without_shuffling_every_epoch_is_in_order():
    assert numbers(5, shuffle=False).tolist() == 2 * list(range(10))


@given(rows=st.integers(1, 200), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 2**20))
def test_an_epoch_holds_every_row_once(rows, seed, epoch):
    positions = epoch * rows + np.arange(rows)
    assert sorted(loader.rows_at(positions, rows, seed, shuffle=True)) == list(range(rows))


def test_the_order_stays_what_it_was():
    """Runs that are resumed read on in this order: change it and they read rows twice."""
    assert numbers(3).tolist() == [5, 8, 9, 7, 4, 2, 1, 0, 3, 6, 1, 2]


def test_the_seed_decides_the_order():
    assert (numbers(5) == numbers(5)).all()
    assert (numbers(5) != numbers(5, seed=1)).any()
    # Not the next epoch of the seed before.
    assert (numbers(5)[10:] != numbers(5, seed=1)[:10]).any()


@pytest.mark.parametrize("start_step", [1, 2, 7])
def test_starting_at_a_step_equals_having_read_up_to_it(start_step):
    np.testing.assert_array_equal(numbers(4, start_step=start_step), numbers(4 + start_step)[4 * start_step :])


def test_another_batch_size_goes_on_at_the_next_row():
    batches = loader.training_batches(NumberedRows(10), 8, 0, True, 12, num_workers=2)
    assert next(iter(batches))["tokens"][:, 0].tolist() == numbers(5)[12:20].tolist()


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_read_disjoint_parts_of_the_same_global_batch(monkeypatch, processes):
    whole = numbers(5).reshape(5, 4)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    parts = []
    for index in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        parts.append(numbers(5).reshape(5, 4 // processes))
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


@pytest.mark.parametrize("processes", [2, 4])
def test_a_row_has_its_place_in_its_micro_batch_whatever_the_processes(monkeypatch, processes):
    def micro_batches():
        batches = loader.training_batches(NumberedRows(30), 4, 0, True, 4, num_workers=1, accumulation_steps=3)
        return loader.micro_batches(next(iter(batches)), 3)["tokens"][..., 0]

    whole_AB = micro_batches()
    np.testing.assert_array_equal(whole_AB.ravel(), numbers(4, rows=30)[4:])
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    parts = []
    for index in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        parts.append(micro_batches())
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole_AB)


def test_num_workers_threads_read_ahead():
    class SlowRows(NumberedRows):
        def __init__(self, n):
            super().__init__(n)
            self.threads = set()

        def read(self, indices):
            time.sleep(0.02)
            self.threads.add(threading.get_ident())
            return super().read(indices)

    counts = []
    for num_workers in (1, 4):
        rows = SlowRows(10)
        list(itertools.islice(loader.training_batches(rows, 4, 0, True, 0, num_workers), 20))
        counts.append(len(rows.threads))
    assert counts[0] == 1 and counts[1] > 1


def test_validation_reads_in_order_and_fills_the_last_batch_with_empty_rows():
    batches = list(loader.validation_batches(NumberedRows(10), 4, max_batches=9))
    assert np.concatenate([b["tokens"][:, 0] for b in batches])[:10].tolist() == list(range(10))
    assert batches[-1]["length"].tolist() == [3, 3, 0, 0]
    assert len(list(loader.validation_batches(NumberedRows(10), 4, max_batches=2))) == 2


def test_processes_without_a_row_in_the_last_batch_get_empty_rows(monkeypatch, dataset_folder):
    rows = open_dataset(dataset_folder, "", 32).rows("validation")
    [whole] = loader.validation_batches(rows, 4 * len(rows), max_batches=1)
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    for index in range(4):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        [part] = loader.validation_batches(rows, 4 * len(rows), max_batches=1)
        for key in whole:
            assert part[key].dtype == whole[key].dtype
            np.testing.assert_array_equal(part[key], whole[key][index * len(rows) : (index + 1) * len(rows)])
