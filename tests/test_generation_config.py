import dataclasses

import numpy as np
import pytest

from mateconv_jax import GenerationConfig
from mateconv_jax.errors import UserError
from mateconv_jax.generation_config import PRESETS

OUT_OF_RANGE = [
    ("temperature", 0.0),
    ("temperature", -1.0),
    ("temperature", 1e-40),  # 0 in fp32, on some devices
    ("top_k", -1),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("repetition_penalty", 0.0),
    ("no_repeat_ngram_size", -1),
    ("max_new_tokens", -1),
    ("min_new_tokens", -1),
    ("min_new_tokens", 101),  # of 100 at most
    ("seed", -1),
    ("seed", 2**32),
]
OF_ANOTHER_TYPE = [
    ("do_sample", 1),
    ("do_sample", "yes"),
    ("temperature", "x"),
    ("temperature", None),
    ("temperature", True),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("top_k", 1.5),
    ("top_k", True),
    ("top_p", "0.9"),
    ("top_p", float("nan")),
    ("min_p", [0.1]),
    ("repetition_penalty", float("nan")),
    ("no_repeat_ngram_size", 2.0),
    ("max_new_tokens", "100"),
    ("min_new_tokens", None),
    ("stop", 3),
    ("stop", ["。", 3]),
    ("stop", ["。", ""]),
    ("stop", ""),
    ("seed", 0.5),
    ("use_cache", None),
]


@pytest.mark.parametrize("field, value", OUT_OF_RANGE + OF_ANOTHER_TYPE)
def test_a_wrong_value_is_an_error_that_names_it_and_what_is_right(field, value):
    with pytest.raises(UserError) as error:
        GenerationConfig(**{field: value})
    message = str(error.value)
    assert message.startswith(f"{field}: ") and "(expected " in message
    assert repr(value) in message or repr((value,)) in message or repr(tuple(value)) in message


def test_min_new_tokens_above_max_new_tokens_says_both():
    with pytest.raises(UserError, match=r"^min_new_tokens: 9 is invalid \(expected at most max_new_tokens, 8\)"):
        GenerationConfig(max_new_tokens=8, min_new_tokens=9)


@pytest.mark.parametrize("stop", ["。", ["。"], ("。",)])
def test_stop_is_a_text_or_several(stop):
    assert GenerationConfig(stop=stop).stop == ("。",)
    assert hash(GenerationConfig(stop=stop)) == hash(GenerationConfig(stop=("。",)))


def test_values_at_the_end_of_their_range_and_numpys_numbers_are_right():
    GenerationConfig(top_k=0, top_p=1, min_p=0, max_new_tokens=0, seed=2**32 - 1)
    GenerationConfig(temperature=1e6, top_k=10**9, min_p=1, min_new_tokens=100, repetition_penalty=1e-6)
    GenerationConfig(temperature=np.float32(0.5), top_k=np.int64(3), seed=np.uint32(7))


def test_presets_are_starting_points():
    chosen = {name: (preset.temperature, preset.top_k, preset.top_p) for name, preset in PRESETS.items()}
    assert chosen == {"creative": (1.0, 50, 0.95), "chat": (0.8, 40, 0.9), "factual": (0.5, 20, 0.85)}
    assert dataclasses.replace(PRESETS["chat"], top_k=1) == GenerationConfig(top_k=1)
