"""Decisions of several processes, with threads in their place."""

import threading

import jax
import pytest

from mateconv_jax.errors import UserError
from mateconv_jax.runtime import agreement
from mateconv_jax.training import same_inputs


class Store:
    """jax's coordinator."""

    def __init__(self):
        self.values, self._changed = {}, threading.Condition()

    def key_value_set(self, key, value):
        with self._changed:
            assert key not in self.values
            self.values[key] = value
            self._changed.notify_all()

    def key_value_delete(self, key):
        with self._changed:
            del self.values[key]

    def blocking_key_value_get(self, key, timeout_ms):
        with self._changed:
            if not self._changed.wait_for(lambda: key in self.values, timeout_ms / 1000):
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: GetKeyValue() timed out")
            return self.values[key]


@pytest.fixture
def together(monkeypatch):
    """Runs a function in three processes; returns what it returned, or raised, in each."""
    store, here = Store(), threading.local()
    monkeypatch.setattr(agreement, "store", lambda: store)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(jax, "process_index", lambda: here.index)

    class Rounds(threading.local):
        def __init__(self):
            self.of = {}

        def __getitem__(self, name):
            return self.of.get(name, 0)

        def __setitem__(self, name, value):
            self.of[name] = value

    monkeypatch.setattr(agreement, "_rounds", Rounds())

    def run(function):
        results = {}
        store.values.clear()

        def process(index):
            here.index = index
            try:
                results[index] = function(index)
            except UserError as error:
                results[index] = str(error)

        threads = [threading.Thread(target=process, args=(index,), daemon=True) for index in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        return [results[index] for index in range(3)]

    run.store = store
    return run


def test_all_get_the_values_of_all_as_often_as_they_ask(together):
    def ask(index):
        return [agreement.gather("a", (index, time)) for time in range(50)] + [agreement.from_first("b", index)]

    expected = [[[index, time] for index in range(3)] for time in range(50)] + [0]
    assert together(ask) == [expected] * 3
    assert len(together.store.values) == 6  # of the last round of each


def test_alone_it_is_the_value():
    value = object()
    assert agreement.gather("a", value) == [value] and agreement.from_first("a", value) is value


def test_other_rows_in_one_process_are_an_error_in_all(together):
    assert together(lambda index: same_inputs.check_same_data("t", "v", "q")) == [None] * 3
    said = together(lambda index: same_inputs.check_same_data("t", "v2" if index == 2 else "v", None))
    assert said == ["data.val_data_path: process 2 has other rows than process 0 (expected the same data everywhere)"] * 3
