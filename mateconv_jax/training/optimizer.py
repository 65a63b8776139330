"""Learning-rate schedules and optimizers, all of them optax's."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers, muon

from mateconv_jax.model.config import ModelConfig
from mateconv_jax.training import norms


@dataclasses.dataclass(frozen=True)
class ScheduleOptions:
    """The learning rate over a run: keys of config.training."""

    learning_rate: float
    min_lr: float
    lr_scheduler: str
    warmup_ratio: float
    warmup_steps: int | None
    lr_power: float
    decay_ratio: float


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """What an update is computed with: keys of config.training."""

    optimizer_type: str
    beta1: float
    beta2: float
    adam_eps: float
    muon_momentum: float
    weight_decay: float
    matrix_lr_ratio: float
    grad_clip: float


def make_schedule(options: ScheduleOptions, total_steps: int) -> optax.Schedule:
    """Learning rate of the update made at a step (0 for the first): linear from 0 over the warm-up, then as lr_scheduler says.

    Each equals a schedule of transformers over the same steps: cosine, get_cosine_with_min_lr_schedule_with_warmup; polynomial,
    get_polynomial_decay_schedule_with_warmup with lr_power; linear, the same with power 1; constant,
    get_constant_schedule_with_warmup; wsd, get_wsd_schedule with linear decay over the last decay_ratio of all steps (except
    for the warm-up, which starts at min_lr there).
    """
    peak, end = options.learning_rate, options.min_lr
    warmup_steps = n_warmup_steps(options, total_steps)
    rest = max(1, total_steps - warmup_steps)
    match options.lr_scheduler:
        case "cosine":
            after = optax.cosine_decay_schedule(peak, rest, alpha=end / peak)
        case "linear":
            after = optax.linear_schedule(peak, end, rest)
        case "polynomial":
            after = optax.polynomial_schedule(peak, end, options.lr_power, rest)
        case "constant":
            after = optax.constant_schedule(peak)
        case "wsd":
            decay_steps = n_decay_steps(options, total_steps)
            after = optax.linear_schedule(peak, end, max(1, decay_steps), transition_begin=rest - decay_steps)
        case other:
            raise ValueError(other)  # config.resolve has checked it
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(1, warmup_steps)), after], [warmup_steps])


def n_warmup_steps(options: ScheduleOptions, total_steps: int) -> int:
    """warmup_steps where given, else warmup_ratio of all steps."""
    return int(options.warmup_ratio * total_steps) if options.warmup_steps is None else options.warmup_steps


def n_decay_steps(options: ScheduleOptions, total_steps: int) -> int:
    """Of wsd: the last steps, in which the learning rate falls."""
    return int(options.decay_ratio * total_steps)


def make_optimizer(options: OptimizerOptions, c: ModelConfig) -> optax.GradientTransformation:
    """Clipping by global norm, then the optimizer at a learning rate of 1: the step multiplies the updates by the schedule, so
    that a skipped update still advances the schedule.

    Weight decay applies to matrices only. It is decoupled, except for adam, which adds it to the gradient as torch.optim.Adam
    does. adamw, adam, adafactor (Shazeer & Stern, 2018) equal torch.optim's; lion: Chen et al., 2023; muon: Jordan, 2024, with
    Moonshot's factor 0.2 sqrt(max(fan)), on the hidden matrices, one per expert, and AdamW on embedding, output layer, norms
    and the experts' gates (which are output layers of E classes).

    The blocks' matrices learn at matrix_lr_ratio times the learning rate, and decay as much less, as torch's parameter groups
    with learning rates of their own do. 64 / dim makes the best rate of a width that of others, too (Yang et al., 2022,
    table 8; measured in docs/recipes.md).
    """
    b1, b2, eps, weight_decay = options.beta1, options.beta2, options.adam_eps, options.weight_decay
    match options.optimizer_type:
        case "adamw":
            tx = optax.adamw(1.0, b1, b2, eps, weight_decay=weight_decay, mask=is_matrix)
        case "adam":
            tx = optax.chain(optax.add_decayed_weights(weight_decay, is_matrix), optax.adam(1.0, b1, b2, eps))
        case "lion":
            tx = optax.lion(1.0, b1, b2, weight_decay=weight_decay, mask=is_matrix)
        case "adafactor":
            tx = optax.chain(
                optax.scale_by_factored_rms(),
                optax.clip_by_block_rms(1.0),
                optax.scale_by_param_block_rms(),
                optax.add_decayed_weights(weight_decay, is_matrix),
                optax.scale(-1.0),
            )
        case "muon":
            adamw = optax.adamw(1.0, b1, b2, eps, weight_decay=weight_decay, mask=is_matrix)
            hidden = muon(
                1.0,
                beta=options.muon_momentum,
                weight_decay=weight_decay,
                muon_weight_dimension_numbers=muon_dimensions,
                consistent_rms=0.2,
            )
            tx = on_parts(optax.partition({"muon": hidden, "adamw": adamw}, muon_labels), c)
        case other:
            raise ValueError(other)  # config.resolve has checked it
    # A resumed run may turn clipping on or off and change the ratio, so the state has the same tree whatever they are.
    clipping = clip(options.grad_clip) if options.grad_clip else optax.identity()
    return optax.chain(clipping, scale_matrices(tx, options.matrix_lr_ratio))


def scale_matrices(tx: optax.GradientTransformation, ratio: float) -> optax.GradientTransformation:
    """`tx` with the updates of the blocks' matrices multiplied by `ratio`."""
    if ratio == 1:
        return tx

    def scale(path, update):
        return ratio * update if path[0].key == "blocks" and update.ndim >= 2 else update

    def update(updates, state, params=None):
        updates, state = tx.update(updates, state, params)
        return jax.tree.map_with_path(scale, updates), state

    return optax.GradientTransformation(tx.init, update)


