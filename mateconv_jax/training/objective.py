"""What a run learns. The only place that knows what the values of `loss.kind` mean: setup takes the loss and the shape of a
batch from here, the loop the source of batches and the evaluator.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mateconv_jax.data.dataset import Dataset, Rows
from mateconv_jax.errors import UserError
from mateconv_jax.losses import policy_gradient
from mateconv_jax.losses.next_token import next_token_loss
from mateconv_jax.model.config import ModelConfig
from mateconv_jax.runtime import sharding
from mateconv_jax.training.batch_shape import BatchShape, Position
from mateconv_jax.training.step import LossFn

HOW_TO_MAKE = {
    "texts": "python -m mateconv_jax.prepare --input texts.jsonl --output DATASET",
}


@dataclasses.dataclass(frozen=True)
class Context:
    """What a source of batches may need of its run.

    Attributes:
      folder: of the run.
      should_stop: whether the run is asked to stop; a source that takes long asks now and then.
    """

    folder: Path
    should_stop: Callable[[], bool]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What differs between one `loss.kind` and another.

    Attributes:
      kind: loss.kind.
      content: what a row of the dataset must hold, see Dataset.content.
      loss_fn: see losses/loss_output.py.
      shape: of a step.
      abstract_batch: (mesh, learned) -> a step's batch, shapes with shardings. learned: whether the dataset's rows say what is
        learned of them.
      source: (c, mesh, rows, tokenizer, start, context) -> where batches come from, see batches.py. start: a Position;
        context: a Context.
      evaluator: (c, mesh, eval_step, rows, tokenizer) -> a callable as evaluator.Evaluator.
      samples: source -> in place of samples.Samples; None: the run writes samples.
    """

    kind: str
    content: str
    loss_fn: LossFn
    shape: BatchShape
    abstract_batch: Callable[[Mesh, bool], dict[str, jax.ShapeDtypeStruct]]
    source: Callable
    evaluator: Callable
    samples: Callable | None = None

    def check(self, dataset: Dataset) -> None:
        """Raises UserError where the loss cannot learn from the dataset's rows."""
        if dataset.content != self.content:
            raise UserError(
                f"loss.kind: {self.kind} learns from {self.content}, but {str(dataset.path)!r} holds {dataset.content} (make a "
                f"dataset of {self.content} with: {HOW_TO_MAKE[self.content]})"
            )


def of(config: ConfigDict) -> Objective:
    """The objective of a (resolved) config.

    Raises:
      UserError: keys do not fit each other.
    """
    if config.loss.kind in policy_gradient.KINDS:
        return _reward(config)
    return _next_token(config)


# ---- next_token: texts and dialogues ------------------------------------------------------------------------------


def _next_token(config: ConfigDict) -> Objective:
    training = config.training
    shape = BatchShape(training.batch_size, training.accumulation_steps, config.data.seq_len)
    return Objective(
        kind="next_token",
        content="texts",
        loss_fn=functools.partial(next_token_loss, z_loss=training.z_loss, remat=training.remat),
        shape=shape,
        abstract_batch=functools.partial(_rows, shape, training.document_mask),
        source=functools.partial(_row_batches, config, shape),
        evaluator=functools.partial(_loss_on_rows, training),
    )


def _rows(shape: BatchShape, document_mask: bool, mesh: Mesh, learned: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """Micro-batches of rows (see data/rows.py), with the fields that the loss needs."""
    rows = shape.accumulation_steps, shape.batch_size
    spread = functools.partial(jax.ShapeDtypeStruct, sharding=sharding.batch(mesh, 1))
    tokens = spread((*rows, shape.seq_len + 1), jnp.uint16)
    batch = {"tokens": tokens, "length": spread(rows, jnp.int32)}
    if document_mask or learned:
        batch["document_starts"] = spread(tokens.shape, jnp.bool)
    if learned:
        batch["learned"] = spread(tokens.shape, jnp.bool)
    return batch


def _row_batches(
    config: ConfigDict, shape: BatchShape, c: ModelConfig, mesh: Mesh, rows: Rows, tokenizer, start: Position, context
):  # fmt: skip
    """Rows of the dataset, as they are."""
    from mateconv_jax.training.batches import RowBatches  # imports Grain: not for planning

    return RowBatches(rows, shape, config.training.seed, config.data.shuffle, config.data.num_workers, mesh, start)


def _loss_on_rows(
    training: ConfigDict, c: ModelConfig, mesh: Mesh, eval_step: Callable, rows: Rows, tokenizer
):  # fmt: skip
    from mateconv_jax.data.tokenizer.token_bytes import bytes_per_token
    from mateconv_jax.training.evaluator import Evaluator  # Grain, too

    return Evaluator(eval_step, rows, bytes_per_token(tokenizer), training.batch_size, training.eval_iters, mesh)


# ---- grpo, bnpo, dapo, dr_grpo: prompts, and rewards of answers to them -----------------------------------------------


def _reward(config: ConfigDict) -> Objective:
    from mateconv_jax.training import reinforcement
    from mateconv_jax.training.rollout_batches import AnswersOfRollouts

    reinforcement.check(config)
    training, loss = config.training, config.loss
    shape = BatchShape(training.batch_size, training.accumulation_steps, config.data.seq_len)
    loss_fn = functools.partial(
        policy_gradient.policy_gradient_loss, epsilon=loss.epsilon, epsilon_high=loss.epsilon_high, beta=loss.beta,
        temperature=config.rollout.temperature, remat=training.remat,
    )  # fmt: skip
    return Objective(
        kind=loss.kind,
        content="prompts",
        loss_fn=loss_fn,
        shape=shape,
        abstract_batch=lambda mesh, learned: reinforcement.abstract_batch(config, shape, mesh),
        source=functools.partial(reinforcement.source, config, shape),
        evaluator=functools.partial(reinforcement.RewardEvaluator, config),
        samples=AnswersOfRollouts,
    )
