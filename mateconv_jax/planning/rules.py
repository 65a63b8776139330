"""How large, how long, how fast: the rules of a recipe as pure functions.

docs/recipes.md has the measurements behind them. N are parameters, D tokens trained on, B tokens of a step. Papers:

  Hoffmann et al., 2022, Training Compute-Optimal Large Language Models (Chinchilla)
  Kaplan et al., 2020, Scaling Laws for Neural Language Models
  Li et al., 2025, Predictable Scale: Part I, Step Law (arXiv:2503.04715)
  Muennighoff et al., 2023, Scaling Data-Constrained Language Models
"""

import dataclasses
import functools
import math

import numpy as np

# ---- shape --------------------------------------------------------------------------------------------------------

WIDTHS = (*range(64, 257, 32), *range(320, 513, 64), *range(640, 8193, 128))
ASPECT = 64  # width / layers, the base model's
MULTIPLE_OF = 64  # model.multiple_of


@dataclasses.dataclass(frozen=True)
class Shape:
    """A dense model with tied embeddings, as configs/base.py has it."""

    dim: int
    n_layers: int

    @property
    def head_dim(self) -> int:
        """32 up to the base model's width, as there; 64 above, as GPT-2's."""
        return 32 if self.dim <= 512 else 64

    @property
    def n_heads(self) -> int:
        return self.dim // self.head_dim

    @property
    def n_kv_heads(self) -> int:
        """Half of the query heads, as the base model's; all where their number is odd."""
        return self.n_heads // 2 if self.n_heads % 2 == 0 else self.n_heads

    @property
    def hidden_dim(self) -> int:
        """As config.resolve fills it in."""
        return -(-int(8 * self.dim / 3) // MULTIPLE_OF) * MULTIPLE_OF

    @property
    def non_embedding(self) -> int:
        """Parameters of the blocks."""
        attention = 2 * self.dim * self.head_dim * (self.n_heads + self.n_kv_heads)
        return self.n_layers * (attention + 3 * self.dim * self.hidden_dim + 2 * self.dim) + self.dim

    def parameters(self, vocab_size: int) -> int:
        return self.non_embedding + vocab_size * self.dim


def shape(parameters: float, vocab_size: int) -> Shape:
    """The shape of about `parameters` parameters, embedding included.

    Width and depth grow together, ASPECT apart: within a factor of a few the ratio hardly matters (Kaplan et al., 2020, figure
    5: (6, 4288) and (48, 1600) are within 3 % of each other). Being 5 % off in parameters counts as much as a ratio that is
    twice or half as large. A larger wish never gives a smaller model.
    """

    dim, n_layers, non_embedding = _shapes()
    size = np.log((non_embedding + vocab_size * dim) / parameters) / 0.05
    best = np.argmin(size**2 + np.log2(dim / n_layers / ASPECT) ** 2)
    return Shape(int(dim[best]), int(n_layers[best]))


@functools.cache
def _shapes() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Widths, layers and non-embedding parameters of all shapes with ratios from 1/4 to 4 times ASPECT."""
    shapes = [
        Shape(dim, layers)
        for dim in WIDTHS
        for layers in range(max(2, math.ceil(dim / (4 * ASPECT))), max(2, 4 * dim // ASPECT) + 1)
    ]
    columns = ([x.dim for x in shapes], [x.n_layers for x in shapes], [x.non_embedding for x in shapes])
    return tuple(np.array(column, float) for column in columns)  # pyrefly: ignore[bad-return]


# ---- how long -----------------------------------------------------------------------------------------------------

TOKENS_PER_PARAMETER = 20  # Hoffmann et al., 2022, table 3: 20.0 to 21.9 from 400 M to 67 B parameters
MAX_EPOCHS = 4  # Muennighoff et al., 2023: up to here repeated tokens are about as good as new ones
# Muennighoff et al., 2023: parameters beyond what the data can feed are worth 1/e less after 5.3 times as many.
FEWEST_TOKENS_PER_PARAMETER = TOKENS_PER_PARAMETER / 5


def flops(parameters: float, tokens: float) -> float:
    """Of training: 6 N D (Kaplan et al., 2020)."""
    return 6 * parameters * tokens


@dataclasses.dataclass(frozen=True)
class Budget:
    """A model's size and the tokens it is trained on.

    Attributes:
      limited_by: "data" where MAX_EPOCHS of them are fewer than the dial would take; else None.
    """

    parameters: float
    tokens: float
    limited_by: str | None = None


def budget(
    unique_tokens: float, flops_in_all: float | None = None, parameters: float | None = None, tokens: float | None = None
) -> Budget:
    """What a dial means: the FLOPs that the time allows, parameters, tokens, or two of them.

    One alone is completed to TOKENS_PER_PARAMETER. Tokens that were not asked for stay within MAX_EPOCHS of the data. Time that
    the data cannot use goes into a larger model, down to FEWEST_TOKENS_PER_PARAMETER; beyond that it is left over.
    """
    most = MAX_EPOCHS * unique_tokens
    if parameters is not None and tokens is not None:
        return Budget(parameters, tokens)
    if tokens is not None:
        if flops_in_all is None:
            return Budget(tokens / TOKENS_PER_PARAMETER, tokens)
        return Budget(flops_in_all / 6 / tokens, tokens)
    if parameters is not None:
        wanted = TOKENS_PER_PARAMETER * parameters if flops_in_all is None else flops_in_all / 6 / parameters
        return Budget(parameters, min(wanted, most), "data" if wanted > most else None)
    if flops_in_all is None:
        raise ValueError("a budget needs FLOPs, parameters or tokens")
    wanted = math.sqrt(flops_in_all / 6 * TOKENS_PER_PARAMETER)
    if wanted <= most:
        return Budget(wanted / TOKENS_PER_PARAMETER, wanted)
    return Budget(min(flops_in_all / 6 / most, most / FEWEST_TOKENS_PER_PARAMETER), most, "data")


# ---- batch --------------------------------------------------------------------------------------------------------


def batch_tokens(tokens: float) -> float:
    """The best B for D: 0.58 D^0.571, whatever N (Li et al., 2025). The base model's 16,384 are right for 62 M tokens."""
    return 0.58 * tokens**0.571


@dataclasses.dataclass(frozen=True)
class Steps:
    """Attributes:
    rows: of a step, over all devices.
    steps: optimizer steps.
    """

    rows: int
    steps: int


def steps(tokens: float, seq_len: int, devices: int) -> Steps:
    """Rows of a step, devices times a power of two that is closest to `batch_tokens`, and steps that make up `tokens`.

    At least one row on each device, and at least one step.
    """
    per_device = batch_tokens(tokens) / seq_len / devices
    rows = devices * 2 ** max(0, round(math.log2(per_device)))
    return Steps(rows, max(1, round(tokens / (rows * seq_len))))


# ---- optimizer ----------------------------------------------------------------------------------------------------

# The best learning rate by width, where the blocks' matrices have matrix_lr_ratio of it, and the tokens of its steps
# (benchmarks/transfer.py).
MEASURED_LEARNING_RATES = {64: 5.6e-3, 128: 4.5e-3, 256: 3.2e-3, 448: 3.2e-3}
MATRICES_WIDTH = 64  # at which they have all of it
MEASURED_BATCH = 2048
LARGEST_BATCH_FACTOR = 2.0  # from four times the batch on; twice the batch measured 1.16, not 1.41
MAX_WARMUP_STEPS = 2000
WARMUP_RATIO = 0.1  # configs/base.py
WEIGHT_DECAY = 0.1  # configs/base.py; Hoffmann et al., 2022, and Brown et al., 2020


def warmup_ratio(steps: int) -> float:
    """The base model's tenth, and at most MAX_WARMUP_STEPS. A share of the run, so that a shorter one may be tried."""
    return min(WARMUP_RATIO, rounded(MAX_WARMUP_STEPS / steps))


def learning_rate(dim: int, batch: float) -> float:
    """Peak learning rate of AdamW, of all but the blocks' matrices (see matrix_lr_ratio).

    Interpolated between the measured widths (docs/recipes.md) and constant beyond them. It grows with the root of the batch
    (Malladi et al., 2022, for Adam), but only up to LARGEST_BATCH_FACTOR: beyond a critical batch it grows no more (McCandlish
    et al., 2018).

    Args:
      dim: width.
      batch: tokens of a step.
    """
    widths, rates = np.log(list(MEASURED_LEARNING_RATES)), np.log(list(MEASURED_LEARNING_RATES.values()))
    at_measured = math.exp(np.interp(math.log(dim), widths, rates))
    return at_measured * min(math.sqrt(batch / MEASURED_BATCH), LARGEST_BATCH_FACTOR)


def matrix_lr_ratio(dim: int) -> float:
    """Inverse to the width, as the hidden matrices' for Adam in Yang et al., 2022 (muP). At width 448 it gave 0.25 bits/byte
    less than the best rate common to all parameters (docs/recipes.md).
    """
    return MATRICES_WIDTH / dim


def rounded(x: float) -> float:
    """Two significant digits."""
    return float(f"{x:.1e}")
