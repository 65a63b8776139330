"""Saves beside a loop that goes on and overwrites what is being saved."""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mateconv_jax.errors import UserError
from mateconv_jax.training import checkpoints
from mateconv_jax.training.checkpoints import Checkpoints, Progress
from tests.training.runs import saved


@functools.partial(jax.jit, donate_argnums=0)
def next_state(state):
    return jax.tree.map(lambda x: x + 1, state)


@pytest.fixture
def state():
    return {"w": jnp.arange(6.0).reshape(2, 3), "step": jnp.int32(0)}


@pytest.fixture
def held_up(monkeypatch):
    """Orbax does not begin before this event is set."""
    event = threading.Event()
    save = ocp.CheckpointManager.save

    def save_when_let(*args, **kwargs):
        assert event.wait(60)
        return save(*args, **kwargs)

    monkeypatch.setattr(ocp.CheckpointManager, "save", save_when_let)
    return event


def test_a_run_that_returns_to_an_earlier_step_saves_its_best_there(tmp_path, state):
    """Orbax alone says no to a step below its last, and again to one that is there."""
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)

    def best_after(step, loss, state):
        with Checkpoints(tmp_path, 2, None, True) as saves:
            saves.save_best(step, state, Progress(best_loss=loss, best_step=step))
        (path,) = (path for path in (tmp_path / "best").iterdir() if path.name.isdigit())
        restored, progress = checkpoints.restore(path, abstract)
        return path.name, float(restored["w"][0, 1]), progress.best_loss, path.stat().st_ino

    assert best_after(8, 3.0, state)[:3] == ("8", 1.0, 3.0)
    assert best_after(6, 4.0, state)[:3] == ("6", 1.0, 4.0)
    again = best_after(6, 3.5, next_state(state))
    assert again[:3] == ("6", 2.0, 3.5)
    assert best_after(6, 3.5, {"w": jnp.zeros((2, 3)), "step": jnp.int32(0)}) == again  # the same once more: left alone


def test_the_loop_goes_on_while_orbax_is_held_up_and_what_was_saved_is_of_that_moment(tmp_path, state, held_up):
    want = {"w": np.arange(6.0).reshape(2, 3), "step": 0}  # not read from `state`: what NumPy looks at cannot be donated
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    progress = Progress(best_loss=1.0)
    with Checkpoints(tmp_path, 2, None, True) as saves:
        saves.save(3, state, progress)
        saves.save_best(3, state, progress)
        saves.save(3, state, progress)  # saved already
        progress.best_loss = 0.5
        for _ in range(3):
            state = next_state(state)  # donates what is being saved
        assert state["w"][0, 0] == 3
        assert not list(tmp_path.glob("*/3*"))
        held_up.set()
    for folder in ("checkpoints", "best"):
        restored, saved_progress = checkpoints.restore(tmp_path / folder / "3", abstract)
        jax.tree.map(np.testing.assert_array_equal, restored, want)
        assert saved_progress.best_loss == 1.0


@pytest.fixture
def copies(monkeypatch):
    """Every copy of a state, and whether each is on the device still."""
    made = []
    device_put = jax.device_put

    def putting(x, *args, **kwargs):
        copy = device_put(x, *args, **kwargs)
        if "may_alias" in kwargs:
            made.append(copy)
        return copy

    monkeypatch.setattr(jax, "device_put", putting)
    return lambda: [not copy["w"].is_deleted() for copy in made]


def test_best_and_latest_share_the_one_copy_there_is(tmp_path, state, held_up, copies):
    with Checkpoints(tmp_path, 2, None, True) as saves:
        saves.save_best(1, state, Progress())
        saves.save(1, state, Progress())
        assert copies() == [True]
        threading.Timer(0.3, held_up.set).start()
        saves.save_best(2, next_state(state), Progress())  # waits until the first is on the host, for `checkpoints` too
        assert held_up.is_set() and len(copies()) == 2 and not copies()[0]
    assert copies() == [False, False]


