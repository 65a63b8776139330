"""A step's batch for learning from reward: answers that the current parameters give, and what they are worth.

Dimensions in names: A micro-batches, B rows, S targets of a row, F reward functions, N = A B answers of a step, G of a prompt.
"""

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import Future

import jax
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import Mesh

from mateconv_jax.data import loader
from mateconv_jax.data.prompts import Prompts
from mateconv_jax.inference.text_generator import Generation
from mateconv_jax.losses.policy_gradient import advantages, log_probs, token_weights
from mateconv_jax.runtime import out_of_memory, sharding
from mateconv_jax.training.batch_shape import BatchShape, Position
from mateconv_jax.training.kept_rollouts import KeptRollouts
from mateconv_jax.training.rewards import Rewards, collect
from mateconv_jax.training.rollouts import LOWER, DecodingWeights, Rollouts

Params = nnx.State


@dataclasses.dataclass(frozen=True)
class RolloutOptions:
    """How a rollout becomes a batch.

    Attributes:
      kind, scale_rewards: see losses/policy_gradient.py.
      samples: answers to each prompt.
      iterations: steps that learn from the same answers.
      max_new_tokens: of an answer.
      seed, shuffle: of the prompts' order; seed also of the answers.
    """

    kind: str
    scale_rewards: str
    samples: int
    iterations: int
    max_new_tokens: int
    seed: int
    shuffle: bool


@dataclasses.dataclass(frozen=True)
class LogProbs:
    """Log-probabilities of targets, (A, B, S) fp32, before a step.

    Attributes:
      compute: jitted, (params, batch) -> log-probabilities.
      reference: parameters that KL is measured to; None: it is not.
    """

    compute: Callable
    reference: Params | None

    @staticmethod
    def make(graph: nnx.GraphDef, temperature: float, reference: Params | None) -> "LogProbs":
        def compute(params, batch):
            return jax.lax.map(lambda rows: log_probs(nnx.merge(graph, params), rows, None, temperature)[0], batch)

        return LogProbs(jax.jit(compute), reference)


