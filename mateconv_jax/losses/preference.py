"""Losses over pairs of answers, of which one is preferred: DPO and its kin.

Dimensions in names: B pairs, 2 the chosen and the rejected dialogue, S tokens of a row, V vocabulary.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mateconv_jax.data.rows import Batch, learned_targets
from mateconv_jax.losses.loss_output import LossOutput
from mateconv_jax.losses.next_token import token_losses
from mateconv_jax.model.moe import Routing
from mateconv_jax.model.transformer import Transformer

KINDS = ("sigmoid", "ipo", "orpo", "simpo")
WITH_REFERENCE = ("sigmoid", "ipo")
LARGEST_LOG_PROBABILITY = -1e-6  # of a token on average: the odds of a certain answer are infinite


@dataclasses.dataclass(frozen=True)
class PreferenceOptions:
    """Keys of config.loss.

    Attributes:
      kind: one of KINDS.
      beta: factor of the log-ratios in rewards: the larger, the closer the policy stays to the reference; orpo: weight of the
        odds.
      label_smoothing: probability that a pair is labelled the wrong way round (cDPO).
      gamma: simpo's target margin between the rewards.
      sft_coef: weight of the chosen answer's cross-entropy per token, added to the loss.
    """

    kind: str
    beta: float
    label_smoothing: float
    gamma: float
    sft_coef: float


class ExpertsOverTokens(NamedTuple):
    """Routing statistics of a loss whose weight is not the number of tokens."""

    routing: Routing
    tokens: jax.Array

    def means(self, weight: jax.Array) -> dict[str, jax.Array]:
        return self.routing.means(jnp.maximum(self.tokens, 1))


class Answers(NamedTuple):
    """What the model says of the answers of a batch.

    Attributes:
      log_prob_B2: fp32, summed over the learned tokens.
      tokens_B2: fp32, their number.
      routing: see moe.Routing; None without experts.
    """

    log_prob_B2: jax.Array
    tokens_B2: jax.Array
    routing: Routing | None


def score_answers(model: Transformer, batch: Batch, key_B=None, remat: str = "none") -> Answers:
    """Log-probabilities of both answers of every pair.

    Args:
      batch: pairs, see data/rows.py.
      key_B: dropout key per pair; None: no dropout.
      remat: see Transformer.
    """
    B = batch["tokens"].shape[0]
    rows = {name: batch[name].reshape(2 * B, *batch[name].shape[2:]) for name in ("tokens", "length", "learned")}
    keys = None if key_B is None else jax.vmap(lambda key: jax.random.split(key))(key_B).reshape(2 * B)
    tokens_RS1 = rows["tokens"].astype(jnp.int32)
    is_learned_RS = learned_targets(rows)
    logits_RSV, routing = model.logits_and_routing(tokens_RS1[:, :-1], None, keys, remat, is_learned_RS)
    losses_RS, _ = token_losses(logits_RSV, tokens_RS1[:, 1:])
    log_prob_R = -jnp.sum(losses_RS, axis=1, where=is_learned_RS)
    tokens_R = jnp.sum(is_learned_RS, axis=1, dtype=jnp.float32)
    return Answers(log_prob_R.reshape(B, 2), tokens_R.reshape(B, 2), routing)


def preference_loss(
    model: Transformer, batch: Batch, key_B=None, *, options: PreferenceOptions, remat: str = "none"
) -> LossOutput:
    """The loss of pairs, in nats; every pair weighs the same.

    Args:
      batch: pairs, see data/rows.py; for the kinds WITH_REFERENCE also `reference` (B, 2) fp32, the summed log-probabilities
        of the answers under the reference.
      key_B: dropout key per pair; None: no dropout.

    Returns:
      LossOutput with a weight of 1 per pair, of those whose length is not 0. For a mixture of experts the objective includes
      the auxiliary loss, a mean over a pair's rows. Metrics:
        dpo/margin: between the rewards.
        dpo/accuracy: share of pairs whose chosen answer has the higher reward.
        dpo/chosen_logp, dpo/rejected_logp: sums over an answer's tokens.
        dpo/kl: an estimate of the KL divergence from the reference, half the squared log-ratio of both answers (k2 in
          Schulman, 2020). Near 0 it is what it says; where it is large, the model has gone far.
    """
    answers = score_answers(model, batch, key_B, remat)
    is_pair_B = batch["length"][:, 0] > 0
    loss_B, reward_B2 = pair_losses(answers, batch.get("reference"), options)

    def total(x_B):
        return jnp.sum(x_B, where=is_pair_B, dtype=jnp.float32)

    objective = loss = total(loss_B)
    margin_B = jax.lax.stop_gradient(reward_B2[:, 0] - reward_B2[:, 1])
    metrics: dict[str, Any] = {
        "dpo/margin": total(margin_B),
        "dpo/accuracy": total(margin_B > 0),
        "dpo/chosen_logp": total(answers.log_prob_B2[:, 0]),
        "dpo/rejected_logp": total(answers.log_prob_B2[:, 1]),
    }
    if options.kind in WITH_REFERENCE:
        metrics["dpo/kl"] = total(jnp.mean((answers.log_prob_B2 - batch["reference"]) ** 2, axis=1) / 2)
    if answers.routing is not None:
        objective += jnp.sum(answers.routing.auxiliary_loss_of_rows) / 2
        metrics["experts"] = ExpertsOverTokens(answers.routing, jnp.sum(answers.tokens_B2))
    return LossOutput(loss, total(jnp.ones_like(loss_B)), objective, metrics)


def pair_losses(answers: Answers, reference_B2, options: PreferenceOptions) -> tuple[jax.Array, jax.Array]:
    """(loss (B,), rewards (B, 2)) of pairs.

    sigmoid: DPO (Rafailov et al., 2023), with label_smoothing cDPO (Mitchell, 2023); ipo: Azar et al., 2023, on log-ratios per
    token as in TRL; simpo: Meng et al., 2024; orpo: Hong et al., 2024, its cross-entropy per token and pair as in the paper.
    """
    beta = options.beta
    per_token_B2 = answers.log_prob_B2 / jnp.maximum(answers.tokens_B2, 1)
    match options.kind:
        case "sigmoid":
            reward_B2 = beta * (answers.log_prob_B2 - reference_B2)
            loss_B = _smoothed(reward_B2[:, 0] - reward_B2[:, 1], options.label_smoothing)
        case "ipo":
            ratio_B2 = per_token_B2 - reference_B2 / jnp.maximum(answers.tokens_B2, 1)
            reward_B2 = beta * ratio_B2
            loss_B = (ratio_B2[:, 0] - ratio_B2[:, 1] - 1 / (2 * beta)) ** 2
        case "simpo":
            reward_B2 = beta * per_token_B2
            loss_B = _smoothed(reward_B2[:, 0] - reward_B2[:, 1] - options.gamma, options.label_smoothing)
        case "orpo":
            reward_B2 = beta * per_token_B2
            log_odds_B2 = _log_odds(per_token_B2)
            loss_B = -per_token_B2[:, 0] - beta * jax.nn.log_sigmoid(log_odds_B2[:, 0] - log_odds_B2[:, 1])
        case kind:
            raise ValueError(f"no preference loss {kind!r}")
    return loss_B - options.sft_coef * per_token_B2[:, 0], reward_B2


def _smoothed(margin_B, label_smoothing: float):
    """Cross-entropy of the labels under P(chosen is better) = sigmoid(margin)."""
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(margin_B) - label_smoothing * jax.nn.log_sigmoid(-margin_B)


def _log_odds(log_prob):
    log_prob = jnp.minimum(log_prob, LARGEST_LOG_PROBABILITY)
    return log_prob - jnp.log(-jnp.expm1(log_prob))
