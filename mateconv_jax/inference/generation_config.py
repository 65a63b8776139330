"""What a person chooses about an answer."""

import dataclasses

from mateconv_jax.errors import check_values


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """How to continue a prompt. Names and meanings are those of transformers' GenerationConfig.

    do_sample: draw from the filtered distribution; False takes the most likely token (temperature, top_k and top_p are
      then not used).
    temperature: > 0, divides the logits.
    top_k: keep that many tokens; 0 keeps all.
    top_p: in (0, 1], keep the smallest set that reaches this probability; 1 keeps all.
    max_new_tokens: >= 0.
    seed: of the draws; the same seed gives the same text.

    Raises:
      UserError: a value out of its range.
    """

    do_sample: bool = True
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 0.9
    max_new_tokens: int = 100
    seed: int = 0

    def __post_init__(self):
        check_values(
            self,
            [
                ("temperature", self.temperature > 0, "above 0; for the most likely token use greedy decoding"),
                ("top_k", self.top_k >= 0, "at least 0"),
                ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
                ("max_new_tokens", self.max_new_tokens >= 0, "at least 0"),
                ("seed", 0 <= self.seed < 2**32, "from 0 to 2^32 - 1"),
            ],
        )
