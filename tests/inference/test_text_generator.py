import json

import jax
import jax.numpy as jnp
import pytest
import torch
from flax import nnx

from mateconv_jax import GenerationConfig, TextGenerator, config as config_lib
from mateconv_jax.data import tokenizer as tokenizer_lib
from mateconv_jax.errors import UserError
from mateconv_jax.inference.decode import bucket
from mateconv_jax.model.transformer import Transformer
from mateconv_jax.training import loop
from tests import llama

SAMPLED = GenerationConfig(temperature=1.0, max_new_tokens=40, seed=3)
GREEDY = GenerationConfig(do_sample=False, max_new_tokens=80)
PROMPTS = ["小明", "今天早上，老王去公园", "法", "熊猫最爱吃竹子。法国的首都是巴黎。"]


@pytest.fixture(scope="module")
def model():
    """Random weights, large enough for a peaked distribution."""
    graph, params = nnx.split(Transformer(llama.model_config(vocab_size=400, max_seq_len=96), nnx.Rngs(1)))
    return nnx.merge(graph, jax.tree.map(lambda p: 4 * p if p.ndim > 1 else p, params))


@pytest.fixture(scope="module")
def generator(model, dataset_folder):
    return TextGenerator(model, tokenizer_lib.load(dataset_folder / "tokenizer", ""))


def test_greedy_text_equals_transformers_generate(generator, model):
    reference = llama.from_ours(model)
    for prompt in PROMPTS:
        ids = torch.tensor([[1, *tokenizer_lib.encode(generator.tokenizer, [prompt])[0]]])
        n = min(80, 96 - ids.shape[1])
        theirs = reference.generate(ids, do_sample=False, max_new_tokens=n, attention_mask=torch.ones_like(ids))
        text = generator.tokenizer.decode(theirs[0, ids.shape[1] :], skip_special_tokens=True)
        assert generator.generate(prompt, GREEDY) == text


