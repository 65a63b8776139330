"""Stopping, being stopped, and going on: nothing is lost, and nothing is another than it would have been."""

import copy
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from mateconv_jax import config as config_lib
from mateconv_jax.data import input_pipeline
from mateconv_jax.errors import UserError
from mateconv_jax.training import loop
from mateconv_jax.training.checkpoints import Checkpoints, Progress
from mateconv_jax.training.signals import RESUMABLE
from tests.training.test_loop import losses_of, metrics_of

# Six minutes of real trainings, stopped and killed. The fast tier has test_loop.py's stop and resume.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def train(config, out_dir=None, **changes):
    config = copy.deepcopy(config)
    config.training.update(changes | ({"out_dir": str(out_dir)} if out_dir else {}))
    return loop.train(config_lib.resolve(config))


def saved(folder, step):
    """Everything in a checkpoint, as it lies on the disk."""
    path = Path(folder).absolute() / "checkpoints" / str(step)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        state = checkpointer.restore(path / "state")
    progress = json.loads((path / "progress" / "metadata").read_text())
    return state, progress


def assert_equal_checkpoints(a, b, step):
    (state_a, progress_a), (state_b, progress_b) = saved(a, step), saved(b, step)
    assert jax.tree.structure(state_a) == jax.tree.structure(state_b)
    jax.tree.map(np.testing.assert_array_equal, state_a, state_b)
    assert progress_a == progress_b


def steps_in(folder):
    return sorted(int(path.name) for path in (Path(folder) / "checkpoints").iterdir() if path.name.isdigit())


# ---- exact, in processes of their own ---------------------------------------------------------------------------------


def command(config, out_dir, **changes):
    """The command line that trains as tiny_config does, with everything on that a resume could miss."""
    flags = {f"model.{key}": value for key, value in config.model.items() if value is not None}
    flags |= {f"data.{key}": value for key, value in config.data.items() if value is not None}
    options = dict(
        out_dir=out_dir, batch_size=16, accumulation_steps=2, max_steps=14, learning_rate=1e-2, dtype="float16", use_ema=True,
        ema_decay=0.9, optimizer_type="muon", early_stopping=True, patience=9, log_interval=1, eval_interval=3, eval_iters=2,
        save_interval=5, keep_latest=9,
    )  # fmt: skip
    flags |= {"model.dropout": 0.1, "model.attention": "xla"}
    flags |= {f"training.{key}": value for key, value in (options | changes).items()}
    overrides = [f"--config.{key}={value}" for key, value in flags.items()]
    return [sys.executable, "-m", "mateconv_jax.train", f"--config={ROOT / 'configs' / 'base.py'}", *overrides]


def run(arguments):
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


@pytest.fixture(scope="module")
def straight(dataset_folder, tmp_path_factory):
    """14 steps in one process, over the end of an epoch: the dataset has fewer than 14 x 32 rows."""
    config = config_lib.default_config()
    config.model.update(dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=400, max_seq_len=64))
    config.data.update(dict(train_data_path=str(dataset_folder), seq_len=32))
    folder = tmp_path_factory.mktemp("straight") / "out"
    result = run(command(config, folder))
    epochs = float(next(line for line in result.stderr.splitlines() if " epochs in 14 steps" in line).split(",")[1].split()[0])
    assert epochs > 1.1
    return config, folder


