"""Rollouts beside `sample`: the same tokens, and as many a second."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib
from mateconv_jax.generation_config import GenerationConfig
from mateconv_jax.inference.text_generator import TextGenerator
from mateconv_jax.model.transformer import init_params
from mateconv_jax.runtime import sharding
from mateconv_jax.training.rollouts import DecodingWeights, Rollouts
from tests import llama, llama2_tokenizer

HOW = GenerationConfig(temperature=1.3, top_k=0, top_p=0.95, max_new_tokens=50)


@pytest.fixture(scope="module")
def generator(dataset_folder):
    return TextGenerator(llama.peaked_model(128), tokenizer_lib.load(dataset_folder / "tokenizer", ""))


@pytest.fixture(scope="module")
def rollouts(generator):
    """Answers to prompts of at most 12 tokens, four each; and the weights."""
    mesh = sharding.make_mesh()
    graph, _ = nnx.split(llama.peaked_model(128))
    weights = DecodingWeights(generator.model_config, mesh)(generator.params)
    return Rollouts(graph, generator.model_config, mesh, generator.tokenizer, HOW, 12, 4), weights


@pytest.mark.slow
def test_answers_are_those_that_sample_gives(generator, rollouts):
    """To the first prompt samples 0 to 3 of the seed, to the second one 4 to 7; some end themselves."""
    decode, weights = rollouts
    prompts = ["春天", "小红和老王"]
    ids = [generator._prompt_ids(prompt, HOW) for prompt in prompts]
    answers = decode(weights, ids, 7, 0, lambda: False)
    how = GenerationConfig(**{**vars(HOW), "seed": 7})
    expected = generator.generate_samples(prompts[0], 4, how) + generator.generate_samples(prompts[1], 8, how)[4:]
    assert list(map(str, answers)) == list(map(str, expected))
    assert {answer.finish_reason for answer in answers} <= {"eos", "length"}
    for answer, same in zip(answers, expected, strict=True):
        end = [generator.tokenizer.eos_token_id] * (answer.finish_reason == "eos")
        assert answer.token_ids == [*same.token_ids, *end]
    again = decode(weights, ids[::-1], 7, 0, lambda: False)
    assert list(map(str, again)) != list(map(str, answers[4:] + answers[:4]))  # a prompt's place counts


def test_the_space_between_a_text_and_its_answer_stays():
    """Where decoding strips it, as with Llama 2's tokenizer. An answer in a dialogue begins a text."""
    tokenizer = llama2_tokenizer.make()
    decode = Rollouts.__new__(Rollouts)
    decode._tokenizer, decode._end_ids = tokenizer, (tokenizer.eos_token_id,)
    prompt, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("ab", "ab cd"))
    ids = [tokenizer.bos_token_id, *prompt, *answer]
    texts = [decode._generation(ids, len(prompt) + 1, is_text) for is_text in (True, False)]
    assert texts == [" ab cd", "ab cd"]


def test_decoding_stops_within_a_dispatch_when_it_is_asked_to(rollouts):
    decode, weights = rollouts
    asked = []

    def second_time():
        asked.append(1)
        return len(asked) > 1

    assert decode(weights, [[1, 5], [1, 6]], 7, 0, second_time) is None
    assert len(asked) == 2


def test_the_weights_are_cast_but_for_a_mixtures_gate():
    c = llama.model_config(n_layers=1, use_moe=True, dtype=np.dtype(jnp.bfloat16))
    dtypes = {
        jax.tree_util.keystr(path): p.dtype
        for path, p in jax.tree.leaves_with_path(DecodingWeights(c, sharding.make_mesh())(init_params(c, 0)))
    }
    assert {dtype.name for name, dtype in dtypes.items() if "gate_ED" in name} == {"float32"}
    assert {dtype.name for name, dtype in dtypes.items() if "gate_ED" not in name} == {"bfloat16"}
