"""The loss, the training step and the evaluation step: pure functions under jit.

Dimensions in names: A micro-batches of a step, B rows of one, S tokens of a row, V vocabulary.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from ml_collections import ConfigDict

from mateconv_jax.losses.next_token import LossOptions, summed_loss
from mateconv_jax.model.moe import Routing
from mateconv_jax.runtime import xla_flags
from mateconv_jax.training import gradient_sums, norms
from mateconv_jax.training.train_state import TrainState


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
            sums = gradient_sums.over_devices(sums, abstract_state.params, training.grad_allreduce_dtype, c.dtype)

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
    compiler_options = xla_flags.compiler_options(c.platform)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=compiler_options)


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