def test_going_on_in_a_new_process_equals_going_straight_to_the_bit(straight, tmp_path):
    config, folder = straight
    for stop in (4, 14):
        # The schedule is that of 14 steps; a signal ends the process after `stop`.
        code = (
            "import sys, os, signal; from mateconv_jax.training import metrics; push = metrics.Metrics.push\n"
            f"def stopping(self, step, m):\n    if step == {stop}: os.kill(os.getpid(), signal.SIGTERM)\n    return push(self, step, m)\n"
            "metrics.Metrics.push = stopping\n"
            "from mateconv_jax import train; from mateconv_jax.errors import exit_code\n"
            "sys.exit(exit_code(train.main, sys.argv))"
        )
        arguments = [sys.executable, "-c", code, *command(config, tmp_path / "out")[3:]]
        result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert result.returncode == (0 if stop == 14 else RESUMABLE), result.stderr[-3000:]
        assert steps_in(tmp_path / "out")[-1] == stop
    for step in (5, 10, 14):
        assert_equal_checkpoints(tmp_path / "out", folder, step)
    assert losses_of(tmp_path / "out") == losses_of(folder)
    state, progress = saved(folder, 14)
    assert progress["best_step"] and state["loss_scale"]["scale"] > 1


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_loses_no_step(straight, tmp_path, kills):
    config, folder = straight
    rng, arguments = random.Random(kills), command(config, tmp_path / "out", save_interval=1)
    reference = command(config, tmp_path / "reference", save_interval=1)
    run(reference)
    for _ in range(kills):
        process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        # Mostly while it steps and saves: imports and compilation are long and lose nothing.
        for line in process.stderr:
            if "[" in line and "train/loss" in line and rng.random() < 0.4:
                break
        time.sleep(rng.random() * 0.2)
        process.kill()
        process.communicate()
    run(arguments)
    assert_equal_checkpoints(tmp_path / "out", tmp_path / "reference", 14)
    assert losses_of(tmp_path / "out") == losses_of(tmp_path / "reference")
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


@pytest.mark.parametrize("moment", ["set-up", "compilation", "step", "evaluation", "save"])
def test_a_signal_at_any_moment_ends_in_a_finished_checkpoint(tiny_config, tmp_path, monkeypatch, moment):
    options = dict(max_steps=8, use_ema=True, save_interval=2, eval_interval=2)
    train(tiny_config, tmp_path / "straight", **options)
    send, expected = send_once(), None
    if moment == "set-up":
        monkeypatch.setattr(loop, "open_data", before(send, loop.open_data))
        expected = 0
    elif moment == "compilation":
        make = loop.make_train_step

        def compiling(*args):
            step = make(*args)
            return lambda state, batch: (send(), step(state, batch))[1]

        monkeypatch.setattr(loop, "make_train_step", compiling)
        expected = 1
    elif moment == "step":
        push = loop.Metrics.push
        monkeypatch.setattr(
            loop.Metrics, "push", lambda self, step, metrics: (send() if step == 5 else None, push(self, step, metrics))[1]
        )
        expected = 5
    elif moment == "evaluation":
        validation = input_pipeline.validation_batches
        counts = itertools.count()

        def batches(*args):
            for batch in validation(*args):
                yield batch
                if next(counts) == 2:
                    send()

        monkeypatch.setattr(input_pipeline, "validation_batches", batches)
    else:
        save = Checkpoints.save
        monkeypatch.setattr(
            Checkpoints, "save", lambda self, step, *rest: (save(self, step, *rest), send() if step == 4 else None)[0]
        )
        expected = 4
    assert train(tiny_config, tmp_path / "out", **options) == RESUMABLE
    if expected is not None:
        assert steps_in(tmp_path / "out")[-1] == expected
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    monkeypatch.undo()
    assert train(tiny_config, tmp_path / "out", **options) == 0
    assert_equal_checkpoints(tmp_path / "out", tmp_path / "straight", 8)
    assert losses_of(tmp_path / "out") == losses_of(tmp_path / "straight")


