"""What a recipe's configuration sets, each with its reason, and what the user should know before starting it."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from mateconv_jax import config as config_lib
from mateconv_jax.planning import rules
from mateconv_jax.planning.recipe import Recipe

EVALUATIONS = 20
EVALUATION_SHARE = 0.05  # of the run's time, at most; a batch without its gradient takes a third of one with it


@dataclasses.dataclass(frozen=True)
class Choice:
    """A key of the configuration, its value, and why: measured, derived, or whose advice it is."""

    key: str
    value: Any
    reason: str


def choices(recipe: Recipe, out_dir: str) -> list[Choice]:
    return [*_model(recipe), *_data(recipe, out_dir), *_length(recipe), *_optimizer(recipe), *_intervals(recipe)]


def config_of(chosen: list[Choice]) -> ConfigDict:
    """configs/base.py with what was chosen."""
    config = config_lib.default_config()
    for choice in chosen:
        section, key = choice.key.split(".")
        config[section][key] = choice.value
    return config


def _model(recipe: Recipe) -> list[Choice]:
    data, shape = recipe.data, recipe.shape
    return [
        Choice("model.dim", shape.dim,
               f"with n_layers {recipe.parameters:,} parameters, {shape.non_embedding:,} without the embedding"),
        Choice("model.n_layers", shape.n_layers,
               f"dim / n_layers is {shape.dim / shape.n_layers:.0f}, near the base model's {rules.ASPECT}; a factor of a few "
               "hardly matters (Kaplan et al., 2020)"),
        Choice("model.n_heads", shape.n_heads, f"heads of {shape.head_dim} features"),
        Choice("model.n_kv_heads", shape.n_kv_heads, "half of n_heads, as in the base model, where that is even"),
        Choice("model.vocab_size", data.vocab_size, "the dataset's tokenizer"),
        Choice("model.max_seq_len", data.seq_len, "the dataset's rows"),
    ]  # fmt: skip


def _data(recipe: Recipe, out_dir: str) -> list[Choice]:
    return [
        Choice("data.train_data_path", recipe.data.path, f"{recipe.data.tokens:,} tokens to train on"),
        Choice("data.seq_len", recipe.data.seq_len, "the dataset's rows"),
        Choice("training.out_dir", out_dir, "the run folder"),
    ]


def _length(recipe: Recipe) -> list[Choice]:
    training, best = recipe.layout.training, rules.batch_tokens(recipe.tokens)
    memory, available = recipe.cost.memory / 1e9, recipe.cost.available / 1e9
    found = [
        Choice("training.max_steps", recipe.steps.steps,
               f"{recipe.tokens:,} tokens, {recipe.tokens / recipe.parameters:.3g} for each parameter, {recipe.epochs:.2f} "
               f"epochs: {_why_so_long(recipe)}"),
        Choice("training.batch_size", training.batch_size,
               f"x accumulation_steps x seq_len = {recipe.tokens_per_step:,} tokens a step, the power of two "
               f"next to {best:,.0f} = 0.58 tokens^0.571 (Li et al., 2025)"),
        Choice("training.accumulation_steps", training.accumulation_steps,
               f"as few as fit: {memory:,.1f} of {available:,.1f} GB a device ({recipe.cost.memory_from})"),
    ]  # fmt: skip
    if training.remat != "none":
        reason = "without it a step does not fit; costs a quarter of the speed (benchmarks/README.md)"
        found.append(Choice("training.remat", training.remat, reason))
    if recipe.layout.mesh.fsdp != 1:
        found.append(Choice("mesh.fsdp", recipe.layout.mesh.fsdp, "parameters and optimizer state do not fit one device"))
    return found


def _why_so_long(recipe: Recipe) -> str:
    if recipe.limited_by == "data":
        return f"{rules.MAX_EPOCHS} epochs at most (Muennighoff et al., 2023)"
    if recipe.dial.tokens is not None:
        return "as asked for"
    if recipe.dial.hours is not None:
        return f"what {recipe.dial.hours:g} hours allow at {rules.TOKENS_PER_PARAMETER} a parameter (Hoffmann et al., 2022)"
    return f"{rules.TOKENS_PER_PARAMETER} a parameter (Hoffmann et al., 2022)"


def _optimizer(recipe: Recipe) -> list[Choice]:
    peak = rules.rounded(rules.learning_rate(recipe.shape.dim, recipe.tokens_per_step))
    return [
        Choice("training.learning_rate", peak,
               f"what was best at dim {min(rules.MEASURED_LEARNING_RATES)} to {max(rules.MEASURED_LEARNING_RATES)}, "
               "constant beyond (docs/recipes.md); half or twice as much is worth trying"),
        Choice("training.matrix_lr_ratio", rules.rounded(rules.matrix_lr_ratio(recipe.shape.dim)),
               f"{rules.MATRICES_WIDTH} / dim (muP, Yang et al., 2022; docs/recipes.md)"),
        Choice("training.min_lr", rules.rounded(peak / 10), "a tenth of the peak, as configs/base.py (Hoffmann et al., 2022)"),
        Choice("training.warmup_ratio", rules.warmup_ratio(recipe.steps.steps),
               f"a tenth of all steps, as configs/base.py, but at most about {rules.MAX_WARMUP_STEPS:,} steps"),
        Choice("training.weight_decay", rules.WEIGHT_DECAY, "as configs/base.py (Brown et al., 2020; Hoffmann et al., 2022)"),
    ]  # fmt: skip


def _intervals(recipe: Recipe) -> list[Choice]:
    micro_batches = recipe.steps.steps * recipe.layout.training.accumulation_steps
    batches = max(1, min(100, round(3 * EVALUATION_SHARE * micro_batches / EVALUATIONS)))
    share = f"{100 // EVALUATIONS}%"
    return [
        Choice("training.eval_interval", share, f"{EVALUATIONS} evaluations"),
        Choice("training.eval_iters", batches, f"batches of each; at most {EVALUATION_SHARE:.0%} of the run's time in all"),
        Choice("training.save_interval", share, "what a crash can lose"),
    ]


def warnings(recipe: Recipe) -> list[str]:
    data, dial, found = recipe.data, recipe.dial, []
    if recipe.epochs > rules.MAX_EPOCHS * 1.01:
        found.append(
            f"{recipe.epochs:,.1f} epochs over {data.tokens:,} tokens: beyond {rules.MAX_EPOCHS}, repeated tokens are worth "
            "less and less, and the model begins to learn them by heart (Muennighoff et al., 2023); watch val/loss"
        )
    if recipe.limited_by == "data":
        wanted = rules.TOKENS_PER_PARAMETER * recipe.parameters
        left = f"; that takes {duration(recipe.hours)} of your {dial.hours:g} hours" if dial.hours is not None else ""
        found.append(
            f"the data are the limit: {rules.MAX_EPOCHS} epochs are {rules.MAX_EPOCHS * data.tokens:,} tokens, and "
            f"{recipe.parameters:,} parameters could use {wanted:,}{left}; more text, or --tokens to repeat it more often"
        )
    ratio = recipe.tokens / recipe.parameters
    if dial.parameters is not None and ratio < 0.8 * rules.FEWEST_TOKENS_PER_PARAMETER:
        found.append(f"{ratio:.2g} tokens for each parameter: a smaller model would be as good after the same tokens")
    if recipe.cost.seconds_at_best is None and recipe.cost.memory_from.startswith("an estimate"):
        found.append(
            "memory and time are estimates, since XLA's CUDA compiler is not installed; with it (docs/planning.md says how) "
            "they come from the compiled program"
        )
    if not data.has_validation:
        found.append(f"{data.path!r} has no validation split: set data.val_data_path, or nothing says when it overfits")
    return found


def duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{hours * 60:,.1f} minutes" if hours * 60 >= 1 else f"{hours * 3600:,.3g} seconds"
