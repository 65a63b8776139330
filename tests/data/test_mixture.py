from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st

from mateconv_jax.data import loader, mixture
from mateconv_jax.data.mixture import PERIOD, MixedRows, Order, Part, PartOrder, Schedule

WEIGHTS = st.lists(st.floats(1e-4, 1e3), min_size=1, max_size=8)


def share(weights, i):
    return Fraction(weights[i]) / sum(map(Fraction, weights))


def counts_of(weights):
    return mixture.apportion([Fraction(weight) for weight in weights])


@settings(max_examples=25)
@given(weights=WEIGHTS)
@example(weights=[0.6, 0.3, 0.1])
@example(weights=[2**0.5, 1, 1 / 3])
@example(weights=[1, 1, 1])
def test_any_thousand_rows_hold_the_shares_to_one_row(weights):
    counts = counts_of(weights)
    if min(counts) == 0:
        return
    set_P, _ = Schedule(counts).at(np.arange(5 * PERIOD, 6 * PERIOD + 1000))
    for i in range(len(weights)):
        before = np.concatenate([[0], np.cumsum(set_P == i)])
        in_window = before[1000:] - before[:-1000]
        exact = 1000 * share(weights, i)
        assert exact // 1 <= in_window.min() and in_window.max() <= -(-exact // 1)  # in all 100,001 of them
        assert set(before[PERIOD:] - before[:-PERIOD]) == {counts[i]} and abs(counts[i] - PERIOD * share(weights, i)) < 1
        for length in (1, 2, 5, 32, 333, 999):
            off = before[length:] - before[:-length] - length * float(share(weights, i))
            assert np.abs(off).max() < 3


@settings(max_examples=25)
@given(counts=st.lists(st.integers(0, 50), min_size=1, max_size=9).filter(any))
def test_an_order_is_even_from_its_beginning(counts):
    order = mixture.spread(counts)
    assert np.bincount(order, minlength=len(counts)).tolist() == counts
    n = np.arange(1, len(order) + 1)
    for i, count in enumerate(counts):
        off = np.cumsum(order == i) - n * count / sum(counts)
        assert np.abs(off).max() < 1


@settings(max_examples=10)
@given(weights=WEIGHTS, place=st.integers(0, 3 * PERIOD))
def test_a_place_alone_says_how_many_rows_of_its_dataset_come_before(weights, place):
    counts = counts_of(weights)
    if min(counts) == 0:
        return
    schedule = Schedule(counts)
    before = schedule.before(place)
    assert sum(before) == place
    for at in range(place, place + 20):
        [number], [index] = schedule.at(np.array([at]))
        assert index == before[number]
        before[number] += 1


def test_the_shares_of_a_run_stay_what_they_were():
    """Runs that are resumed read on in this order: change it and they skip rows or read them twice."""
    set_B, index_B = Schedule([60_000, 30_000, 10_000]).at(np.arange(20))
    assert set_B.tolist() == [0, 1, 0, 0, 1, 0, 2, 0, 1, 0, 0, 1, 0, 0, 1, 0, 2, 0, 1, 0]
    assert index_B[-1] == 11
    thirds = Schedule(mixture.apportion([Fraction(1)] * 3))
    assert thirds.before(PERIOD) == [33_334, 33_333, 33_333] and thirds.before(1000) == [334, 333, 333]


def test_names_tell_datasets_apart():
    assert mixture.names(["data/wiki", "data/code/", "x/train.bin"]) == ["wiki", "code", "train"]
    assert mixture.names(["a/train", "b/train"]) == ["a-train", "b-train"]
    assert mixture.names(["/d/维基 1.2", "/d/c"]) == ["维基_1", "c"]
    assert mixture.names(["/a b", "/a_b"]) == ["a_b-1", "a_b-2"]


# ---- rows ----------------------------------------------------------------------------------------------------------


class NumberedRows:
    """Rows whose every token is the row's number and a constant. Counts its reads."""

    def __init__(self, n, plus, dtype=np.uint16, **fields):
        self.n, self.plus, self.dtype, self.fields, self.reads = n, plus, dtype, fields, 0

    def __len__(self):
        return self.n

    def read(self, indices):
        self.reads += 1
        assert (indices >= 0).all() and (indices < self.n).all()
        tokens = np.repeat(indices[:, None] + self.plus, 3, axis=1).astype(self.dtype)
        fields = {name: np.full((len(indices), 3), value) for name, value in self.fields.items()}
        return {"tokens": tokens, "length": np.full(len(indices), 3, np.int32)} | fields