def test_a_second_signal_stops_at_once(straight, tmp_path):
    config, _ = straight
    process = subprocess.Popen(
        command(config, tmp_path / "out", max_steps=100_000), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    for line in process.stderr:
        if "model:" in line:
            break
    process.send_signal(signal.SIGINT)  # it compiles now, for seconds
    for line in process.stderr:
        if "SIGINT: saving a checkpoint" in line:
            break
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT


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


def test_a_full_disk_is_a_clear_error_and_earlier_checkpoints_stay(tiny_config, tmp_path):
    mount(tmp_path / "small", "size=3m")
    try:
        options = dict(max_steps=60, save_interval=1, keep_latest=60)
        with pytest.raises(UserError, match=r"training\.out_dir: .*No space left on device.*the same command goes on"):
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


# ---- where a run starts ---------------------------------------------------------------------------------------------------


def test_the_order_of_precedence(tiny_config, tmp_path):
    train(tiny_config, tmp_path / "a", max_steps=4, save_interval=2)
    go_on = dict(max_steps=4, resume_from=str(tmp_path / "a" / "checkpoints" / "2"))
    train(tiny_config, tmp_path / "b", **go_on)
    assert "start: step 2 of" in (tmp_path / "b" / "train.log").read_text()
    assert_equal_checkpoints(tmp_path / "a", tmp_path / "b", 4)
    train(tiny_config, tmp_path / "b", **go_on | {"max_steps": 5})  # its own checkpoint goes first
    assert "start: step 4, resumed" in (tmp_path / "b" / "train.log").read_text()
    train(tiny_config, tmp_path / "c", max_steps=5, resume_from=str(tmp_path / "a"))
    assert "start: step 4 of" in (tmp_path / "c" / "train.log").read_text()

    train(tiny_config, tmp_path / "d", max_steps=1, learning_rate=1e-9, min_lr=0.0, init_from=str(tmp_path / "a"))
    assert "start: the weights of" in (tmp_path / "d" / "train.log").read_text()
    weights, theirs = saved(tmp_path / "d", 1)[0]["params"], saved(tmp_path / "a", 4)[0]["params"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), weights, theirs)
    assert metrics_of(tmp_path / "d")[0]["step"] == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"resume": "never"}, r"training\.resume: never, but there is a run"),
        ({"use_ema": True}, r"training\.use_ema: True, but the run in .* has False"),
        ({"optimizer_type": "lion"}, r"training\.optimizer_type: lion, but the run in .* has adamw"),
        ({"dtype": "float16"}, r"training\.dtype: float16, but the run in .* has auto"),
        ({"resume_from": "x", "init_from": "y"}, r"training\.init_from: not possible together"),
    ],
)
def test_what_cannot_go_on(tiny_config, tmp_path, changes, message):
    train(tiny_config, tmp_path / "out", max_steps=1)
    with pytest.raises(UserError, match=message):
        train(tiny_config, tmp_path / "out", **{"max_steps": 2} | changes)


def test_nothing_there_to_start_from(tiny_config, tmp_path):
    with pytest.raises(UserError, match=r"training\.resume_from: no run at"):
        train(tiny_config, tmp_path / "out", resume_from=str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"training\.init_from: no finished checkpoint"):
        train(tiny_config, tmp_path / "out", init_from=str(tmp_path / "none"))


def test_a_key_that_makes_it_another_run_is_said(tiny_config, tmp_path):
    train(tiny_config, tmp_path / "out", max_steps=2)
    tiny_config.data.shuffle = False
    train(tiny_config, tmp_path / "out", max_steps=3, learning_rate=2e-3, log_interval=2)
    log = (tmp_path / "out" / "train.log").read_text()
    for said in ("data.shuffle was True, now False", "training.learning_rate was 0.01, now 0.002", "training.max_steps was 2"):
        assert f"not an exact continuation: {said}" in log
    assert "log_interval" not in log


# ---- checkpoints that are kept, and early stopping ----------------------------------------------------------------------


def test_which_checkpoints_are_kept(tiny_config, tmp_path, monkeypatch):
    losses = iter([5.0, 3.0, 4.0, 4.5, 3.5])
    monkeypatch.setattr(loop, "evaluate", lambda *args: {"val/loss": next(losses)})
    train(tiny_config, tmp_path / "out", max_steps=10, save_interval=1, eval_interval=2, keep_latest=2, keep_every=3)
    assert steps_in(tmp_path / "out") == [3, 6, 9, 10]
    assert [path.name for path in (tmp_path / "out" / "best").iterdir() if path.name.isdigit()] == ["4"]
    assert saved(tmp_path / "out", 10)[1] == {"best_loss": 3.0, "best_step": 4, "bad_evaluations": 3, "evaluated_step": 10}
    monkeypatch.setattr(loop, "evaluate", lambda *args: {"val/loss": 1.0})
    train(tiny_config, tmp_path / "none", max_steps=2, eval_interval=1, keep_best=False)
    assert not (tmp_path / "none" / "best").exists()


