"""Two processes that are stopped, damaged or stuck: both do the same, and neither waits for the other."""

import errno
import functools
import itertools
import json
import os
import shutil
import signal
import time

import pytest

from tests.training.processes import Training  # noqa: F401
from tests.training.runs import losses_of, steps_in
from tests.training.test_devices import config, start_two  # noqa: F401

pytestmark = pytest.mark.slow

FLAGS = tuple(
    f"--config.training.{flag}"
    for flag in ("max_steps=8", "save_interval=2", "eval_interval=2", "log_interval=1", "keep_latest=99", "eval_iters=4")
)
QUICK = 60  # seconds in which two processes start, do a few steps and end; jax by itself waits 100 to 300 for one that is gone


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory):  # noqa: F811
    """The run that nothing happens to."""
    folder = tmp_path_factory.mktemp("straight") / "out"
    for training in start_two(config, folder, FLAGS, devices=1):
        training.finish()
    return folder


@pytest.fixture(scope="module")
def begun(straight, tmp_path_factory):
    """The same, of which four steps are done."""
    folder = tmp_path_factory.mktemp("begun") / "out"
    shutil.copytree(straight, folder)
    for step in (6, 8):
        shutil.rmtree(folder / "checkpoints" / str(step))
    return folder


def wrap(owner, name, before=lambda *args: None, after=lambda *args: None):
    """Have owner.name call before(*args) and after(*args), too."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        before(*args)
        result = original(*args, **kwargs)
        after(*args)
        return result

    setattr(owner, name, wrapped)


def nth(n, action):
    """`action` at the n-th call."""
    counts = itertools.count(1)
    return lambda *args: action() if next(counts) == n else None


# ---- stops --------------------------------------------------------------------------------------------------------------

MOMENTS = ("start", "data", "restore", "compilation", "step", "evaluation", "save", "written")


def say_where_it_stops():
    from mateconv_jax.training import loop

    wrap(loop.Run, "stopped", lambda self, step: print(f"\nstops at {step}.", flush=True))


def signal_at(moment, number):
    """Have this process send itself a signal, once."""
    from mateconv_jax.data import loader
    from mateconv_jax.runtime import distributed
    from mateconv_jax.training import checkpoints, loop, resume

    say_where_it_stops()
    send = lambda: os.kill(os.getpid(), number)  # noqa: E731
    match moment:
        case "start":
            wrap(distributed, "initialize", nth(1, send))
        case "data":
            wrap(loop, "open_data", nth(1, send))
        case "restore":
            wrap(resume, "start", nth(1, send))
        case "compilation":
            wrap(loop, "compile_step", nth(1, send))
        case "step":
            wrap(loop.Metrics, "push", nth(3, send))
        case "evaluation":
            wrap(loader, "target_bytes" if hasattr(loader, "target_bytes") else "validation_batches", nth(1, send))
        case "save":
            wrap(checkpoints.Checkpoints, "save", nth(1, send))
        case "written":  # in Orbax's thread
            wrap(checkpoints._Saves, "_write", after=nth(1, send))


def stops_of(trainings):
    ends = [training.finish(75) for training in trainings]
    return [int(output.rpartition("stops at ")[2].split(".")[0]) for output in ends]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("is_resumed", [False, True])
def test_a_signal_at_any_moment_saves_the_same_step_in_both(config, straight, begun, tmp_path, number, moment, is_resumed):  # noqa: F811
    folder = tmp_path / "out"
    if is_resumed:
        shutil.copytree(begun, folder)
    who = (MOMENTS.index(moment) + is_resumed + (number == signal.SIGINT)) % 2
    prepare = [say_where_it_stops, say_where_it_stops]
    prepare[who] = functools.partial(signal_at, moment, number)
    flags = (*FLAGS, "--config.training.max_steps=100000", "--config.training.lr_scheduler=constant")
    first, second = stops_of(start_two(config, folder, flags, prepare, devices=1))
    assert first == second == steps_in(folder)[-1]
    if moment in ("start", "data", "restore"):
        assert first == 4 * is_resumed


@pytest.mark.parametrize("seconds", [None])
def test_ctrl_c_in_a_terminal_reaches_both(config, tmp_path, seconds):  # noqa: F811
    flags = (*FLAGS, "--config.training.max_steps=100000")
    trainings = start_two(config, tmp_path / "out", flags, [say_where_it_stops] * 2, devices=1)
    trainings[0].wait_for("  loss ")
    for training in trainings:
        os.kill(training.process.pid, signal.SIGINT)
    first, second = stops_of(trainings)
    assert first == second == steps_in(tmp_path / "out")[-1]


# ---- damages ------------------------------------------------------------------------------------------------------------


def fail_to_read(step):
    from mateconv_jax.training import checkpoints

    def fail(folder, abstract_state):
        if folder.name == str(step):
            raise OSError(errno.EIO, "Input/output error")

    wrap(checkpoints, "restore", fail)


@pytest.mark.parametrize("who", [0, 1])
def test_a_checkpoint_that_one_process_cannot_read_is_skipped_by_both(config, straight, begun, tmp_path, who):  # noqa: F811
    shutil.copytree(begun, tmp_path / "out")
    prepare = [None, None]
    prepare[who] = functools.partial(fail_to_read, 4)
    outputs = [training.finish() for training in start_two(config, tmp_path / "out", FLAGS, prepare, devices=1)]
    assert f"step 4: [Errno 5] Input/output error (process {who} of 2)" in outputs[0]
    assert "start: step 2, resumed" in outputs[0] and (tmp_path / "out" / "unreadable" / "4").is_dir()
    assert losses_of(tmp_path / "out") == losses_of(straight)


def test_a_file_that_only_one_process_needs_is_truncated(config, tmp_path):  # noqa: F811
    flags = (*FLAGS, "--config.mesh.fsdp=2")
    for training in start_two(config, tmp_path / "out", flags, devices=1):
        training.finish()
    files = [p for p in (tmp_path / "out" / "checkpoints" / "8" / "state").rglob("*") if p.is_file()]
    for path in [p for p in files if "process_1" in str(p) and p.stat().st_size > 1000]:
        os.truncate(path, path.stat().st_size // 2)
    outputs = [training.finish() for training in start_two(config, tmp_path / "out", flags, devices=1)]
    assert "step 8: " in outputs[0] and "start: step 6, resumed" in outputs[0]


def no_space(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk_at_save():
    import orbax.checkpoint as ocp

    wrap(ocp.CheckpointManager, "save", nth(2, no_space))


def full_disk_in_log():
    from mateconv_jax.training import writers

    wrap(writers.JsonlWriter, "write_scalars", nth(3, no_space))


def unreadable_row():
    from mateconv_jax.training import batches

    def fail(*args):
        raise ValueError("a row is broken")

    wrap(batches.RowBatches, "__call__", nth(3, lambda: fail()))


@pytest.mark.parametrize(
    "damage, who, code, said",
    [
        (full_disk_at_save, 0, 2, "No space left on device"),
        (full_disk_at_save, 1, 2, "No space left on device"),
        (full_disk_in_log, 0, 2, "No space left on device"),
        (unreadable_row, 0, 1, "a row is broken"),
        (unreadable_row, 1, 1, "a row is broken"),
    ],
)
def test_one_that_fails_takes_the_other_along(config, tmp_path, damage, who, code, said):  # noqa: F811
    begin, prepare = time.monotonic(), [None, None]
    prepare[who] = damage
    trainings = start_two(config, tmp_path / "out", (*FLAGS, "--config.training.max_steps=1000"), prepare, devices=1)
    outputs = [training.finish(code) for training in trainings]
    assert said in outputs[who]
    assert f"error: process {who} of 2 failed: " in outputs[1 - who] and said in outputs[1 - who]
    assert time.monotonic() - begin < QUICK


def test_different_commands_are_an_error_in_both(config, tmp_path):  # noqa: F811
    trainings = start_two(config, tmp_path / "out", FLAGS, (None, other_batch), devices=1)
    for training in trainings:
        assert "training.batch_size: 16 in process 1, 8 in process 0" in training.finish(2)


def other_batch():
    from mateconv_jax.training import loop

    wrap(loop, "check_same_config", lambda given: given.training.update(batch_size=16))


def sees_no_checkpoint():
    from mateconv_jax import run_folder

    run_folder.latest_step = lambda folder: None
    wait_two_seconds()


def wait_two_seconds():
    from mateconv_jax.training import resume

    resume.LATE_SECONDS = 2


def test_a_folder_that_they_do_not_share_is_an_error_in_both(config, begun, tmp_path):  # noqa: F811
    shutil.copytree(begun, tmp_path / "out")
    trainings = start_two(config, tmp_path / "out", FLAGS, (wait_two_seconds, sees_no_checkpoint), devices=1)
    for training in trainings:
        assert "newest is step 4 in process 0, no checkpoint in process 1" in training.finish(2)


def test_a_folder_in_use_is_an_error_in_both_and_untouched(config, tmp_path):  # noqa: F811
    flags = (*FLAGS, "--config.training.max_steps=100000")
    running = start_two(config, tmp_path / "a" / "out", flags, devices=1)
    running[0].wait_for("  loss ")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    others = start_two(config, tmp_path / "a" / "out", flags, (None, None), devices=1)
    for training in others:
        assert "has been writing to" in training.finish(2)
    os.kill(running[0].process.pid, signal.SIGTERM)
    for training in running:
        training.process.join(60)
        assert training.process.exitcode == 75


# ---- hangs --------------------------------------------------------------------------------------------------------------

WATCHED = (*FLAGS, "--config.training.hang_timeout=4")


def sleep_for_ever():
    time.sleep(1000)


def hang_in_step():
    from mateconv_jax.training import batches

    wrap(batches.RowBatches, "__call__", nth(5, sleep_for_ever))


def hang_in_evaluation():
    from mateconv_jax.training import evaluator

    wrap(evaluator, "target_bytes", nth(7, sleep_for_ever))


@pytest.mark.parametrize("hang", [hang_in_step, hang_in_evaluation])
@pytest.mark.parametrize("who", [0, 1])
def test_a_hang_shows_all_stacks_and_ends_both(config, tmp_path, hang, who):  # noqa: F811
    prepare, begin = [None, None], time.monotonic()
    prepare[who] = hang
    trainings = start_two(config, tmp_path / "out", WATCHED, prepare, devices=1)
    outputs = [training.finish(75) for training in trainings]
    for process, output in enumerate(outputs):
        assert f"no progress for 4 s; the stacks of process {process} of 2" in output and "in steps" in output
    assert "in sleep_for_ever" in outputs[who] and "in sleep_for_ever" not in outputs[1 - who]
    assert time.monotonic() - begin < QUICK


def slow_everywhere():
    """What may take longer than the time-out: compilation, samples, saves; and an evaluation, batch by batch."""
    from mateconv_jax.training import checkpoints, evaluator, loop

    wrap(loop, "compile_step", lambda *args: time.sleep(6))
    wrap(loop.Samples, "write", lambda *args: time.sleep(6))
    wrap(checkpoints._Saves, "_wait_for_last_save", nth(2, lambda: time.sleep(6)))
    wrap(evaluator, "target_bytes", lambda *args: time.sleep(2))


def test_what_takes_long_in_one_process_is_no_hang(config, tmp_path):  # noqa: F811
    flags = (*WATCHED, "--config.training.samples_interval=4", "--config.training.eval_interval=4")
    for training in start_two(config, tmp_path / "out", flags, (slow_everywhere, None), devices=1):
        assert "hang_timeout" not in training.finish().replace("--config", "")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["training"]["hang_timeout"] == 4


# ---- stress -------------------------------------------------------------------------------------------------------------


def every_evaluation_is_the_best():
    from mateconv_jax.training.checkpoints import Progress

    wrap(Progress, "evaluated")
    evaluated = Progress.evaluated
    Progress.evaluated = lambda self, *args: evaluated(self, *args) or True


SAVES = int(os.environ.get("MATECONV_STRESS_SAVES", "500"))


@pytest.mark.parametrize("devices", [1, 4])
def test_best_and_latest_beside_each_other_never_wait_for_ever(config, tmp_path, devices):  # noqa: F811
    """A run with a save of both at every step once hung in thirty; if one does, the stacks say where."""
    flags = [
        f"--config.training.{flag}"
        for flag in (
            f"max_steps={SAVES // 2}", "save_interval=1", "eval_interval=1", "eval_iters=1", "keep_latest=2", "log_interval=1",
            "hang_timeout=60", "lr_scheduler=constant",
        )
    ]  # fmt: skip
    prepare = [every_evaluation_is_the_best] * 2
    for training in start_two(config, tmp_path / "out", flags, prepare, devices):
        training.process.join(60 + SAVES)
        assert training.process.exitcode == 0, training.output()[-20000:]
    last = SAVES // 2
    assert steps_in(tmp_path / "out") == [last - 1, last]
    assert [path.name for path in (tmp_path / "out" / "best").iterdir()] == [str(last)]
