"""Sampling parameters and presets."""

import dataclasses
import math
import numbers

from mateconv_jax.errors import check_values


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """How to continue a prompt. Names and meanings are those of transformers' GenerationConfig; `stop` is its stop_strings.

    Attributes:
      do_sample: sample from the filtered distribution; False takes the most likely token and ignores temperature, top_k, top_p
        and min_p.
      temperature: in [1e-6, 1e6], divides the logits.
      top_k: keep the k most likely tokens; 0 keeps all.
      top_p: in (0, 1], keep the smallest set of tokens whose probability reaches p; 1 keeps all.
      min_p: in [0, 1], keep tokens at least this fraction as likely as the most likely one; 0 keeps all.
      repetition_penalty: in [1e-6, 1e6], above 1 penalises tokens already in the prompt or the answer; 1 is off.
      presence_penalty, frequency_penalty: in [-2, 2], subtracted from the logits of the answer's tokens: once, and for each
        time that the token is there; 0 is off. OpenAI's, not transformers'.
      logit_bias: pairs (token id, what is added to its logit), each token once; a dict or list is converted to a tuple.
      no_repeat_ngram_size: ban tokens that would repeat an n-gram of this size, prompt included; 0 is off.
      max_new_tokens: at most this many tokens.
      min_new_tokens: no end token before this many; at most max_new_tokens.
      stop: strings that end the answer and are not part of it; a str or list is converted to a tuple.
      seed: of the sampling, 0 to 2^32 - 1; the same seed gives the same text.
      use_cache: keep a KV cache; False recomputes all positions for every token.
      truncate_prompt: keep only the end of a prompt that leaves no room in the context; False raises an error instead.

    Raises:
      UserError: a value has the wrong type or is out of range.
    """

    do_sample: bool = True
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 0.9
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    no_repeat_ngram_size: int = 0
    max_new_tokens: int = 100
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    seed: int = 0
    use_cache: bool = True
    truncate_prompt: bool = False

    def __post_init__(self):
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        elif isinstance(self.stop, list):
            object.__setattr__(self, "stop", tuple(self.stop))
        if isinstance(self.logit_bias, dict | list):
            pairs = self.logit_bias.items() if isinstance(self.logit_bias, dict) else self.logit_bias
            object.__setattr__(self, "logit_bias", tuple(tuple(pair) if isinstance(pair, list) else pair for pair in pairs))

        def is_flag(value):
            return isinstance(value, bool)

        def is_integer(value, low, high=math.inf):
            return isinstance(value, numbers.Integral) and not is_flag(value) and low <= value <= high

        def is_number(value, low, high):
            return isinstance(value, numbers.Real) and not is_flag(value) and low <= value <= high  # False for NaN

        def is_bias(pair):
            return isinstance(pair, tuple) and len(pair) == 2 and is_integer(pair[0], 0) and is_number(pair[1], -1e6, 1e6)

        biases = self.logit_bias
        check_values(
            self,
            [
                ("do_sample", is_flag(self.do_sample), "True or False"),
                # Temperatures and penalties outside these bounds overflow fp32.
                (
                    "temperature",
                    is_number(self.temperature, 1e-6, 1e6),
                    "a number from 1e-6 to 1e6; use greedy decoding for the most likely token",
                ),
                ("top_k", is_integer(self.top_k, 0), "an integer, at least 0"),
                ("top_p", is_number(self.top_p, 0, 1) and self.top_p > 0, "a number above 0 and at most 1"),
                ("min_p", is_number(self.min_p, 0, 1), "a number from 0 to 1"),
                ("repetition_penalty", is_number(self.repetition_penalty, 1e-6, 1e6), "a number from 1e-6 to 1e6; 1 is off"),
                ("presence_penalty", is_number(self.presence_penalty, -2, 2), "a number from -2 to 2; 0 is off"),
                ("frequency_penalty", is_number(self.frequency_penalty, -2, 2), "a number from -2 to 2; 0 is off"),
                (
                    "logit_bias",
                    isinstance(biases, tuple) and all(map(is_bias, biases)) and len(dict(biases)) == len(biases),
                    "pairs of a token id and a number from -1e6 to 1e6, each token once",
                ),
                ("no_repeat_ngram_size", is_integer(self.no_repeat_ngram_size, 0), "an integer, at least 0"),
                ("max_new_tokens", is_integer(self.max_new_tokens, 0), "an integer, at least 0"),
                ("min_new_tokens", is_integer(self.min_new_tokens, 0), "an integer, at least 0"),
                (
                    "stop",
                    isinstance(self.stop, tuple) and all(isinstance(text, str) and text for text in self.stop),
                    "a non-empty string, or a list of them",
                ),
                ("seed", is_integer(self.seed, 0, 2**32 - 1), "an integer from 0 to 2^32 - 1"),
                ("use_cache", is_flag(self.use_cache), "True or False"),
                ("truncate_prompt", is_flag(self.truncate_prompt), "True or False"),
            ],
        )
        at_most = f"at most max_new_tokens, {self.max_new_tokens}"
        check_values(self, [("min_new_tokens", self.min_new_tokens <= self.max_new_tokens, at_most)])


# To adapt a preset: dataclasses.replace(PRESETS["chat"], max_new_tokens=200).
PRESETS = {
    "creative": GenerationConfig(temperature=1.0, top_k=50, top_p=0.95),
    "chat": GenerationConfig(temperature=0.8, top_k=40, top_p=0.9),
    "factual": GenerationConfig(temperature=0.5, top_k=20, top_p=0.85),
}