@pytest.mark.parametrize("use_ema", [pytest.param(False, marks=pytest.mark.slow), True])
def test_early_stopping_counts_over_a_restart(tiny_config, tmp_path, monkeypatch, use_ema):
    def run(max_steps, *losses):
        values = iter(losses)

        def evaluate(*args):
            loss = next(values)
            return {"val/loss": 9.0 - loss, "val/ema_loss": loss} if use_ema else {"val/loss": loss}

        monkeypatch.setattr(loop, "evaluate", evaluate)
        options = dict(early_stopping=True, patience=3, eval_interval=1, use_ema=use_ema, lr_scheduler="constant")
        return train(tiny_config, tmp_path / "out", max_steps=max_steps, **options)

    run(3, 2.0, 1.0, 1.5)
    run(20, 1.2, 1.1)  # the second and third in a row without a lower one
    assert steps_in(tmp_path / "out")[-1] == 5
    assert "early stopping: no lower loss than 1.0000, of step 2, in 3" in (tmp_path / "out" / "train.log").read_text()
    run(20)  # it is at its end
    assert steps_in(tmp_path / "out")[-1] == 5


def test_progress_by_hand():
    progress = Progress()
    assert [progress.evaluated(step, loss) for step, loss in enumerate([3.0, 3.0, 2.0, float("nan")])] == [
        True,
        False,
        True,
        False,
    ]
    assert progress == Progress(2.0, 2, 1, 3)


