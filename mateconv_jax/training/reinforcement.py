"""What learning from reward is made of, from a config."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerFast

from mateconv_jax.data.prompts import Prompts
from mateconv_jax.errors import UserError
from mateconv_jax.generation_config import GenerationConfig
from mateconv_jax.interop.formats import open_model
from mateconv_jax.model.config import ModelConfig
from mateconv_jax.model.transformer import abstract_model
from mateconv_jax.runtime import out_of_memory, sharding
from mateconv_jax.training import initial_weights
from mateconv_jax.training.batch_shape import BatchShape, Position
from mateconv_jax.training.checkpoints import Progress
from mateconv_jax.training.evaluator import Evaluation
from mateconv_jax.training.kept_rollouts import KeptRollouts
from mateconv_jax.training.reference import weights_fingerprint
from mateconv_jax.training.rewards import Rewards, collect
from mateconv_jax.training.rollout_batches import LogProbs, RolloutBatches, RolloutOptions
from mateconv_jax.training.rollouts import LOWER, DecodingWeights, Rollouts


def check(config: ConfigDict) -> None:
    """Raises UserError where keys do not fit each other."""
    training, rollout = config.training, config.rollout
    if training.batch_size % rollout.samples:
        raise UserError(
            f"training.batch_size: {training.batch_size} answers are not a multiple of rollout.samples ({rollout.samples}, the "
            "answers to each prompt)"
        )
    if rollout.max_new_tokens > config.data.seq_len:
        raise UserError(
            f"rollout.max_new_tokens: {rollout.max_new_tokens} leaves no room for a prompt in data.seq_len "
            f"({config.data.seq_len})"
        )


def longest_prompt(config: ConfigDict) -> int:
    """Tokens that a row leaves for its prompt."""
    return config.data.seq_len + 1 - config.rollout.max_new_tokens


def abstract_batch(config: ConfigDict, shape: BatchShape, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """See losses/policy_gradient.py."""
    rows = shape.accumulation_steps, shape.batch_size
    spread = functools.partial(jax.ShapeDtypeStruct, sharding=sharding.batch(mesh, 1))
    batch = {"tokens": spread((*rows, shape.seq_len + 1), jnp.int32), "learned": spread((*rows, shape.seq_len + 1), jnp.bool)}
    batch |= {"length": spread(rows, jnp.int32)}
    batch |= {name: spread(rows, jnp.float32) for name in ("advantage", "token_weight")}
    names = ["old_log_probs"] * (config.rollout.iterations > 1) + ["reference_log_probs"] * bool(config.loss.beta)
    return batch | {name: spread((*rows, shape.seq_len), jnp.float32) for name in names}


def source(
    config: ConfigDict, shape: BatchShape, c: ModelConfig, mesh: Mesh, prompts: Prompts, tokenizer: PreTrainedTokenizerFast,
    start: Position, context,
) -> RolloutBatches:  # fmt: skip
    """
    Args:
      start: from where on steps are of this shape.
      context: see objective.Context.

    Raises:
      UserError: see Rewards; the reference cannot be read; groups cannot be spread over the devices.
    """
    rollout, training = config.rollout, config.training
    if jax.process_count() > 1:
        raise UserError(f"loss.kind: {config.loss.kind} runs in one process, not in {jax.process_count()}")
    if shape.batch_size % (rollout.samples * mesh.size):
        raise UserError(
            f"training.batch_size: {shape.batch_size} answers, {rollout.samples} to a prompt, cannot be spread by prompts over "
            f"{mesh.size} devices (expected a multiple of {rollout.samples * mesh.size})"
        )
    graph, _ = abstract_model(c)
    how = GenerationConfig(
        temperature=rollout.temperature, top_k=rollout.top_k, top_p=rollout.top_p, min_p=rollout.min_p,
        max_new_tokens=rollout.max_new_tokens,
    )  # fmt: skip
    options = RolloutOptions(
        config.loss.kind, config.loss.scale_rewards, rollout.samples, rollout.iterations, rollout.max_new_tokens,
        training.seed, config.data.shuffle,
    )  # fmt: skip
    reference = _reference(config, c, mesh, context.progress) if config.loss.beta else None
    return RolloutBatches(
        prompts, shape, options, DecodingWeights(c, mesh),
        Rollouts(graph, c, mesh, tokenizer, how, longest_prompt(config), rollout.samples, context.end_ids), _rewards(config),
        LogProbs.make(graph, rollout.temperature, reference), KeptRollouts(context.folder), mesh, start, context.should_stop,
    )  # fmt: skip


def _rewards(config: ConfigDict) -> Rewards:
    return Rewards(config.reward.functions, config.reward.weights, config.reward.num_threads)


def _reference(config: ConfigDict, c: ModelConfig, mesh: Mesh, progress: Progress) -> nnx.State:
    """The weights of training.init_from in the compute dtype, sharded as parameters are."""
    if not config.training.init_from:
        raise UserError("training.init_from: missing (with loss.beta it is the model that KL is measured to)")
    abstract = sharding.with_shardings(mesh, abstract_model(c)[1])
    model = open_model(config.training.init_from, "training.init_from", n_heads=config.model.n_heads)
    params = initial_weights.read(model, abstract)
    of = {"weights": weights_fingerprint(params)}
    if progress.reference not in (None, of):
        raise UserError("training.init_from: not the weights that the run began with (expected the same model, or loss.beta 0)")
    progress.reference = of
    return jax.jit(DecodingWeights.cast_to(c.dtype), out_shardings=jax.tree.map(lambda p: p.sharding, abstract))(params)


class RewardEvaluator:
    """Mean reward of the likeliest answers to validation prompts. Called as evaluator.Evaluator."""

    def __init__(
        self, config: ConfigDict, c: ModelConfig, mesh: Mesh, eval_step: Callable, prompts: Prompts,
        tokenizer: PreTrainedTokenizerFast, context,
    ):  # fmt: skip
        """eval_step: not used. context: see objective.Context."""
        how = GenerationConfig(do_sample=False, max_new_tokens=config.rollout.max_new_tokens)
        graph, _ = abstract_model(c)
        self._weights = DecodingWeights(c, mesh)
        self._rollouts = Rollouts(graph, c, mesh, tokenizer, how, longest_prompt(config), 1, context.end_ids)
        self._rewards, self._prompts = _rewards(config), prompts
        self._batch_size = config.training.batch_size
        self._n = min(prompts.n_prompts, config.training.eval_iters * self._batch_size)

    def __call__(self, weights: dict[str, nnx.State], should_stop: Callable[[], bool] = lambda: False) -> Evaluation | None:
        """{name: parameters} on the same prompts, in order; None if `should_stop` became true before the end. The loss is the
        mean reward with its sign changed; an answer without a reward counts 0.
        """
        sums = {}
        for name, params in weights.items():
            with out_of_memory.as_user_error(*LOWER):
                reward_FN = self._reward(self._weights(params), should_stop)
            if reward_FN is None:
                return None
            of_functions = dict(zip(self._rewards.names, np.nansum(reward_FN, axis=1).tolist(), strict=True))
            sums[name] = {"reward": float(np.nansum(self._rewards.total(reward_FN)))} | of_functions
        return Evaluation(self._n, self._n, 0, {name: -of["reward"] for name, of in sums.items()}, sums)

    def _reward(self, weights: nnx.State, should_stop: Callable[[], bool]) -> np.ndarray | None:
        """(F, n)"""
        futures = []
        for first in range(0, self._n, self._batch_size):
            numbers = np.arange(first, first + self._batch_size) % self._n  # the last batch is filled up
            prompts, are_texts = self._prompts.tokens(numbers)
            answers = self._rollouts(weights, prompts, 0, 0, should_stop, are_texts)
            if answers is None:
                return None
            for i, answer in zip(range(first, min(first + self._batch_size, self._n)), answers, strict=False):
                futures.append(self._rewards.start(self._prompts.prompts[i], [answer], self._prompts.records[i]))
        return collect(futures, should_stop)
