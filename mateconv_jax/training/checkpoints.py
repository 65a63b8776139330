"""Saving and restoring the TrainState with Orbax."""

import os
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from mateconv_jax.errors import UserError
from mateconv_jax.training.train_state import TrainState


class Checkpoints:
    """Asynchronous saves into RUN/checkpoints, the newest `keep_latest` kept. Leaving the block waits for the last save:
    an exception during an asynchronous save would lose it otherwise.
    """

    def __init__(self, run_folder: Path, keep_latest: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep_latest, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(os.path.abspath(run_folder / "checkpoints"), options=options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._manager.close()

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState) -> None:
        """Copies the state to the host and returns; writing goes on beside training. Saved already: nothing happens."""
        if step != self._manager.latest_step():
            self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state)))

    def restore(self, abstract_state: TrainState) -> TrainState:
        """The newest checkpoint, onto the shardings of `abstract_state`; they need not be those it was saved from.

        Raises:
          UserError: the checkpoint holds another kind of state.
        """
        step = self._manager.latest_step()
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state)))
        except (ValueError, KeyError) as error:
            raise UserError(
                f"training.out_dir: the checkpoint at step {step} in {self._manager.directory} does not fit this configuration "
                f"({str(error).splitlines()[0][:200]})"
            ) from error
        return restored.state


def abstract(init, sharding) -> TrainState:
    """Shapes, dtypes and one sharding for all of what `init()` makes."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), jax.eval_shape(init))