@pytest.mark.parametrize("config", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
def test_a_row_does_not_depend_on_its_batch(generator, config):
    alone = [generator.generate(prompt, config) for prompt in PROMPTS]
    assert generator.batch_generate(PROMPTS, config) == alone
    assert generator.batch_generate(PROMPTS[::-1], config) == alone[::-1]
    assert len(set(alone)) == len(alone)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_streamed_pieces_are_the_text(generator, prompt):
    pieces = list(generator.stream(prompt, SAMPLED))
    assert "".join(pieces) == generator.generate(prompt, SAMPLED)
    assert len(pieces) > 5


def test_the_seed_and_every_option_change_the_text(generator):
    text = generator.generate("小明", SAMPLED)
    assert generator.generate("小明", SAMPLED) == text
    for changes in (dict(seed=4), dict(temperature=3.0), dict(top_k=1), dict(top_p=0.01), dict(do_sample=False)):
        assert (
            generator.generate("小明", GenerationConfig(**dict(temperature=1.0, max_new_tokens=40, seed=3) | changes)) != text
        )


def test_samples_of_one_prompt_differ_and_the_first_is_generates(generator):
    samples = generator.generate_samples("小明", 4, SAMPLED)
    assert len(set(samples)) == 4 and samples[0] == generator.generate("小明", SAMPLED)


def test_max_new_tokens(generator):
    assert generator.generate("小明", GenerationConfig(max_new_tokens=0)) == ""
    assert list(generator.stream("小明", GenerationConfig(max_new_tokens=0))) == []
    one = generator.generate("小明", GenerationConfig(do_sample=False, max_new_tokens=1))
    assert generator.generate("小明", GREEDY).startswith(one.rstrip("\ufffd"))


def test_a_prompt_fills_the_context_or_stops_at_its_end(generator):
    with pytest.raises(UserError, match="leave no room in the model's context of 96"):
        generator.generate("熊" * 200, GREEDY)
    # 96 positions hold <s>, the prompt and as many new tokens as still fit.
    assert generator.generate("", GenerationConfig(max_new_tokens=500)) == generator.generate(
        "", GenerationConfig(max_new_tokens=95)
    )


def test_no_prompt_gives_no_text(generator):
    assert generator.batch_generate([]) == []


def test_buckets():
    assert [bucket(n, 96, 16) for n in (1, 16, 17, 64, 65, 96)] == [16, 16, 32, 64, 96, 96]


def test_nothing_is_compiled_twice(generator):
    """Other draws, other settings and other lengths in the buckets that were used before: the same programs."""
    decoder = generator._decoder
    generator.batch_generate(PROMPTS, GenerationConfig(max_new_tokens=95))
    sizes = [f._cache_size() for f in (decoder.prefill, decoder.append, decoder.loop, decoder.grow)]
    for seed, temperature in ((7, 0.5), (8, 1.5)):
        config = GenerationConfig(seed=seed, temperature=temperature, top_p=0.8, max_new_tokens=40 + seed)
        generator.batch_generate([*PROMPTS[:3], PROMPTS[3][:-1]], config)
    assert sizes == [f._cache_size() for f in (decoder.prefill, decoder.append, decoder.loop, decoder.grow)]


# ---- from a run folder ---------------------------------------------------------------------------------------------


@pytest.fixture
def run(tiny_config):
    tiny_config.training.update(dict(use_ema=True, ema_decay=0.5))
    loop.train(config_lib.resolve(tiny_config))
    return tiny_config.training.out_dir


def test_a_moved_run_speaks_with_its_ema_weights_unless_told_otherwise(run, tmp_path):
    import shutil

    moved = shutil.move(run, tmp_path / "elsewhere")
    default, ema, raw = (TextGenerator.from_pretrained(moved, use_ema=use_ema) for use_ema in (None, True, False))
    leaves = [jax.tree.leaves(generator.params) for generator in (default, ema, raw)]
    assert all((a == b).all() for a, b in zip(leaves[0], leaves[1], strict=True))
    assert not all((a == b).all() for a, b in zip(leaves[0], leaves[2], strict=True))
    assert default.generate("小明", SAMPLED) == ema.generate("小明", SAMPLED)
    assert default.chat([{"role": "user", "content": "熊猫"}], GREEDY) == "".join(
        default.stream_chat([{"role": "user", "content": "熊猫"}], GREEDY)
    )


def test_a_run_without_ema_says_so(tiny_config):
    loop.train(config_lib.resolve(tiny_config))
    with pytest.raises(UserError, match="--use_ema: the run .* has no EMA weights"):
        TextGenerator.from_pretrained(tiny_config.training.out_dir, use_ema=True)
    TextGenerator.from_pretrained(tiny_config.training.out_dir)


def test_a_run_trained_with_cudnn_speaks_on_the_cpu(run):
    from pathlib import Path

    path = Path(run) / "config.json"
    text = path.read_text()
    assert '"attention": "auto"' in text
    path.write_text(text.replace('"attention": "auto"', '"attention": "cudnn"'))
    assert TextGenerator.from_pretrained(run)._c.attention == "blocked"


def test_dtype_is_that_of_the_computation(run):
    halves = TextGenerator.from_pretrained(run, dtype="bfloat16")
    assert halves._c.dtype == jnp.bfloat16
    assert isinstance(halves.generate("小明", SAMPLED), str)


def test_no_run_no_checkpoint_or_a_foreign_config_is_an_error(run, tmp_path):
    from pathlib import Path

    with pytest.raises(UserError, match="--model_path: no run at"):
        TextGenerator.from_pretrained(tmp_path / "none")
    path = Path(run) / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"model": values["model"] | {"n_experts": 4}}))
    with pytest.raises(UserError, match="n_experts"):
        TextGenerator.from_pretrained(run)
    path.write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        TextGenerator.from_pretrained(run)
    path.write_text(json.dumps(values))
    (Path(run) / "checkpoints").rename(tmp_path / "gone")
    with pytest.raises(UserError, match="no finished checkpoint"):
        TextGenerator.from_pretrained(run)