def mixed(*rows, counts=(60_000, 40_000)):
    return MixedRows(
        [Part(f"set{i}", of_set, count, f"{i}") for i, (of_set, count) in enumerate(zip(rows, counts, strict=True))]
    )


def test_a_batch_of_a_mixture_is_one_read_of_each_dataset():
    texts, dialogues = NumberedRows(10, 100), NumberedRows(5, 200, np.uint32, learned=False, document_starts=True)
    rows = mixed(texts, dialogues)
    texts.reads = dialogues.reads = 0
    batch = rows.read(np.array([9, 14, 0, 10, 3]))
    assert (texts.reads, dialogues.reads) == (1, 1) and len(rows) == 15
    assert batch["tokens"][:, 0].tolist() == [109, 204, 100, 200, 103] and batch["length"].tolist() == [3] * 5
    of_texts = np.array([True, False, True, False, True])
    assert (batch["learned"] == of_texts[:, None]).all()  # texts learn everything
    assert (batch["document_starts"] == ~of_texts[:, None]).all()  # a row of texts is one document
    only_texts = rows.read(np.arange(3))  # the step is compiled for one kind of batch
    assert {name: x.dtype for name, x in only_texts.items()} == {name: x.dtype for name, x in batch.items()}


def numbers(order, rows, positions, seed=0, shuffle=True):
    return rows.read(order.rows_at(positions, seed, shuffle))["tokens"][:, 0].tolist()


def test_every_dataset_goes_through_its_own_epochs():
    rows = mixed(NumberedRows(30, 0), NumberedRows(30, 1000))
    order = Order((PartOrder("a", 60_000, 0, 30, salt=1), PartOrder("b", 40_000, 30, 30, salt=2)))
    read = numbers(order, rows, np.arange(100))
    a, b = [n for n in read if n < 1000], [n - 1000 for n in read if n >= 1000]
    assert (len(a), len(b)) == (60, 40)
    assert sorted(a[:30]) == sorted(a[30:]) == sorted(b[:30]) == list(range(30)) and a[:30] != a[30:]
    assert a[:30] != b[:30]  # as many rows, another order
    assert order.read_before(100) == [60, 40]
    plain = numbers(order, rows, np.arange(10), shuffle=False)
    assert [n for n in plain if n < 1000] == list(range(6)) and [n for n in plain if n >= 1000] == [1000 + i for i in range(4)]


def test_a_dataset_that_was_alone_goes_on_in_its_own_order():
    rows = mixed(NumberedRows(30, 0), NumberedRows(7, 1000))
    order = Order((PartOrder("a", 60_000, 0, 30, before=12), PartOrder("b", 40_000, 30, 7, salt=2)), since=12)
    read = [n for n in numbers(order, rows, 12 + np.arange(50), seed=3) if n < 1000]
    assert read == loader.rows_at(12 + np.arange(30), 30, 3, True).tolist()


def test_batches_of_a_mixture(monkeypatch):
    """Through the loader: the same rows in any batch size and in any number of processes."""
    rows = mixed(NumberedRows(30, 0), NumberedRows(7, 1000))
    order = Order((PartOrder("a", 60_000, 0, 30, salt=1), PartOrder("b", 40_000, 30, 7, salt=2)))

    def read(batch_size, start):
        return next(loader.training_batches(rows, batch_size, 5, True, start, 1, row_numbers=order.rows_at))["tokens"][:, 0]

    whole = read(24, 0)
    np.testing.assert_array_equal(np.concatenate([read(8, 0), read(8, 8), read(8, 16)]), whole)
    monkeypatch.setattr(loader.jax, "process_count", lambda: 2)
    parts = []
    for index in range(2):
        monkeypatch.setattr(loader.jax, "process_index", lambda index=index: index)
        parts.append(read(24, 0))
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_what_a_batch_is_made_of_in_words():
    order = Order((PartOrder("a", 60_000, 0, 30), PartOrder("b", 40_000, 30, 7)))
    assert order.describe(np.array([3, 31, 1])) == "rows of a [3, 1], of b [1]"
    with pytest.raises(AssertionError):
        Schedule([1, 2])
