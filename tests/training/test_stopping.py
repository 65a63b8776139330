"""Being stopped, killed, or left without room: nothing is lost, and what goes on is what would have been."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mateconv_jax.data import loader
from mateconv_jax.errors import UserError
from mateconv_jax.training import loop
from mateconv_jax.training.checkpoints import Checkpoints
from mateconv_jax.training.preemption import RESUMABLE
from tests.training.processes import Training
from tests.training.runs import assert_equal_checkpoints, flags_of, losses_of, metrics_of, saved, steps_in, train

# ---- killed -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_loses_no_step(straight, tmp_path, kills):
    config, reference = straight
    rng = random.Random(kills)
    for i in range(kills):
        training = Training(flags_of(config, tmp_path / "out"), tmp_path / f"log{i}")
        # Mostly while it steps and saves: imports and compilation lose nothing.
        if rng.random() < 0.8:
            training.wait_for("train/loss", done_is_fine=True)
        time.sleep(rng.random() * 0.3)
        training.process.kill()
        training.process.join()
    Training(flags_of(config, tmp_path / "out"), tmp_path / "log").finish()
    for step in (1, 7, 14):
        assert_equal_checkpoints(tmp_path / "out", reference, step)
    assert losses_of(tmp_path / "out") == losses_of(reference)
    assert not list((tmp_path / "out" / "checkpoints").glob("*tmp*"))


# ---- signals ----------------------------------------------------------------------------------------------------------


def send_once(number=signal.SIGTERM):
    sent = []

    def send():
        if not sent:
            sent.append(True)
            os.kill(os.getpid(), number)

    return send


def before(send, function):
    def wrapped(*args, **kwargs):
        send()
        return function(*args, **kwargs)

    return wrapped


STOPPED = dict(max_steps=8, use_ema=True, save_interval=2, eval_interval=2)


@pytest.fixture(scope="module")
def not_stopped(base_tiny_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("not_stopped")
    train(base_tiny_config, folder, **STOPPED)
    return folder


@pytest.mark.parametrize(
    "moment",
    [*(pytest.param(moment, marks=pytest.mark.slow) for moment in ("set-up", "compilation", "evaluation", "step")), "save"],
)
def test_a_signal_at_any_moment_ends_in_a_finished_checkpoint(tiny_config, tmp_path, monkeypatch, not_stopped, moment):
    send, expected = send_once(), None
    if moment == "set-up":
        monkeypatch.setattr(loop, "open_data", before(send, loop.open_data))
        expected = 0
    elif moment == "compilation":
        monkeypatch.setattr(loop, "compile_step", before(send, loop.compile_step))
        expected = 0
    elif moment == "step":
        push = loop.Metrics.push
        monkeypatch.setattr(
            loop.Metrics, "push", lambda self, step, metrics: (send() if step == 5 else None, push(self, step, metrics))[1]
        )
        expected = 5
    elif moment == "evaluation":
        validation = loader.validation_batches
        counts = itertools.count()

        def batches(*args):
            for batch in validation(*args):
                yield batch
                if next(counts) == 2:
                    send()

        monkeypatch.setattr(loader, "validation_batches", batches)
    else:
        save = Checkpoints.save
        monkeypatch.setattr(
            Checkpoints, "save", lambda self, step, *rest: (save(self, step, *rest), send() if step == 4 else None)[0]
        )
        expected = 4
    assert train(tiny_config, tmp_path / "out", **STOPPED) == RESUMABLE
    if expected is not None:
        assert steps_in(tmp_path / "out")[-1] == expected
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    monkeypatch.undo()
    assert train(tiny_config, tmp_path / "out", **STOPPED) == 0
    assert_equal_checkpoints(tmp_path / "out", not_stopped, 8)
    assert losses_of(tmp_path / "out") == losses_of(not_stopped)


def test_a_second_signal_stops_at_once(straight, tmp_path):
    config, _ = straight
    flags = [*flags_of(config, tmp_path / "out"), "--config.training.max_steps=100000"]
    training = Training(flags, tmp_path / "log", stop_at=1)
    training.wait_for("SIGTERM: saving a checkpoint")
    os.kill(training.process.pid, signal.SIGTERM)
    training.finish(-signal.SIGTERM)


# ---- what cannot be read or written -------------------------------------------------------------------------------------


def test_a_corrupt_checkpoint_is_skipped_and_said_and_older_ones_are_tried(tiny_config, tmp_path):
    options = dict(max_steps=8, save_interval=2, keep_latest=9)
    train(tiny_config, tmp_path / "straight", **options)
    shutil.copytree(tmp_path / "straight", tmp_path / "out")
    broken = 0
    for step in (6, 8):
        for path in (tmp_path / "out" / "checkpoints" / str(step) / "state").rglob("*"):
            if path.is_file() and path.stat().st_size > 1000:
                os.truncate(path, path.stat().st_size // 2)
                broken += 1
    assert broken >= 2
    assert train(tiny_config, tmp_path / "out", **options) == 0
    log = (tmp_path / "out" / "train.log").read_text()
    assert "checkpoint skipped" in log and "step 8:" in log and "step 6:" in log and "start: step 4, resumed" in log
    assert steps_in(tmp_path / "out") == [2, 4, 6, 8] and (tmp_path / "out" / "unreadable" / "8").is_dir()
    assert_equal_checkpoints(tmp_path / "out", tmp_path / "straight", 8)
    for step in (2, 4, 6, 8):
        shutil.rmtree(tmp_path / "out" / "checkpoints" / str(step) / "state")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read \(step 8: .*step 2:"):
        train(tiny_config, tmp_path / "out", **options)


def mount(folder, *options):
    folder.mkdir(exist_ok=True)
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", folder]).returncode:
        pytest.skip("a file system cannot be mounted here")


@pytest.mark.slow
def test_a_full_disk_is_a_clear_error_and_earlier_checkpoints_stay(tiny_config, tmp_path):
    mount(tmp_path / "small", "size=2m")
    try:
        options = dict(max_steps=10, save_interval=1, keep_latest=30)
        with pytest.raises(UserError, match=r"training\.out_dir: .*No space left on device.*the same command continues"):
            train(tiny_config, tmp_path / "small" / "out", **options)
        there = steps_in(tmp_path / "small" / "out")
        assert there
        subprocess.run(["mount", "-o", "remount,size=200m", tmp_path / "small"], check=True)
        assert train(tiny_config, tmp_path / "small" / "out", **options) == 0
        log = (tmp_path / "small" / "out" / "train.log").read_text()
        assert f"start: step {there[-1]}, resumed" in log
    finally:
        subprocess.run(["umount", tmp_path / "small"], check=True)


def test_a_read_only_folder_is_a_clear_error(tiny_config, tmp_path):
    mount(tmp_path / "ro", "ro")
    try:
        with pytest.raises(UserError, match=r"training\.out_dir: cannot write to .*Read-only file system"):
            train(tiny_config, tmp_path / "ro" / "out")
    finally:
        subprocess.run(["umount", tmp_path / "ro"], check=True)


# ---- gradients that are not finite ------------------------------------------------------------------------------------------


def poisoned(monkeypatch, steps):
    """The loss of these steps is infinite."""
    compile_step = loop.compile_step

    def compile_poisoned(*args):
        step = compile_step(*args)

        def run(state, batch):
            if int(state.step) + 1 in steps:
                params = jax.tree.map(jnp.copy, state.params)
                broken = jax.tree.map(lambda p: p.at[(0,) * p.ndim].set(jnp.nan), state.params)
                after, metrics = step(state.replace(params=broken), batch)
                return after.replace(params=params), metrics
            return step(state, batch)

        return run

    monkeypatch.setattr(loop, "compile_step", compile_poisoned)


def test_bad_steps_are_left_out_and_said(tiny_config, tmp_path, monkeypatch):
    poisoned(monkeypatch, {3, 4})
    assert train(tiny_config, tmp_path / "out", max_steps=6) == 0
    log = (tmp_path / "out" / "train.log").read_text()
    assert "step 3: the gradient is not finite, the update is skipped (1 in a row); rows [" in log
    assert "step 4: the gradient is not finite, the update is skipped (2 in a row)" in log
    assert "largest norms: blocks.0.attention" in log and " nan" in log
    assert [m["bad_steps"] for m in metrics_of(tmp_path / "out") if "bad_steps" in m] == [0, 0, 1, 2, 0, 0]
    assert all(np.isfinite(p).all() for p in jax.tree.leaves(saved(tmp_path / "out", 6)[0]["params"]))


def test_too_many_bad_steps_end_the_run_with_the_parameters_from_before(tiny_config, tmp_path, monkeypatch):
    options = dict(max_steps=30, lr_scheduler="constant", warmup_steps=0)
    train(tiny_config, tmp_path / "good", **options | {"max_steps": 3})
    poisoned(monkeypatch, set(range(4, 31)))
    with pytest.raises(UserError, match=r"training\.max_bad_steps: 5 updates in a row .* holds the parameters of step 3"):
        train(tiny_config, tmp_path / "out", **options, max_bad_steps=5)
    state, good = saved(tmp_path / "out", steps_in(tmp_path / "out")[-1])[0], saved(tmp_path / "good", 3)[0]
    jax.tree.map(np.testing.assert_array_equal, state["params"], good["params"])


def test_the_rows_of_a_bad_step_are_those_it_read(tiny_config, tmp_path, monkeypatch):
    read = []
    original = loader.rows_at
    monkeypatch.setattr(loader, "rows_at", lambda *args: read.append(original(*args).tolist()) or original(*args))
    poisoned(monkeypatch, {2})
    train(tiny_config, tmp_path / "out", max_steps=3)
    log = (tmp_path / "out" / "train.log").read_text()
    [said] = [line for line in log.splitlines() if "step 2: the gradient is not finite" in line]
    rows = json.loads("[" + said.split("rows [")[1].split("]")[0] + "]")
    assert rows in read[:-1] and len(rows) == 8
