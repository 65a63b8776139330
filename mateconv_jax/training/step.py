"""The training step and the evaluation step: pure functions under jit, of any loss and any batch.

A batch is a tree of arrays whose leading dimensions are A micro-batches and B rows, in evaluation only B rows. Only the loss
knows more about it.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from mateconv_jax.losses.loss_output import LossOutput
from mateconv_jax.losses.preference import score_answers
from mateconv_jax.model.attention.deterministic import deterministic_attention
from mateconv_jax.runtime import sharding, xla_flags
from mateconv_jax.training import gradient_sums, norms
from mateconv_jax.training.train_state import TrainState

LossFn = Callable[..., LossOutput]  # (model, batch, key_B): see LossOutput


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """How a step turns a batch into an update: keys of config.training."""

    seed: int
    skip_spikes: float
    grad_allreduce_dtype: str
    ema_decay: float
    ema_warmup: bool


def make_train_step(
    graph: nnx.GraphDef,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    options: StepOptions,
    abstract_state: TrainState | None = None,
):
    """The jitted step `(state, batch) -> (state, metrics)`; the state is donated.

    The gradient is that of the objective summed over all A micro-batches and devices, divided by their summed weight. If it is
    not finite, or the loss is a spike (skip_spikes), the update is skipped: parameters, EMA and optimizer state stay, the step
    is counted.

    Args:
      abstract_state: shapes with the shardings that the state keeps; None: everything is on one device.

    Returns:
      metrics, fp32 scalars on the device: LossOutput.means before the update, grad_norm (before clipping), lr,
      update_to_weight (ratio of norms), bad_steps (consecutive skipped updates), loss_scale in float16; and leaf_norms, the
      gradient norm of each leaf, in the order of jax.tree.leaves.
    """
    sums = functools.partial(gradients_of_sums, graph, loss_fn, options.seed)
    if abstract_state is None:
        return jax.jit(functools.partial(_train_step, sums, tx, schedule, options), donate_argnums=0)
    c = nnx.merge(graph, abstract_state.params).c
    if abstract_state.step.sharding.num_devices > 1:
        sums = gradient_sums.over_devices(sums, abstract_state.params, options.grad_allreduce_dtype, c.dtype)
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state)
    return jax.jit(
        functools.partial(_train_step, sums, tx, schedule, options),
        donate_argnums=0,
        out_shardings=(shardings, None),
        compiler_options=xla_flags.compiler_options(c.platform, c.deterministic),
    )


def lower(train_step, state: TrainState, batch, deterministic: bool) -> jax.stages.Lowered:
    """The step of `make_train_step`, lowered for arrays like these, or for shapes with shardings."""
    with deterministic_attention() if deterministic else contextlib.nullcontext():
        return train_step.lower(state, batch)


def make_eval_step(graph: nnx.GraphDef, loss_fn: LossFn):
    """The jitted `(params, batch) -> (LossOutput.sum, LossOutput.weight, those of its metrics that are plain sums)`."""

    def eval_step(params, batch):
        output = loss_fn(nnx.merge(graph, params), batch, None)
        metrics = {name: total for name, total in output.metrics.items() if not hasattr(total, "means")}
        return output.sum, output.weight, metrics

    return jax.jit(eval_step)


def make_score_step(graph: nnx.GraphDef, mesh: Mesh):
    """The jitted `(params, batch of pairs) -> (B, 2)`: summed log-probabilities of the answers, a copy on every device."""

    def score(params, batch):
        return score_answers(nnx.merge(graph, params), batch).log_prob_B2

    return jax.jit(score, out_shardings=sharding.replicated(mesh))


def gradients_of_sums(graph, loss_fn: LossFn, seed: int, params, batch, step, scale, device=0, gather=lambda params: params):
    """Sums over all rows of `batch`.

    Args:
      device: index of the device that holds these rows. A row's key follows from seed, step and its place in the global batch.
      gather: returns full parameters; gradients are with respect to `params`, which may be shards.

    Returns:
      (LossOutput without its objective, the gradient of the objective times factor, factor).
    """
    A, B = jax.tree.leaves(batch)[0].shape[:2]
    # Divided by a constant first, so that a sum over many tokens cannot overflow in float16; a power of two is exact.
    factor = scale / 2 ** math.floor(math.log2(max(x.size for x in jax.tree.leaves(batch))))
    step_key = jax.random.fold_in(jax.random.key(seed), step)

    def scaled(params, micro_batch, i):
        key_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(step_key, i), device * B + jnp.arange(B))
        output = loss_fn(nnx.merge(graph, gather(params)), micro_batch, key_B)
        # Only the gradient of the objective is needed, not its value: None is an empty tree.
        return output.objective * factor, output._replace(objective=None)  # pyrefly: ignore[bad-argument-type]

    def accumulate(sums, micro_batch_and_i):
        (_, output), grads = jax.value_and_grad(scaled, has_aux=True)(params, *micro_batch_and_i)
        return jax.tree.map(jnp.add, sums, (output, grads)), None

    first = jax.tree.map(lambda x: x[0], batch)
    if A == 1:
        (_, output), grads = jax.value_and_grad(scaled, has_aux=True)(params, first, 0)
    else:
        shapes = jax.eval_shape(scaled, params, first, 0)[1]
        zeros = jax.tree.map(jnp.zeros_like, (shapes, params))
        (output, grads), _ = jax.lax.scan(accumulate, zeros, (batch, jnp.arange(A)))
    return output, grads, factor


def _train_step(sums, tx, schedule, options: StepOptions, state: TrainState, batch):
    scale = jnp.float32(1) if state.loss_scale is None else state.loss_scale.scale
    output, grads, factor = sums(state.params, batch, state.step, scale)
    weight = jnp.maximum(output.weight, 1)
    metrics = output.means(weight)
    grads = jax.tree.map(lambda g: g / (factor * weight), grads)

    loss = metrics["train/loss"]
    squares = norms.squares_by_leaf(grads)
    grad_norm = jnp.sqrt(jnp.sum(squares))
    finite = good = jnp.isfinite(grad_norm) & jnp.isfinite(loss)
    if options.skip_spikes:
        good &= ~state.loss_average.is_spike(loss, options.skip_spikes)

    lr = schedule(state.step)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    updates = jax.tree.map(lambda u: lr * u, updates)
    params = optax.apply_updates(state.params, updates)
    ema_params = state.ema_params
    if ema_params is not None:  # ema <- decay * ema + (1 - decay) * params
        ema_params = optax.incremental_update(params, ema_params, 1 - ema_decay_at(options, state.step))

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
    old, new = (state.params, state.ema_params, state.opt_state), (params, ema_params, opt_state)
    params, ema_params, opt_state = jax.tree.map(lambda new, old: jnp.where(good, new, old), new, old)
    loss_average = state.loss_average.update(loss)
    return TrainState(state.step + 1, params, ema_params, opt_state, loss_scale, loss_average, bad_steps), metrics


def ema_decay_at(options: StepOptions, step: jax.Array) -> jax.Array:
    """ema_decay, with ema_warmup capped at (1 + step) / (10 + step) so that the first steps are forgotten (as TensorFlow's
    ExponentialMovingAverage with num_updates).
    """
    if not options.ema_warmup:
        return jnp.float32(options.ema_decay)
    return jnp.minimum(options.ema_decay, (1.0 + step) / (10.0 + step))