def clip(max_norm: float) -> optax.GradientTransformation:
    """optax.clip_by_global_norm, with the norm as the step computes it, so that XLA computes it once."""

    def update(grads, _):
        factor = jnp.minimum(1, max_norm / norms.global_norm(grads))
        return jax.tree.map(lambda g: factor * g, grads)

    return optax.stateless(update)


def is_matrix(params):
    return jax.tree.map(lambda p: p.ndim >= 2, params)


# ---- Muon ---------------------------------------------------------------------------------------------------------

# Which axes of a part form the rows and which the columns of its matrix.
_MUON_DIMENSIONS = {
    **{name: MuonDimensionNumbers(2, (0, 1)) for name in ("wq_HND", "wk_KND", "wv_KND")},
    "wo_DHN": MuonDimensionNumbers((1, 2), 0),
    **{name: MuonDimensionNumbers(1, 0) for name in ("w1_FD", "w3_FD", "w2_DF")},
    **{name: MuonDimensionNumbers(2, 1) for name in ("w1_EFD", "w3_EFD", "w2_EDF")},
}


def muon_labels(parts):
    """ "muon" for the hidden matrices, "adamw" for embedding, output layer, norms and gates."""
    return jax.tree.map_with_path(lambda path, _: "muon" if path[-1].key in _MUON_DIMENSIONS else "adamw", parts)


def muon_dimensions(parts):
    return jax.tree.map_with_path(lambda path, _: _MUON_DIMENSIONS[path[-1].key], parts)


def to_parts(params: Any, c: ModelConfig) -> dict:
    """A plain dict in which fused matrices are split: wqkv into wq, wk, wv and w13 into w1, w3."""

    def split(tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        tree = {key: split(value) for key, value in tree.items()}
        if "wqkv_JND" in tree:
            parts = jnp.split(tree.pop("wqkv_JND"), [c.n_heads, c.n_heads + c.n_kv_heads])
            tree |= dict(zip(("wq_HND", "wk_KND", "wv_KND"), parts, strict=True))
        if "w13_2FD" in tree:
            tree["w1_FD"], tree["w3_FD"] = tree.pop("w13_2FD")
        if "w13_E2FD" in tree:
            tree["w1_EFD"], tree["w3_EFD"] = jnp.moveaxis(tree.pop("w13_E2FD"), 1, 0)
        return tree

    return split(nnx.to_pure_dict(params))


def from_parts(parts: Any, like: nnx.State) -> nnx.State:
    """The inverse of `to_parts`, in the structure of `like`."""

    def join(tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        tree = {key: join(value) for key, value in tree.items()}
        if "wq_HND" in tree:
            tree["wqkv_JND"] = jnp.concatenate([tree.pop(key) for key in ("wq_HND", "wk_KND", "wv_KND")])
        if "w1_FD" in tree:
            tree["w13_2FD"] = jnp.stack([tree.pop("w1_FD"), tree.pop("w3_FD")])
        if "w1_EFD" in tree:
            tree["w13_E2FD"] = jnp.stack([tree.pop("w1_EFD"), tree.pop("w3_EFD")], axis=1)
        return tree

    joined = join(parts)
    assert jax.tree.structure(joined) == jax.tree.structure(nnx.to_pure_dict(like))
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(joined))


def on_parts(tx: optax.GradientTransformation, c: ModelConfig) -> optax.GradientTransformation:
    """`tx` applied to split matrices (see to_parts), as if the model stored them separately."""

    def update(updates: Any, state: Any, params: Any = None):
        parts, state = tx.update(to_parts(updates, c), state, to_parts(params, c))
        return from_parts(parts, updates), state

    return optax.GradientTransformation(lambda params: tx.init(to_parts(params, c)), update)
