"""What a run learns. The only place that knows what the values of `loss.kind` mean: setup takes the loss and the shape of a
batch from here, the loop the source of batches and the evaluator.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mateconv_jax import config as config_lib
from mateconv_jax.data.dataset import Dataset, Rows
from mateconv_jax.errors import UserError
from mateconv_jax.losses import policy_gradient, preference
from mateconv_jax.losses.next_token import next_token_loss
from mateconv_jax.model.config import ModelConfig
from mateconv_jax.runtime import sharding
from mateconv_jax.training.batch_shape import BatchShape, Position
from mateconv_jax.training.step import LossFn

if TYPE_CHECKING:  # planning does without Orbax and Grain
    from mateconv_jax.data.mixture import Order
    from mateconv_jax.training.checkpoints import Progress

HOW_TO_MAKE = {
    "texts": "python -m mateconv_jax.prepare --input texts.jsonl --output DATASET",
    "pairs": "python -m mateconv_jax.prepare --input preferences.jsonl --output DATASET",
}


@dataclasses.dataclass(frozen=True)
class Context:
    """What a source of batches or an evaluator may need of its run.

    Attributes:
      folder: of the run.
      end_ids: tokens that end an answer besides the tokenizer's, of the model that the run starts from.
      progress: of the run; a source may note there what its batches depend on.
      should_stop: whether the run is asked to stop; a source that takes long asks now and then.
      order: in which the rows of a mixture are read; None: they are of one dataset.
    """

    folder: Path
    end_ids: tuple[int, ...]
    progress: "Progress"
    should_stop: Callable[[], bool]
    order: "Order | None" = None


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
      evaluator: (c, mesh, eval_step, rows, tokenizer, context) -> a callable as evaluator.Evaluator.
      expected_loss: (vocab_size, from_scratch) -> the loss of the first step in words; None: not known.
      needs_reference: whether rows need the log-probabilities of a reference, see reference.py.
      samples: source -> in place of samples.Samples; None: the run writes samples.
    """

    kind: str
    content: str
    loss_fn: LossFn
    shape: BatchShape
    abstract_batch: Callable[[Mesh, bool], dict[str, jax.ShapeDtypeStruct]]
    source: Callable
    evaluator: Callable
    expected_loss: Callable[[int, bool], str | None] = lambda vocab_size, from_scratch: None
    needs_reference: bool = False
    samples: Callable | None = None

    def check_origin(self, key: str | None) -> None:
        """Raises UserError where the loss needs weights to start from. key: see resume.Origin."""
        if self.needs_reference and key is None:
            raise UserError(
                f"training.init_from: missing (loss.kind {self.kind} compares the model with the one that it starts from: "
                "expected a fine-tuned model)"
            )

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
    if config.loss.kind == "next_token":
        return _next_token(config)
    return _reward(config) if config.loss.kind in policy_gradient.KINDS else _preference(config)


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
        expected_loss=_loss_of_no_knowledge,
    )


def _loss_of_no_knowledge(vocab_size: int, from_scratch: bool) -> str | None:
    return f"ln({vocab_size:,}) = {math.log(vocab_size):.4f} (an untrained model)" if from_scratch else None


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
    config: ConfigDict, shape: BatchShape, c: ModelConfig, mesh: Mesh, rows: Rows, tokenizer, start: Position,
    context: Context,
):  # fmt: skip
    from mateconv_jax.training.batches import RowBatches  # imports Grain: not for planning

    seed, shuffle, num_workers = config.training.seed, config.data.shuffle, config.data.num_workers
    return RowBatches(rows, shape, seed, shuffle, num_workers, mesh, start, context.order)


def _loss_on_rows(
    training: ConfigDict, c: ModelConfig, mesh: Mesh, eval_step: Callable, rows: Rows, tokenizer, context
):  # fmt: skip
    from mateconv_jax.data.tokenizer.token_bytes import bytes_per_token
    from mateconv_jax.training.evaluator import Evaluator  # Grain, too

    return Evaluator(eval_step, rows, bytes_per_token(tokenizer), training.batch_size, training.eval_iters, mesh)


# ---- sigmoid, ipo, orpo, simpo: pairs -----------------------------------------------------------------------------


def _preference(config: ConfigDict) -> Objective:
    training = config.training
    options = config_lib.options(preference.PreferenceOptions, config.loss)
    needs_reference = options.kind in preference.WITH_REFERENCE
    shape = BatchShape(training.batch_size, training.accumulation_steps, config.data.seq_len, sequences=2)
    return Objective(
        kind=options.kind,
        content="pairs",
        loss_fn=functools.partial(preference.preference_loss, options=options, remat=training.remat),
        shape=shape,
        abstract_batch=functools.partial(_pairs, shape, needs_reference),
        source=functools.partial(_row_batches, config, shape),
        evaluator=functools.partial(_loss_on_pairs, training),
        needs_reference=needs_reference,
        expected_loss=functools.partial(_loss_of_equals, options, config.model.dropout),
    )


def _pairs(shape: BatchShape, with_reference: bool, mesh: Mesh, learned: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """Micro-batches of pairs, see data/rows.py. Their rows always say what is learned of them."""
    pairs = shape.accumulation_steps, shape.batch_size, 2
    spread = functools.partial(jax.ShapeDtypeStruct, sharding=sharding.batch(mesh, 1))
    tokens = spread((*pairs, shape.seq_len + 1), jnp.uint16)
    batch = {"tokens": tokens, "length": spread(pairs, jnp.int32), "learned": spread(tokens.shape, jnp.bool)}
    return batch | ({"reference": spread(pairs, jnp.float32)} if with_reference else {})


def _loss_on_pairs(training: ConfigDict, c: ModelConfig, mesh: Mesh, eval_step: Callable, rows: Rows, tokenizer, context):
    from mateconv_jax.training.evaluator import Evaluator

    return Evaluator(eval_step, rows, None, training.batch_size, training.eval_iters, mesh)


def _loss_of_equals(options: preference.PreferenceOptions, dropout: float, vocab_size: int, from_scratch: bool) -> str | None:
    """Where policy and reference are the same, all rewards are 0."""
    if dropout or options.sft_coef:
        return None
    match options.kind:
        case "sigmoid":
            return f"ln 2 = {math.log(2):.6f} (the model is its own reference)"
        case "ipo":
            return f"1 / (2 beta)² = {1 / (2 * options.beta) ** 2:.6f} (the model is its own reference)"
    return None


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
