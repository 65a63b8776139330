"""The loss, the training step and the evaluation step: pure functions under jit."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mateconv_jax.training.train_state import TrainState


def token_losses(logits_BSV, targets_BS):
    """Cross-entropy of each target in nats, fp32 (B, S). The log-sum-exp is fp32 whatever the logits are."""
    logits_BSV = logits_BSV.astype(jnp.float32)
    target_logits_BS = jnp.take_along_axis(logits_BSV, targets_BS[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BSV, axis=-1) - target_logits_BS


def summed_loss(graph: nnx.GraphDef, params: nnx.State, batch: dict[str, jax.Array]):
    """Cross-entropy summed over the batch's real targets, and how many there are.

    Args:
      batch: tokens (B, S + 1), any integer type; length (B,), how many of a row's tokens are real.

    Returns:
      (summed loss in nats, number of targets), fp32 scalars.
    """
    tokens_BS1 = batch["tokens"].astype(jnp.int32)
    logits_BSV = nnx.merge(graph, params)(tokens_BS1[:, :-1])
    losses_BS = token_losses(logits_BSV, tokens_BS1[:, 1:])
    is_real_BS = jnp.arange(losses_BS.shape[1]) < batch["length"][:, None] - 1
    return jnp.sum(losses_BS, where=is_real_BS), jnp.sum(is_real_BS, dtype=jnp.float32)


def make_train_step(graph: nnx.GraphDef, tx: optax.GradientTransformation, schedule: optax.Schedule, ema_decay: float):
    """The jitted step `(state, batch) -> (state, metrics)`; the state is donated.

    metrics: train/loss (mean over the batch's tokens, before the update), grad_norm (before clipping), lr; fp32 scalars on
    the device.
    """

    def mean_loss(params, batch):
        loss_sum, count = summed_loss(graph, params, batch)
        return loss_sum / jnp.maximum(count, 1)

    def train_step(state: TrainState, batch):
        loss, grads = jax.value_and_grad(mean_loss)(state.params, batch)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = state.ema_params
        if ema_params is not None:  # ema <- decay * ema + (1 - decay) * params
            ema_params = optax.incremental_update(params, ema_params, 1 - ema_decay)
        metrics = {"train/loss": loss, "grad_norm": optax.tree.norm(grads), "lr": schedule(state.step)}
        return TrainState(state.step + 1, params, ema_params, opt_state), metrics

    return jax.jit(train_step, donate_argnums=0)


def make_eval_step(graph: nnx.GraphDef):
    """The jitted `(params, batch) -> (summed loss, number of targets)`."""
    return jax.jit(lambda params, batch: summed_loss(graph, params, batch))
