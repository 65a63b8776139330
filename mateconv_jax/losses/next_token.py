"""Cross-entropy of the next token.

Dimensions in names: B rows, S tokens of a row, V vocabulary.
"""

import jax
import jax.numpy as jnp

from mateconv_jax.data.rows import Batch, learned_targets
from mateconv_jax.losses.loss_output import LossOutput
from mateconv_jax.model.transformer import Transformer


# A custom gradient: that of take_along_axis is a scatter into fp32 logits, 0.3 GB more at 32 x 512 x 6,400.
@jax.custom_vjp
def token_losses(logits_BSV, targets_BS):
    """Cross-entropy of each target in nats and log-sum-exp of its logits, both fp32 (B, S) for logits of any dtype."""
    return _token_losses_forward(logits_BSV, targets_BS)[0]


def _token_losses_forward(logits_BSV, targets_BS):
    target_logits_BS = jnp.take_along_axis(logits_BSV, targets_BS[..., None], axis=-1)[..., 0]
    log_sums_BS = jax.nn.logsumexp(logits_BSV.astype(jnp.float32), axis=-1)
    return (log_sums_BS - target_logits_BS.astype(jnp.float32), log_sums_BS), (logits_BSV, targets_BS, log_sums_BS)


def _token_losses_backward(saved, g):
    logits_BSV, targets_BS, log_sums_BS = saved
    g_losses_BS, g_log_sums_BS = g
    probability_BSV = jnp.exp(logits_BSV.astype(jnp.float32) - log_sums_BS[..., None])
    is_target_BSV = jnp.arange(logits_BSV.shape[-1]) == targets_BS[..., None]
    g_logits_BSV = (g_losses_BS + g_log_sums_BS)[..., None] * probability_BSV
    g_logits_BSV -= jnp.where(is_target_BSV, g_losses_BS[..., None], 0)
    return g_logits_BSV.astype(logits_BSV.dtype), None


token_losses.defvjp(_token_losses_forward, _token_losses_backward)


def next_token_loss(model: Transformer, batch: Batch, key_B=None, z_loss: float = 0.0, remat: str = "none") -> LossOutput:
    """Cross-entropy of the learned targets, in nats.

    Args:
      batch: rows, see data/rows.py. With `document_starts`, attention and positions are confined to documents; with `learned`,
        only those tokens are targets.
      key_B: dropout key per row; None: no dropout.
      z_loss: weight of the squared log-sum-exp (PaLM, Chowdhery et al., 2022), part of the objective only.
      remat: see Transformer.

    Returns:
      LossOutput with a weight of 1 per target. For a mixture of experts the objective includes the auxiliary loss and the
      metrics moe.Routing, both over the tokens that have a target.
    """
    tokens_BS1 = batch["tokens"].astype(jnp.int32)
    inputs_BS, targets_BS = tokens_BS1[:, :-1], tokens_BS1[:, 1:]
    documents_BS = jnp.cumsum(batch["document_starts"][:, :-1], axis=1) if "document_starts" in batch else None
    is_learned_BS = learned_targets(batch)
    logits_BSV, routing = model.logits_and_routing(inputs_BS, documents_BS, key_B, remat, is_learned_BS)
    losses_BS, log_sums_BS = token_losses(logits_BSV, targets_BS)
    objective = loss = jnp.sum(losses_BS, where=is_learned_BS)
    if z_loss:
        objective += z_loss * jnp.sum(log_sums_BS**2, where=is_learned_BS)
    if routing is not None:
        objective += jnp.sum(routing.auxiliary_loss)
    metrics = {} if routing is None else {"experts": routing}
    return LossOutput(loss, jnp.sum(is_learned_BS, dtype=jnp.float32), objective, metrics)