# A GPU with 1,000 bytes; the state has 28, the step needs 500 beside it.
FULL = {"bytes_limit": 1000, "bytes_in_use": 472, "peak_bytes_in_use": 972}


@pytest.mark.parametrize(
    "stats, has_room",
    [
        (FULL, True),
        (FULL | {"bytes_in_use": 473}, False),
        (FULL | {"peak_bytes_in_use": 973}, False),  # something else that the run does
        ({"bytes_limit": 1000, "bytes_in_use": 472}, True),  # other allocators than the default one
        ({"bytes_limit": 1000}, False),
        (None, True),  # the CPU
    ],
)
def test_a_copy_is_made_where_the_step_fits_beside_it(state, monkeypatch, stats, has_room):
    monkeypatch.setattr(jax.local_devices()[0].__class__, "memory_stats", lambda self: stats)
    copies = checkpoints._Copies()
    if stats:
        assert copies.take(1, state) is None  # the step is not compiled yet
    copies.step_bytes = 500
    assert (copies.take(1, state) is not None) == has_room


def test_the_peak_with_a_copy_does_not_forbid_the_next(state, monkeypatch):
    stats = dict(FULL)
    monkeypatch.setattr(jax.local_devices()[0].__class__, "memory_stats", lambda self: stats)
    copies = checkpoints._Copies()
    copies.step_bytes = 500
    for step in range(3):
        assert copies.take(step, state) is not None
        stats["peak_bytes_in_use"] = 1000
        copies.give_back()


def test_without_room_for_a_copy_the_loop_waits_for_orbax(tmp_path, state, held_up, monkeypatch):
    monkeypatch.setattr(checkpoints._Copies, "_fit", lambda *_: False)
    threading.Timer(0.3, held_up.set).start()
    with Checkpoints(tmp_path, 2, None, True) as saves:
        saves.save_best(1, state, Progress())
        assert held_up.is_set()
        saves.save(1, state, Progress())
    assert (tmp_path / "checkpoints" / "1" / "state").is_dir() and (tmp_path / "best" / "1" / "state").is_dir()


@pytest.mark.parametrize("steps", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_asynchronous_saves_of_consecutive_steps_equal_blocking_ones(tmp_path, state, monkeypatch, steps):
    """Each step donates the state that is being saved."""

    def save_all(folder):
        current = jax.tree.map(jnp.copy, state)
        with Checkpoints(folder, steps, None, False) as saves:
            for step in range(1, steps + 1):
                current = next_state(current)
                saves.save(step, current, Progress())

    save_all(tmp_path / "asynchronous")
    monkeypatch.setattr(checkpoints._Copies, "_fit", lambda *_: False)
    save_all(tmp_path / "blocking")
    for step in range(1, steps + 1):
        (ours, _), (theirs, _) = (saved(tmp_path / folder, step) for folder in ("asynchronous", "blocking"))
        assert ours["w"].tobytes() == theirs["w"].tobytes() == (np.arange(6, dtype=np.float32) + step).tobytes()
        assert ours["step"] == theirs["step"] == step


def test_a_save_that_failed_is_said_by_the_next_and_the_other_folder_is_still_finished(tmp_path, state, monkeypatch):
    save = ocp.CheckpointManager.save

    def fail(self, step, **kwargs):
        if self.directory.name == "checkpoints":
            raise OSError(28, "No space left on device")
        return save(self, step, **kwargs)

    monkeypatch.setattr(ocp.CheckpointManager, "save", fail)
    with pytest.raises(UserError, match="No space left on device"), Checkpoints(tmp_path, 2, None, True) as saves:
        saves.save_best(1, state, Progress())
        saves.save(1, state, Progress())
        saves.save(2, state, Progress())
    assert (tmp_path / "best" / "1" / "state").is_dir()
