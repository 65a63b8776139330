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


@pytest.mark.parametrize("room", [28, 29])
def test_without_room_for_a_copy_the_loop_waits_for_orbax(tmp_path, state, held_up, monkeypatch, room):
    """The state has 28 bytes."""
    stats = {"bytes_limit": 1000, "peak_bytes_in_use": 1000 - room}
    monkeypatch.setattr(checkpoints, "_memory_stats", lambda: [stats])
    threading.Timer(1, held_up.set).start()
    with Checkpoints(tmp_path, 2, None, False) as saves:
        saves.save(1, state, Progress())
        assert held_up.is_set() == (room == 28)
    assert (tmp_path / "checkpoints" / "1" / "state").is_dir()


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
