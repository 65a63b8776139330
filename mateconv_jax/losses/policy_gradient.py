"""The clipped policy gradient of GRPO (Shao et al., 2024) and its relatives, by the names that TRL gives them.

Dimensions in names: B rows, S tokens of a row, V vocabulary; G answers of a prompt, N answers of a step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mateconv_jax.data.rows import Batch, learned_targets
from mateconv_jax.losses.loss_output import LossOutput
from mateconv_jax.losses.next_token import token_losses
from mateconv_jax.model.moe import Routing
from mateconv_jax.model.transformer import Transformer

KINDS = ("grpo", "bnpo", "dapo", "dr_grpo")
SCALES = ("group", "batch", "none")


class TokenTotals(NamedTuple):
    """Sums over the tokens of all answers, fp32, for LossOutput.metrics.

    Attributes:
      tokens: how many.
      entropy: of the policy at each, in nats.
      clipped: those whose ratio the loss clips, so that they have no gradient.
      kl: estimated divergence from the reference, in nats; None without one.
      routing: of a mixture of experts; None without one.
    """

    tokens: jax.Array
    entropy: jax.Array
    clipped: jax.Array
    kl: jax.Array | None
    routing: Routing | None

    def means(self, weight: jax.Array) -> dict[str, jax.Array]:
        tokens = jnp.maximum(self.tokens, 1)
        means = {"grpo/entropy": self.entropy / tokens, "grpo/clip_share": self.clipped / tokens}
        if self.kl is not None:
            means["grpo/kl"] = self.kl / tokens
        return means if self.routing is None else means | self.routing.means(tokens)


def policy_gradient_loss(
    model: Transformer,
    batch: Batch,
    key_B=None,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    beta: float = 0.0,
    temperature: float = 1.0,
    remat: str = "none",
) -> LossOutput:
    """-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) + beta KL for every token of an answer, where r is the ratio of its
    probability to that when it was sampled, and A its answer's advantage.

    KL is the estimator k3 of Schulman (2020), exp(d) - d - 1 with d the reference's log-probability less the policy's.

    Args:
      batch: rows, see data/rows.py, in which an answer's tokens are `learned`; with
        advantage     (B,) fp32, see `advantages`
        token_weight  (B,) fp32, what a token's loss counts for, see `token_weights`; 0: the row gives no update
        old_log_probs (B, S) fp32, of the targets when they were sampled; missing: they are the policy's own, so that r is 1
        reference_log_probs (B, S) fp32, with beta.
      key_B: dropout key per row; None: no dropout.
      epsilon_high: DAPO's clip-higher (Yu et al., 2025); None: epsilon.
      temperature: probabilities are those at this temperature, with which the answers were sampled.
      remat: see Transformer.

    Returns:
      LossOutput with a weight of 1 per row, and TokenTotals. A mixture of experts adds what it adds to next_token_loss.
    """
    is_answer_BS = learned_targets(batch)
    log_probs_BS, entropy_BS, routing = log_probs(model, batch, key_B, temperature, remat)
    old_BS = batch.get("old_log_probs", jax.lax.stop_gradient(log_probs_BS))
    ratio_BS = jnp.exp(jnp.where(is_answer_BS, log_probs_BS - old_BS, 0))
    low, high = 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high)
    advantage_B1 = batch["advantage"][:, None]
    losses_BS = -jnp.minimum(ratio_BS * advantage_B1, jnp.clip(ratio_BS, low, high) * advantage_B1)
    is_clipped_BS = (ratio_BS < low) & (advantage_B1 < 0) | (ratio_BS > high) & (advantage_B1 > 0)
    kl_BS = None
    if beta:
        difference_BS = jnp.where(is_answer_BS, batch["reference_log_probs"] - log_probs_BS, 0)
        kl_BS = jnp.exp(difference_BS) - difference_BS - 1
        losses_BS += beta * kl_BS
    objective = loss = jnp.sum(batch["token_weight"] * jnp.sum(losses_BS, axis=1, where=is_answer_BS))
    n_rows = jnp.float32(len(is_answer_BS))

    def total(x_BS):
        return jnp.sum(jax.lax.stop_gradient(x_BS), where=is_answer_BS, dtype=jnp.float32)

    if routing is not None:  # of which a row gets the mean over tokens
        objective += n_rows * jnp.sum(routing.auxiliary_loss) / jnp.maximum(total(is_answer_BS), 1)
    kl = None if kl_BS is None else total(kl_BS)
    totals = TokenTotals(total(is_answer_BS), total(entropy_BS), total(is_clipped_BS), kl, jax.lax.stop_gradient(routing))
    return LossOutput(loss, n_rows, objective, {"tokens": totals})  # pyrefly: ignore[bad-assignment]


def log_probs(model: Transformer, batch: Batch, key_B=None, temperature: float = 1.0, remat: str = "none"):
    """Each target's log-probability and the entropy of the distribution it is from, both fp32 (B, S) in nats, and the routing
    of experts (None: no mixture).
    """
    tokens_BS1 = batch["tokens"].astype(jnp.int32)
    logits_BSV, routing = model.logits_and_routing(tokens_BS1[:, :-1], None, key_B, remat, learned_targets(batch))
    if temperature != 1:
        logits_BSV = logits_BSV.astype(jnp.float32) / temperature
    losses_BS, log_sums_BS = token_losses(logits_BSV, tokens_BS1[:, 1:])
    fixed_BSV = jax.lax.stop_gradient(logits_BSV).astype(jnp.float32)
    log_sums_BS = jax.lax.stop_gradient(log_sums_BS)
    mean_logit_BS = jnp.sum(jnp.exp(fixed_BSV - log_sums_BS[..., None]) * fixed_BSV, axis=-1)
    return -losses_BS, log_sums_BS - mean_logit_BS, routing


# ---- of a step's answers, on the host ---------------------------------------------------------------------------


def advantages(reward_N: np.ndarray, n_samples: int, scale: str = "group") -> tuple[np.ndarray, np.ndarray]:
    """How much better an answer is than the mean of its prompt's answers.

    Args:
      reward_N: NaN: the answer has no reward; it counts in no mean, and has no advantage. Those of a prompt are next to each
        other.
      n_samples: answers of a prompt.
      scale: divide by the standard deviation (with n - 1) plus 1e-4 of a prompt's rewards, "group"; of the step's, "batch";
        "none": not at all (Dr. GRPO, Liu et al., 2025).

    Returns:
      (fp32 (N,), bool (N,): whether the answer teaches anything: it has a reward, and its prompt's rewards are not all equal)
    """
    reward_PG = np.asarray(reward_N, np.float64).reshape(-1, n_samples)
    has_reward_PG = ~np.isnan(reward_PG)
    filled_PG = np.where(has_reward_PG, reward_PG, 0)
    n_P1 = np.maximum(has_reward_PG.sum(axis=1, keepdims=True), 1)
    mean_P1 = filled_PG.sum(axis=1, keepdims=True) / n_P1
    centred_PG = np.where(has_reward_PG, reward_PG - mean_P1, 0)
    highest_P1 = np.max(np.where(has_reward_PG, reward_PG, -np.inf), axis=1, keepdims=True)
    lowest_P1 = np.min(np.where(has_reward_PG, reward_PG, np.inf), axis=1, keepdims=True)
    teaches_PG = has_reward_PG & (highest_P1 > lowest_P1)
    deviation = 1.0
    if scale == "group":
        deviation = np.sqrt((centred_PG**2).sum(axis=1, keepdims=True) / np.maximum(n_P1 - 1, 1)) + 1e-4
    elif scale == "batch":
        rewards = reward_PG[has_reward_PG]
        deviation = (np.std(rewards, ddof=1) if len(rewards) > 1 else 0.0) + 1e-4
    advantage_PG = np.where(teaches_PG, centred_PG / deviation, 0)
    return advantage_PG.astype(np.float32).ravel(), teaches_PG.ravel()


def token_weights(kind: str, n_tokens_AB: np.ndarray, max_new_tokens: int) -> np.ndarray:
    """What a token's loss counts for, (A, B) fp32, so that the mean over all rows of the weighted sums over tokens is

    grpo     the mean over answers of the mean over their tokens
    bnpo     the mean over micro-batches of the mean over their tokens
    dapo     the mean over all tokens of the step (Yu et al., 2025)
    dr_grpo  the sum over tokens, divided by answers x max_new_tokens (Liu et al., 2025)

    Args:
      n_tokens_AB: tokens of each answer in A micro-batches of B.
    """
    n_tokens_AB = np.asarray(n_tokens_AB, np.float64)
    A, B = n_tokens_AB.shape
    match kind:
        case "grpo":
            weights_AB = 1 / np.maximum(n_tokens_AB, 1)
        case "bnpo":
            weights_AB = np.broadcast_to(B / np.maximum(n_tokens_AB.sum(axis=1, keepdims=True), 1), (A, B))
        case "dapo":
            weights_AB = np.full((A, B), A * B / max(n_tokens_AB.sum(), 1))
        case "dr_grpo":
            weights_AB = np.full((A, B), 1 / max_new_tokens)
        case _:
            raise ValueError(f"kind: {kind!r} (expected {' or '.join(KINDS)})")
    return weights_AB.astype(np.float32)
