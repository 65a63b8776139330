import os

from mateconv_jax import cores


def test_the_cores_are_those_left_to_the_process():
    assert cores.usable() == len(os.sched_getaffinity(0))


def test_where_that_cannot_be_asked_they_are_all_of_the_machine(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores.usable() == os.cpu_count()
