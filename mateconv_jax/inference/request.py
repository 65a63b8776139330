"""A request to the engine, and what its listener hears of it."""

import dataclasses
from collections.abc import Callable

from mateconv_jax.generation_config import GenerationConfig
from mateconv_jax.inference.detokenizer import Detokenizer
from mateconv_jax.inference.text_generator import Generation


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """A token of an answer: its natural log-probability before any filter, and the most likely (token, log-probability)."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Started:
    """The request has a slot. n_reused of its prompt's tokens were there already."""

    n_reused: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """More text, maybe none yet, and the new tokens it comes from; `logprobs` has one entry for each if they were asked for."""

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprob]


@dataclasses.dataclass(frozen=True)
class Finished:
    """The whole answer, as TextGenerator gives it."""

    generation: Generation


@dataclasses.dataclass(frozen=True)
class Failed:
    """The request ended without an answer: cancelled, or the error of a dispatch."""

    reason: str


Event = Started | Piece | Finished | Failed


class QueueFull(Exception):
    """As many requests wait as may."""


@dataclasses.dataclass(eq=False)
class Request:
    """One answer to be. `cancel` may be called from any thread, at any time."""

    ids: list[int]
    config: GenerationConfig
    sample: int
    top_logprobs: int | None
    listener: Callable[[Event], None]
    detokenizer: Detokenizer
    pieces: list[str] = dataclasses.field(default_factory=list)
    answer: list[int] = dataclasses.field(default_factory=list)
    is_cancelled: bool = False

    def cancel(self) -> None:
        self.is_cancelled = True
