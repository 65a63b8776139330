"""A recipe: what to train, for how long, on given data and GPUs, from one dial: hours, parameters or tokens."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from ml_collections import ConfigDict

from mateconv_jax import config as config_lib, weighted_paths
from mateconv_jax.data.dataset import open_dataset, read_metadata
from mateconv_jax.errors import UserError
from mateconv_jax.planning import rules
from mateconv_jax.planning.step_cost import StepCost

SMALLEST_MICRO_BATCH = 2048  # tokens on a device; before going below, activations are recomputed (training.remat)
CORRECTIONS = 2  # of the size for the given hours, by the speed that the size before has


@dataclasses.dataclass(frozen=True)
class Data:
    """Attributes:
    tokens: in the rows of the training split.
    """

    path: str
    tokens: int
    vocab_size: int
    seq_len: int
    has_validation: bool


def read_data(text: str) -> Data:
    """What a recipe needs to know of a dataset, or of several with weights (see weighted_paths): of these an epoch is as many
    rows as they have together, as for `train`.

    Raises:
      UserError: no dataset of texts there, or datasets that do not fit each other.
    """
    found = [_read_one(path) for path, _ in weighted_paths.parse(text, "--data")]
    first = found[0]
    for data in found[1:]:
        if (data.vocab_size, data.seq_len) != (first.vocab_size, first.seq_len):
            raise UserError(
                f"--data: {data.path!r} has {data.vocab_size:,} tokens and rows of {data.seq_len}, {first.path!r} "
                f"{first.vocab_size:,} and {first.seq_len} (prepare both with one tokenizer and one --seq_len)"
            )
    tokens, has_validation = sum(data.tokens for data in found), any(data.has_validation for data in found)
    return dataclasses.replace(first, path=text, tokens=tokens, has_validation=has_validation)


def _read_one(path: str) -> Data:
    if Path(path).suffix == ".bin":
        raise UserError(
            f"--data: {path!r} does not say its vocabulary (expected a dataset folder; make one with: python -m "
            f"mateconv_jax.prepare --input {path} --tokenizer DIR --output DATASET)"
        )
    metadata = read_metadata(path, "--data")
    dataset = open_dataset(path, "--data", metadata["seq_len"])
    if dataset.content != "texts":
        raise UserError(f"--data: {path!r} has preferences; recipes are for pretraining (expected texts; see configs/dpo.py)")
    tokens = dataset.n_rows("train") * dataset.seq_len
    if not tokens:
        raise UserError(f"--data: {path!r} has no training rows (prepare it again)")
    has_validation = dataset.n_rows("validation") > 0
    return Data(path, tokens, metadata["vocab_size"], dataset.seq_len, has_validation)


@dataclasses.dataclass(frozen=True)
class Dial:
    """What is asked for: one of these, or two."""

    hours: float | None = None
    parameters: float | None = None
    tokens: float | None = None


@dataclasses.dataclass(frozen=True)
class Machine:
    """Attributes:
    name: for people.
    devices: all of them.
    cost: (resolved config) -> what its step takes.
    flops_guess: FLOP/s of all devices in training, to begin with.
    may_fit: (resolved config) -> whether it is worth asking for the cost; spares compilations.
    """

    name: str
    devices: int
    cost: Callable[[ConfigDict], StepCost]
    flops_guess: float
    may_fit: Callable[[ConfigDict], bool] = lambda config: True


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What was chosen, before it is put into words.

    Attributes:
      limited_by: see rules.Budget.
      layout: keys of training and mesh that make a step fit: batch_size, accumulation_steps, remat; fsdp.
      cost: of an optimizer step.
    """

    data: Data
    dial: Dial
    machine: Machine
    shape: rules.Shape
    steps: rules.Steps
    limited_by: str | None
    layout: ConfigDict
    cost: StepCost

    @property
    def parameters(self) -> int:
        return self.shape.parameters(self.data.vocab_size)

    @property
    def tokens_per_step(self) -> int:
        return self.steps.rows * self.data.seq_len

    @property
    def tokens(self) -> int:
        return self.steps.steps * self.tokens_per_step

    @property
    def epochs(self) -> float:
        return self.tokens / self.data.tokens

    @property
    def hours(self) -> float:
        """Of training, expected; without evaluations and checkpoints."""
        return self.steps.steps * self.cost.seconds / 3600

    @property
    def hours_at_best(self) -> float | None:
        at_best = self.cost.seconds_at_best
        return None if at_best is None else self.steps.steps * at_best / 3600