def test_durations_on_the_command_line(tiny_config):
    flags = ["--config.training.eval_interval=5%", "--config.training.save_interval=1epoch", "--config.training.log_interval=3"]
    result = subprocess.run(
        [sys.executable, "-c", "import sys; from mateconv_jax import config as c; t = c.resolve(c.from_command_line(sys.argv)).training;"
         "print(t.eval_interval, t.save_interval, t.log_interval)", f"--config={ROOT / 'configs' / 'base.py'}", *flags],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert result.stdout.split() == ["5%", "1epoch", "3"], result.stderr
    tiny_config.training.eval_interval = "often"
    with pytest.raises(UserError, match=r"training\.eval_interval: 'often' is not possible \(expected a number of steps, or"):
        config_lib.resolve(tiny_config)


def test_intervals_as_shares_of_the_run(tiny_config, tmp_path):
    train(
        tiny_config, tmp_path / "out", max_steps=8, eval_interval="25%", save_interval="50%", log_interval="25%", keep_latest=9
    )
    assert steps_in(tmp_path / "out") == [4, 8]
    assert [m["step"] for m in metrics_of(tmp_path / "out") if "val/loss" in m] == [2, 4, 6, 8]
    assert [m["step"] for m in metrics_of(tmp_path / "out") if "train/loss" in m] == [1, 2, 4, 6, 8]


# ---- gradients that are not finite ------------------------------------------------------------------------------------------


def poisoned(monkeypatch, steps):
    """The loss of these steps is infinite."""
    make = loop.make_train_step

    def make_poisoned(graph, tx, schedule, *rest):
        def update(updates, state, params):
            return tx.update(updates, state, params)

        step = make(graph, optax.GradientTransformation(tx.init, update), schedule, *rest)

        def run(state, batch):
            if int(state.step) + 1 in steps:
                params = jax.tree.map(jnp.copy, state.params)
                broken = jax.tree.map(lambda p: p.at[(0,) * p.ndim].set(jnp.nan), state.params)
                after, metrics = step(state.replace(params=broken), batch)
                return after.replace(params=params), metrics
            return step(state, batch)

        return run

    monkeypatch.setattr(loop, "make_train_step", make_poisoned)


def test_bad_steps_are_left_out_and_said(tiny_config, tmp_path, monkeypatch):
    poisoned(monkeypatch, {3, 4})
    assert train(tiny_config, tmp_path / "out", max_steps=6) == 0
    log = (tmp_path / "out" / "train.log").read_text()
    assert "step 3: the gradient is not finite, the update is left out (1 in a row); rows [" in log
    assert "step 4: the gradient is not finite, the update is left out (2 in a row)" in log
    assert "largest norms: blocks.0.attention" in log and " nan" in log
    assert [m["bad_steps"] for m in metrics_of(tmp_path / "out") if "bad_steps" in m] == [0, 0, 1, 2, 0, 0]
    assert all(np.isfinite(p).all() for p in jax.tree.leaves(saved(tmp_path / "out", 6)[0]["params"]))


def test_too_many_bad_steps_end_the_run_with_the_parameters_from_before(tiny_config, tmp_path, monkeypatch):
    options = dict(max_steps=30, lr_scheduler="constant", warmup_steps=0)
    train(tiny_config, tmp_path / "good", **options | {"max_steps": 3})
    poisoned(monkeypatch, set(range(4, 31)))
    with pytest.raises(UserError, match=r"training\.max_bad_steps: 5 steps in a row .* the parameters of step 3 are kept"):
        train(tiny_config, tmp_path / "out", **options, max_bad_steps=5)
    state, good = saved(tmp_path / "out", steps_in(tmp_path / "out")[-1])[0], saved(tmp_path / "good", 3)[0]
    jax.tree.map(np.testing.assert_array_equal, state["params"], good["params"])


# ---- the loop itself ----------------------------------------------------------------------------------------------------------


def test_the_rows_of_a_bad_step_are_those_it_read(tiny_config, tmp_path, monkeypatch):
    read = []
    original = input_pipeline.row_numbers
    monkeypatch.setattr(input_pipeline, "row_numbers", lambda *args: read.append(original(*args).tolist()) or original(*args))
    poisoned(monkeypatch, {2})
    train(tiny_config, tmp_path / "out", max_steps=3)
    log = (tmp_path / "out" / "train.log").read_text()
    [said] = [line for line in log.splitlines() if "step 2: the gradient is not finite" in line]
    rows = json.loads("[" + said.split("rows [")[1].split("]")[0] + "]")
    assert rows in read[:-1] and len(rows) == 8


def test_a_steps_metrics_are_read_after_the_next_step_is_dispatched(tiny_config, tmp_path, monkeypatch):
    events = []
    make, write = loop.make_train_step, loop.Metrics._write_step

    def making(*args):
        step = make(*args)
        counter = itertools.count(1)
        return lambda state, batch: (events.append(("dispatch", next(counter))), step(state, batch))[1]

    monkeypatch.setattr(loop, "make_train_step", making)
    monkeypatch.setattr(
        loop.Metrics, "_write_step", lambda self, step, m: (events.append(("read", step)), write(self, step, m))
    )
    train(tiny_config, tmp_path / "out", max_steps=5, eval_interval=100, save_interval=100)
    for step in range(1, 5):
        assert events.index(("read", step)) > events.index(("dispatch", step + 1))


def test_nothing_goes_to_the_device_unasked_and_nothing_compiles_twice(tiny_config, tmp_path, monkeypatch):
    jitted, make = [], loop.make_train_step

    def making(*args):
        jitted.append(make(*args))
        return jitted[-1]

    guarded = []
    push = loop.Metrics.push

    def pushing(self, step, metrics):
        if step == 1:  # from the first step on, as in a long run
            guarded.append(jax.transfer_guard_host_to_device("disallow"))
            guarded[0].__enter__()
        return push(self, step, metrics)

    monkeypatch.setattr(loop, "make_train_step", making)
    monkeypatch.setattr(loop.Metrics, "push", pushing)
    try:
        train(tiny_config, tmp_path / "out", max_steps=6, use_ema=True, eval_interval=2, save_interval=3)
    finally:
        guarded[0].__exit__(None, None, None)
    assert jitted[0]._cache_size() == 1