class RolloutBatches:
    """See batches.Source. It is strictly on-policy where iterations is 1: an update needs all rewards of its answers, and the
    next answers need that update, so only within a step can anything overlap. Rewards of a micro-batch are computed while the
    next one is decoded, and those of the last while the device computes log-probabilities, where the loss needs them.
    """

    def __init__(
        self, prompts: Prompts, shape: BatchShape, options: RolloutOptions, weights: DecodingWeights, rollouts: Rollouts,
        rewards: Rewards, log_probs: LogProbs, kept: KeptRollouts, mesh: Mesh, start: Position,
        should_stop: Callable[[], bool],
    ):  # fmt: skip
        """
        Args:
          start: from where on steps are of this shape.
          should_stop: asked while answers are decoded and scored.
        """
        self._prompts, self._shape, self._options, self._mesh, self._start = prompts, shape, options, mesh, start
        self._weights, self._rollouts, self._rewards, self._log_probs = weights, rollouts, rewards, log_probs
        self._kept, self._should_stop = kept, should_stop
        self._last: tuple[int, dict[str, jax.Array], dict[str, float]] | None = None  # first step, batch, metrics
        self.answers: list[tuple[str, str]] = []  # prompts of the newest rollout, each with an answer and its reward

    def __call__(self, step: int, params: Params) -> dict[str, jax.Array] | None:
        """Fields of policy_gradient_loss, (A, B, …) on the devices; None: should_stop() was true before they were there."""
        first = step - step % self._options.iterations
        if self._last is None or self._last[0] != first:
            with out_of_memory.as_user_error(*LOWER):
                made = (self._kept_from_before(first) if step > first else None) or self._roll_out(first, params)
            if made is None:
                return None
            batch, metrics = made
            if self._options.iterations > 1:
                self._kept.write(first, batch, metrics)
            self._last = first, sharding.to_devices(batch, self._mesh, rows_axis=1), metrics
        return self._last[1]

    def _kept_from_before(self, first: int) -> tuple[dict[str, np.ndarray], dict[str, float]] | None:
        """A rollout that a step has learned from already. One whose steps are all to come is made anew: its file may be of a
        run that went on otherwise.
        """
        made = self._kept.read(first)
        if made is not None and made[0]["length"].shape == (self._shape.accumulation_steps, self._shape.batch_size):
            return made
        logging.warning("not an exact continuation: the answers of step %d are gone: newer weights give others", first)
        return None

    def metrics(self, step: int) -> dict[str, float]:
        """Of the rollout that the step's batch is from."""
        assert self._last is not None and 0 <= step - self._last[0] < self._options.iterations
        return self._last[2]

    def rows_before(self, step: int) -> int:
        """A row is an answer in one of its steps: a prompt is samples x iterations of them."""
        return self._start.rows + (step - self._start.step) * self._shape.rows

    def describe(self, step: int) -> str:
        return f"prompts {self._numbers(step - step % self._options.iterations).tolist()}"

    def _numbers(self, first_step: int) -> np.ndarray:
        """Which prompts a rollout answers."""
        n_prompts, per_step = self._prompts.n_prompts, self._shape.rows // self._options.samples
        position = self.rows_before(first_step) // (self._options.samples * self._options.iterations)
        return loader.rows_at(position + np.arange(per_step), n_prompts, self._options.seed, self._options.shuffle)

    def _roll_out(self, step: int, params: Params) -> tuple[dict[str, np.ndarray], dict[str, float]] | None:
        seconds = {}
        begin = time.perf_counter()
        jax.block_until_ready(params)  # the update before
        seconds["update"], begin = time.perf_counter() - begin, time.perf_counter()

        numbers, samples = self._numbers(step), self._options.samples
        seed = int(np.random.SeedSequence((self._options.seed, step)).generate_state(1)[0])
        weights = self._weights(params)
        answers: list[Generation] = []
        futures: list[list[Future]] = []  # of each prompt, one for each function
        for of_micro_batch in numbers.reshape(self._shape.accumulation_steps, -1):
            prompts, are_texts = self._prompts.tokens(of_micro_batch)
            new = self._rollouts(weights, prompts, seed, len(answers), self._should_stop, are_texts)
            if new is None:
                return None
            for place, i in enumerate(of_micro_batch):
                group = new[place * samples : (place + 1) * samples]
                futures.append(self._rewards.start(self._prompts.prompts[i], group, self._prompts.records[i]))
            answers += new
        del weights  # the step needs their room
        seconds["rollout"], begin = time.perf_counter() - begin, time.perf_counter()

        batch = self._rows(numbers, answers)
        device_log_probs = self._device_log_probs(params, batch)  # dispatched, not waited for
        reward_FN = collect(futures, self._should_stop)
        if reward_FN is None:
            return None
        reward_N = self._rewards.total(reward_FN)
        advantage_N, teaches_N = advantages(reward_N, self._options.samples, self._options.scale_rewards)
        batch |= self._learned_from(advantage_N, teaches_N, batch["learned"].sum(axis=2))
        batch |= jax.device_get(device_log_probs)
        seconds["reward"] = time.perf_counter() - begin
        self.answers = self._shown(numbers, answers, reward_N)
        return batch, self._metrics(answers, reward_FN, reward_N, teaches_N, seconds)

    def _rows(self, numbers: np.ndarray, answers: list[Generation]) -> dict[str, np.ndarray]:
        """tokens, length and learned, see data/rows.py; (A, B, …)."""
        A, B, S1 = self._shape.accumulation_steps, self._shape.batch_size, self._shape.seq_len + 1
        tokens, learned = np.zeros((A * B, S1), np.int32), np.zeros((A * B, S1), bool)
        length = np.zeros(A * B, np.int32)
        for row, answer in enumerate(answers):
            prompt = self._prompts.ids[numbers[row // self._options.samples]]
            length[row] = len(prompt) + len(answer.token_ids)
            tokens[row, : length[row]] = prompt + answer.token_ids
            learned[row, len(prompt) : length[row]] = True
        return loader.micro_batches({"tokens": tokens, "length": length, "learned": learned}, A)

    def _learned_from(self, advantage_N: np.ndarray, teaches_N: np.ndarray, n_tokens_AB: np.ndarray) -> dict[str, np.ndarray]:
        A = self._shape.accumulation_steps
        weight_AB = token_weights(self._options.kind, n_tokens_AB, self._options.max_new_tokens)
        return {"advantage": advantage_N.reshape(A, -1), "token_weight": weight_AB * teaches_N.reshape(A, -1)}

    def _device_log_probs(self, params: Params, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Those that the loss needs, before the first of its steps."""
        of = {}
        if self._options.iterations > 1:
            of["old_log_probs"] = params
        if self._log_probs.reference is not None:
            of["reference_log_probs"] = self._log_probs.reference
        on_devices = sharding.to_devices(batch, self._mesh, rows_axis=1) if of else {}
        return {name: self._log_probs.compute(weights, on_devices) for name, weights in of.items()}

    def _metrics(
        self, answers: list[Generation], reward_FN: np.ndarray, reward_N: np.ndarray, teaches_N: np.ndarray,
        seconds: dict[str, float],
    ) -> dict[str, float]:  # fmt: skip
        n_tokens = sum(len(answer.token_ids) for answer in answers)
        return {
            "grpo/reward": _mean(reward_N),
            **{f"reward/{name}": _mean(of_one_N) for name, of_one_N in zip(self._rewards.names, reward_FN, strict=True)},
            "grpo/length": n_tokens / len(answers),
            "grpo/ended": float(np.mean([answer.finish_reason == "eos" for answer in answers])),
            "grpo/dropped_groups": float(np.sum(~teaches_N.reshape(-1, self._options.samples).any(axis=1))),
            "grpo/unrewarded": float(np.sum(np.isnan(reward_N))),
            "grpo/rollout_tokens_per_s": n_tokens / seconds["rollout"],
            **{f"grpo/seconds_{name}": value for name, value in seconds.items()},
        }

    def _shown(self, numbers: np.ndarray, answers: list[Generation], reward_N: np.ndarray) -> list[tuple[str, str]]:
        samples, texts = self._options.samples, []
        for place, i in enumerate(numbers[:3]):
            prompt = self._prompts.prompts[i]
            text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            texts.append((text, f"{answers[place * samples]} [reward {reward_N[place * samples]:.3g}]"))
        return texts


def _mean(reward_N: np.ndarray) -> float:
    """Of the answers that have a reward; 0 where none has."""
    given = reward_N[~np.isnan(reward_N)]
    return float(given.mean()) if len(given) else 0.0


class AnswersOfRollouts:
    """Stands in for samples.Samples: what the model answered in training."""

    def __init__(self, source: RolloutBatches):
        self._source = source

    def write(self, params: Params) -> list[tuple[str, str]]:
        return self._source.answers