def make_recipe(data: Data, dial: Dial, machine: Machine) -> Recipe:
    """Choose everything.

    Raises:
      UserError: the model does not fit the devices' memory.
    """
    recipe = _at(machine.flops_guess, data, dial, machine)
    if dial.hours is None:
        return recipe
    for _ in range(CORRECTIONS):
        rate = rules.flops(recipe.parameters, recipe.tokens_per_step) / recipe.cost.seconds
        recipe = _at(rate, data, dial, machine, recipe)
    steps = max(1, min(recipe.steps.steps, int(dial.hours * 3600 / recipe.cost.seconds)))
    return dataclasses.replace(recipe, steps=rules.Steps(recipe.steps.rows, steps))


def _at(rate: float, data: Data, dial: Dial, machine: Machine, last: Recipe | None = None) -> Recipe:
    """The recipe for a machine that trains at `rate` FLOP/s; the last one's programs are used again where they are the same."""
    flops = None if dial.hours is None else rate * 3600 * dial.hours
    budget = rules.budget(data.tokens, flops, dial.parameters, dial.tokens)
    shape = rules.shape(budget.parameters, data.vocab_size)
    steps = rules.steps(budget.tokens, data.seq_len, machine.devices)
    if last is not None and (shape, steps.rows) == (last.shape, last.steps.rows):
        layout, cost = last.layout, last.cost
    else:
        layout, cost = fit(_without_layout(data, shape), steps.rows, machine)
    return Recipe(data, dial, machine, shape, steps, budget.limited_by, layout, cost)


def _without_layout(data: Data, shape: rules.Shape) -> ConfigDict:
    config = config_lib.default_config()
    config.model.dim, config.model.n_layers = shape.dim, shape.n_layers
    config.model.n_heads, config.model.n_kv_heads = shape.n_heads, shape.n_kv_heads
    config.model.vocab_size, config.model.max_seq_len = data.vocab_size, data.seq_len
    config.data.train_data_path, config.data.seq_len = data.path, data.seq_len
    return config


def fit(config: ConfigDict, rows: int, machine: Machine) -> tuple[ConfigDict, StepCost]:
    """The config with the largest micro-batch that fits, and its cost: steps of `rows` rows in 1, 2, 4 … micro-batches.

    Where nothing fits, activations are recomputed, and then parameters and optimizer state are spread over the devices.

    Raises:
      UserError: not even that fits.
    """
    smallest = None
    for training, fsdp in _layouts(rows, config.data.seq_len, machine.devices):
        candidate = copy.deepcopy(config)
        candidate.training.update(training)
        candidate.mesh.fsdp = fsdp
        resolved = config_lib.resolve(candidate)
        if machine.may_fit(resolved):
            smallest = machine.cost(resolved)
            if smallest.fits:
                return candidate, smallest
    parameters = rules.Shape(config.model.dim, config.model.n_layers).parameters(config.model.vocab_size)
    needed = f"{smallest.memory / 1e9:,.1f} of {smallest.available / 1e9:,.1f} GB" if smallest else "far more than there is"
    raise UserError(
        f"--gpu: {parameters:,} parameters do not fit on {machine.devices} x {machine.name}: a row a device takes {needed} "
        "(expected fewer --params, more --devices or a larger GPU)"
    )


def _layouts(rows: int, seq_len: int, devices: int) -> Iterator[tuple[dict, int]]:
    """(keys of training, mesh.fsdp), those that train faster first."""
    per_device = rows // devices
    splits = [2**i for i in range(per_device.bit_length()) if per_device % 2**i == 0]
    for remat, fsdp in (("none", 1), ("full", 1), *([("full", devices)] if devices > 1 else [])):
        for n in splits:
            if remat == "full" or n == 1 or per_device // n * seq_len >= SMALLEST_MICRO_BATCH:
                yield dict(batch_size=rows // n, accumulation_steps=n, remat=remat), fsdp
