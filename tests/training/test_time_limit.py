"""Saves by the clock, and the end before a scheduler's."""

import itertools
import time
import types

import pytest

from mateconv_jax.training import loop, time_limit
from mateconv_jax.training.preemption import RESUMABLE
from mateconv_jax.training.time_limit import TimeLimit
from tests.training.runs import metrics_of, steps_in, train
from tests.training.test_devices import config, start_two  # noqa: F401


@pytest.fixture
def clock(monkeypatch):
    """Seconds, of which each step takes 60."""
    clock = types.SimpleNamespace(now=0.0)
    push = loop.Metrics.push

    def pushing(self, step, metrics):
        clock.now += 60
        return push(self, step, metrics)

    monkeypatch.setattr(loop.Metrics, "push", pushing)
    monkeypatch.setattr(time_limit, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(time_limit, "process_age", lambda: clock.now)
    return clock


def test_by_the_clock_a_run_saves_and_stops_in_time_for_its_save(tiny_config, tmp_path, clock, monkeypatch):
    took, begin = [], time.monotonic()
    monkeypatch.setattr(TimeLimit, "saved_in", lambda self, seconds: took.append(seconds))
    options = dict(save_interval=100, eval_interval=100, keep_latest=9, save_minutes=3, max_steps=10)
    # After step 7, 210 s are left: not enough for another step, two to agree in, and 60 s for the save.
    assert train(tiny_config, tmp_path / "out", max_hours=10.5 / 60, **options) == RESUMABLE
    assert steps_in(tmp_path / "out") == [3, 6, 7]
    assert "training.max_hours: 0.175 hours are over in 210 s" in (tmp_path / "out" / "train.log").read_text()
    assert train(tiny_config, tmp_path / "out", max_hours=100, **options) == 0
    assert steps_in(tmp_path / "out") == [3, 6, 7, 10]
    assert len(took) == 5 and 0 < min(took) and max(took) < time.monotonic() - begin


def test_a_slow_disk_is_given_more_time(monkeypatch):
    limit, age = TimeLimit(1), 0.0
    monkeypatch.setattr(time_limit, "process_age", lambda: age)
    over = []
    for age in (3539.0, 3541.0):  # 60 s for a first save  # noqa: B007
        over.append(limit.is_over())
    assert over == [False, True]
    limit = TimeLimit(1)
    limit.saved_in(100.0)
    limit.saved_in(10.0)
    over.clear()
    for age in (3399.0, 3401.0):  # noqa: B007
        over.append(limit.is_over())
    assert over == [False, True]


def test_the_age_of_the_process_counts_from_its_start():
    first = time_limit.process_age()
    time.sleep(0.1)
    assert 0.1 <= time_limit.process_age() - first < 5


@pytest.mark.slow
def test_two_processes_save_and_stop_by_the_clock_at_the_same_steps(config, tmp_path):  # noqa: F811
    flags = [f"--config.training.{flag}" for flag in (
        "max_steps=1000000", "save_interval=1000000", "eval_interval=1000000", "log_interval=1", "keep_latest=99",
        "save_minutes=0.01", "max_hours=0.01",
    )]  # fmt: skip
    begin = time.monotonic()
    processes = start_two(config, tmp_path / "a" / "out", flags)
    outputs = [process.finish(RESUMABLE) for process in processes]
    assert time.monotonic() - begin < 36
    steps = steps_in(tmp_path / "a" / "out")
    assert len(steps) > 4
    last = metrics_of(tmp_path / "a" / "out")[-1]["step"]
    assert steps[-1] == last and f"stopped at step {last} " in outputs[0]
    assert min(b - a for a, b in itertools.pairwise(steps[:-1])) > 2
