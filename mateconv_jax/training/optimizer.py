"""AdamW with warm-up and cosine."""

import jax
import optax
from ml_collections import ConfigDict


def make_schedule(training: ConfigDict, total_steps: int) -> optax.Schedule:
    """Learning rate of the update made at a step (0 for the first): linear from 0, then half a cosine down to min_lr.

    Equals transformers' `get_cosine_with_min_lr_schedule_with_warmup` with int(warmup_ratio * total_steps) warm-up steps.
    """
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=training.learning_rate,
        warmup_steps=int(training.warmup_ratio * total_steps),
        decay_steps=total_steps,
        end_value=training.min_lr,
    )


def make_optimizer(training: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW (Loshchilov & Hutter, 2019) with decay on matrices only, as PyTorch's AdamW with
    two parameter groups.
    """
    adamw = optax.adamw(
        schedule,
        b1=training.beta1,
        b2=training.beta2,
        weight_decay=training.weight_decay,
        mask=lambda params: jax.tree.map(lambda p: p.ndim >= 2, params),
    )
    return optax.chain(optax.clip_by_global_norm(training.grad_clip), adamw) if training.grad_clip else adamw
