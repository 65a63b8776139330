"""The loss, the training step and the evaluation step: pure functions under jit.

Dimensions in names: A micro-batches of a step, B rows of one, S tokens of a row, V vocabulary.
"""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from ml_collections import ConfigDict

from mateconv_jax import xla_flags
from mateconv_jax.model.deterministic_attention import deterministic_attention
from mateconv_jax.model.moe import Routing
from mateconv_jax.training import data_parallel, norms
from mateconv_jax.training.train_state import TrainState


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


def make_train_step(
    graph: nnx.GraphDef,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    training: ConfigDict,
    options=LossOptions(),
    abstract_state: TrainState | None = None,
):
    """The jitted step `(state, batch) -> (state, metrics)`; the state is donated.

    batch: tokens (A, B, S + 1) and length (A, B), A = training.accumulation_steps: the gradient is the mean over all their
    tokens. Where it is not finite, or the loss a spike (training.skip_spikes), the update is left out: parameters, EMA and
    optimizer state stay, the step counts on.

    abstract_state: shapes with the shardings that the state keeps; None: of one device.

    metrics, fp32 scalars on the device: train/loss (mean over the tokens, before the update), grad_norm (before clipping), lr,
    update_to_weight (ratio of norms), bad_steps, loss_scale in float16, those of `routing_metrics`; and leaf_norms, the
    gradient's norm of each leaf, in the order of jax.tree.leaves.
    """

    def sums(params, batch, step, scale, device=0, gather=lambda params: params):
        """Of the rows in `batch`: (summed loss, number of targets, moe.Routing or None), and the gradient of the objective
        times factor; and factor.

        device: number of the device whose rows they are.
        """
        A, B, S1 = batch["tokens"].shape
        # Divided by a constant first, so that a sum over many tokens cannot overflow in float16.
        factor = scale / (A * B * (S1 - 1))
        step_key = jax.random.fold_in(jax.random.key(training.seed), step)

        def scaled(params, micro_batch, i):
            key_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(step_key, i), device * B + jnp.arange(B))
            loss, count, objective, routing = summed_loss(graph, gather(params), micro_batch, options, key_B)
            return objective * factor, (loss, count, routing)

        def accumulate(sums, micro_batch_and_i):
            (_, totals), grads = jax.value_and_grad(scaled, has_aux=True)(params, *micro_batch_and_i)
            return jax.tree.map(jnp.add, sums, (totals, grads)), None

        first = jax.tree.map(lambda x: x[0], batch)
        if A == 1:
            (_, totals), grads = jax.value_and_grad(scaled, has_aux=True)(params, first, 0)
        else:
            shapes = jax.eval_shape(scaled, params, first, 0)[1]
            zeros = jax.tree.map(jnp.zeros_like, (shapes, params))
            (totals, grads), _ = jax.lax.scan(accumulate, zeros, (batch, jnp.arange(A)))
        return totals, grads, factor

    if abstract_state is not None:
        c = nnx.merge(graph, abstract_state.params).c
        if abstract_state.step.sharding.mesh.size > 1:
            sums = data_parallel.over_devices(sums, abstract_state.params, training.grad_allreduce_dtype, c.dtype)

    def gradients(state: TrainState, batch):
        scale = jnp.float32(1) if state.loss_scale is None else state.loss_scale.scale
        (loss, count, routing), grads, factor = sums(state.params, batch, state.step, scale)
        count = jnp.maximum(count, 1)
        metrics = {"train/loss": loss / count, **routing_metrics(routing, count)}
        return metrics, jax.tree.map(lambda g: g / (factor * count), grads)

    def train_step(state: TrainState, batch):
        metrics, grads = gradients(state, batch)
        loss = metrics["train/loss"]
        squares = norms.squares_by_leaf(grads)
        grad_norm = jnp.sqrt(jnp.sum(squares))
        finite = good = jnp.isfinite(grad_norm) & jnp.isfinite(loss)
        if training.skip_spikes:
            good &= ~state.loss_average.is_spike(loss, training.skip_spikes)
        lr = schedule(state.step)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        updates = jax.tree.map(lambda u: lr * u, updates)
        params = optax.apply_updates(state.params, updates)
        ema_params = state.ema_params
        if ema_params is not None:  # ema <- decay * ema + (1 - decay) * params
            ema_params = optax.incremental_update(params, ema_params, 1 - ema_decay_at(training, state.step))

        def if_good(new, old):
            return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)

        metrics |= {
            "grad_norm": grad_norm,
            "lr": lr,
            "update_to_weight": norms.norm_beside(updates) / norms.norm_beside(state.params),
            "leaf_norms": jnp.sqrt(squares),
        }
        loss_scale = state.loss_scale
        if loss_scale is not None:
            metrics["loss_scale"] = loss_scale.scale
            loss_scale = loss_scale.update(finite)
        bad_steps = metrics["bad_steps"] = jnp.where(good, 0, state.bad_steps + 1)
        params, ema_params, opt_state = if_good(
            (params, ema_params, opt_state), (state.params, state.ema_params, state.opt_state)
        )
        return TrainState(
            state.step + 1, params, ema_params, opt_state, loss_scale, state.loss_average.update(loss), bad_steps
        ), metrics

    if abstract_state is None:
        return jax.jit(train_step, donate_argnums=0)
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state)
    compiler_options = xla_flags.compiler_options(c.platform, training.deterministic)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=compiler_options)


def lower(train_step, state: TrainState, batch, training: ConfigDict) -> jax.stages.Lowered:
    """The step of `make_train_step` lowered for arrays, or shapes with shardings, of that kind."""
    with deterministic_attention() if training.deterministic else contextlib.nullcontext():
        return train_step.lower(state, batch)


def routing_metrics(routing: Routing | None, count: jax.Array) -> dict[str, jax.Array]:
    """Of a mixture of experts, means over `count` tokens: train/auxiliary_loss (not in train/loss), experts/entropy (of the
    gates' scores, in nats; ln E: they do not choose); and, of all layers, experts/most_loaded and experts/least_loaded: an
    expert's share of its layer's choices (1 / E: even).
    """
    if routing is None:
        return {}
    share_LE = routing.chosen_E / jnp.maximum(jnp.sum(routing.chosen_E, axis=1, keepdims=True), 1)
    return {
        "train/auxiliary_loss": jnp.sum(routing.auxiliary_loss) / count,
        "experts/entropy": jnp.mean(routing.entropy) / count,
        "experts/most_loaded": jnp.max(share_LE),
        "experts/least_loaded": jnp.min(share_LE),
    }


def ema_decay_at(training: ConfigDict, step: jax.Array) -> jax.Array:
    """ema_decay, and with ema_warmup at most (1 + step) / (10 + step), so that the first steps are forgotten (TensorFlow's
    ExponentialMovingAverage with num_updates).
    """
    if not training.ema_warmup:
        return jnp.float32(training.ema_decay)
    return jnp.minimum(training.ema_decay, (1.0 + step) / (10.0 + step))


def make_eval_step(graph: nnx.GraphDef, options=LossOptions()):
    """The jitted `(params, batch) -> (summed cross-entropy, number of targets)`; batch as for `summed_loss`."""
    return jax.jit(lambda params, batch: summed_loss(graph, params, batch, options)[:2])
