"""Cross-entropy of the next token.

Dimensions in names: B rows, S tokens of a row, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx


# With a gradient of its own: the derivative of take_along_axis is a scatter into fp32 logits, 0.3 GB more at 32 x 512 x 6,400.
@jax.custom_vjp
def token_losses(logits_BSV, targets_BS):
    """Cross-entropy of each target in nats and the log-sum-exp of its logits, fp32 (B, S) both, whatever the logits are."""
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


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """document_start: the id that begins a document, for attention within documents only; None: over the whole row.
    z_loss: weight of the squared log-sum-exp (PaLM, Chowdhery et al., 2022). remat: see Transformer.
    """

    document_start: int | None = None
    z_loss: float = 0.0
    remat: str = "none"


def summed_loss(graph: nnx.GraphDef, params: nnx.State, batch: dict[str, jax.Array], options=LossOptions(), dropout_key_B=None):
    """Cross-entropy summed over the batch's real targets, and how many there are.

    Args:
      batch: tokens (B, S + 1), any integer type; length (B,), how many of a row's tokens are real.
      dropout_key_B: a key of each row; None: no dropout.

    Returns:
      (summed cross-entropy in nats, number of targets, summed objective: the same, with z_loss and the experts' auxiliary
      loss; fp32 scalars; moe.Routing of the tokens that have a target, None without experts).
    """
    tokens_BS1 = batch["tokens"].astype(jnp.int32)
    inputs_BS, targets_BS = tokens_BS1[:, :-1], tokens_BS1[:, 1:]
    documents_BS = None if options.document_start is None else jnp.cumsum(inputs_BS == options.document_start, axis=1)
    is_real_BS = jnp.arange(inputs_BS.shape[1]) < batch["length"][:, None] - 1
    model = nnx.merge(graph, params)
    logits_BSV, routing = model.logits_and_routing(inputs_BS, documents_BS, dropout_key_B, options.remat, is_real_BS)
    losses_BS, log_sums_BS = token_losses(logits_BSV, targets_BS)
    loss = jnp.sum(losses_BS, where=is_real_BS)
    objective = loss + options.z_loss * jnp.sum(log_sums_BS**2, where=is_real_BS) if options.z_loss else loss
    if routing is not None:
        objective += jnp.sum(routing.auxiliary_loss)
    return loss, jnp.sum(is_real_BS, dtype=jnp.float32), objective, routing
