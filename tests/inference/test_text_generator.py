import dataclasses
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mateconv_jax import GenerationConfig, TextGenerator, config as config_lib
from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib
from mateconv_jax.errors import UserError
from mateconv_jax.inference.decode import bucket
from mateconv_jax.training import loop
from tests import llama

SAMPLED = GenerationConfig(temperature=1.0, max_new_tokens=40, seed=3)
GREEDY = GenerationConfig(do_sample=False, max_new_tokens=80)
PROMPTS = ["小明", "今天早上，老王去公园", "法", "熊猫最爱吃竹子。法国的首都是巴黎。"]


@pytest.mark.slow
def test_greedy_tokens_equal_transformers_generate_with_every_processor(dataset_folder):
    model = llama.peaked_model(max_seq_len=256)
    generator = TextGenerator(model, tokenizer_lib.load(dataset_folder / "tokenizer", ""))
    reference = llama.from_ours(model)
    ids_of, prompts = set(), PROMPTS[1::2]
    for options in (
        {},
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 3},
        {"repetition_penalty": 1.1, "no_repeat_ngram_size": 2, "min_new_tokens": 20},
    ):
        config = GenerationConfig(do_sample=False, max_new_tokens=200, **options)
        for prompt, ours in zip(prompts, generator.batch_generate(prompts, config), strict=True):
            ids = torch.tensor([[1, *tokenizer_lib.encode(generator.tokenizer, [prompt])[0]]])
            theirs = reference.generate(
                ids, do_sample=False, max_new_tokens=200, attention_mask=torch.ones_like(ids), **options
            )[0, ids.shape[1] :].tolist()  # fmt: skip
            assert ours.token_ids == [token for token in theirs if token != 2]
            assert ours.finish_reason == ("eos" if theirs[-1] == 2 else "length")
            ids_of.add(tuple(ours.token_ids))
    assert len(ids_of) > 3 * len(prompts) - 1  # the options changed something


@pytest.mark.parametrize("config", [SAMPLED, pytest.param(GREEDY, marks=pytest.mark.slow)], ids=["sampled", "greedy"])
def test_a_row_does_not_depend_on_its_batch_nor_on_the_cache(generator, config):
    alone = [generator.generate(prompt, config) for prompt in PROMPTS]
    assert generator.batch_generate(PROMPTS, config) == alone
    assert generator.batch_generate(PROMPTS[::-1], config) == alone[::-1]
    assert generator.batch_generate(PROMPTS[:3], config, batch_size=2) == alone[:3]
    assert len(set(alone)) == len(alone)
    without = dataclasses.replace(config, use_cache=False)
    assert generator.batch_generate(PROMPTS, without) == alone
    assert "".join(generator.stream(PROMPTS[0], without)) == alone[0]


def test_without_a_cache_there_is_none(generator, monkeypatch):
    states = []
    run = generator._decoder.run
    monkeypatch.setattr(
        generator._decoder, "run", lambda params, state, *rest: states.append(state) or run(params, state, *rest)
    )
    for use_cache in (True, False):
        generator.generate("小明", GenerationConfig(max_new_tokens=1, use_cache=use_cache))
    assert states[0].kv_cache is not None and states[1].kv_cache is None


# ---- ends -----------------------------------------------------------------------------------------------------------


def test_a_row_that_ends_early_in_a_batch(model, dataset_folder, generator):
    """With the tenth token of the second prompt's answer as `</s>`."""
    answers = generator.batch_generate(PROMPTS, GREEDY)
    tokenizer = tokenizer_lib.load(dataset_folder / "tokenizer", "")
    eos = answers[1].token_ids[9]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos)
    ended = TextGenerator(model, tokenizer).batch_generate(PROMPTS, GREEDY)
    assert len({len(answer.token_ids) for answer in ended}) > 1
    for before, after in zip(answers, ended, strict=True):
        n = before.token_ids.index(eos) if eos in before.token_ids else len(before.token_ids)
        assert after.token_ids == before.token_ids[:n]
        assert after.finish_reason == ("eos" if n < len(before.token_ids) else before.finish_reason)


def test_each_of_several_end_tokens_ends_an_answer(model, generator):
    """With the tenth token of one answer and the fifth of another as end tokens besides `</s>`."""
    answers = generator.batch_generate(PROMPTS, GREEDY)
    ends = (answers[1].token_ids[9], answers[0].token_ids[4])
    several = TextGenerator(model, generator.tokenizer, ends)
    ended = several.batch_generate(PROMPTS, GREEDY)
    for before, after in zip(answers, ended, strict=True):
        n = next((i for i, token in enumerate(before.token_ids) if token in ends), len(before.token_ids))
        assert after.token_ids == before.token_ids[:n]
        assert after.finish_reason == ("eos" if n < len(before.token_ids) else before.finish_reason)
    assert "".join(several.stream(PROMPTS[1], GREEDY)) == ended[1]
    late = several.generate(PROMPTS[1], dataclasses.replace(GREEDY, min_new_tokens=30))
    assert len(late.token_ids) >= 30 and not set(late.token_ids[:30]) & {2, *ends}


def test_a_generation_can_be_pickled(generator):
    text = generator.generate(PROMPTS[0], GREEDY)
    back = pickle.loads(pickle.dumps(text))
    assert back == text and type(back) is type(text) and vars(back) == vars(text)


@pytest.mark.parametrize("prompt", PROMPTS[:2])
def test_stop_texts_end_the_answer_streamed_or_not(generator, prompt):
    config = dataclasses.replace(GREEDY, max_new_tokens=60, no_repeat_ngram_size=1)
    text = generator.generate(prompt, config)
    assert text.finish_reason == "length"
    stop = text[20:23]  # over the borders of tokens
    end = min(text.find(stop), text.find(text[30:32]))
    stopped = dataclasses.replace(config, stop=[stop, text[30:32], "不会有的"])
    answers = generator.batch_generate([prompt, PROMPTS[3]], stopped)
    assert answers[0] == text[:end] and answers[0].finish_reason == "stop"
    assert len(answers[0].token_ids) < 60 and answers[0].token_ids == text.token_ids[: len(answers[0].token_ids)]
    pieces = []
    streamed = generator.generate(prompt, stopped, stream=True, callback=pieces.append)
    assert "".join(pieces) == streamed == answers[0]
    assert (streamed.token_ids, streamed.finish_reason) == (answers[0].token_ids, "stop")


def test_min_new_tokens_and_reasons(generator):
    assert generator.generate("", GenerationConfig(max_new_tokens=500)).finish_reason in ("context", "eos")
    full = generator.generate("", GenerationConfig(max_new_tokens=500, min_new_tokens=500, do_sample=False))
    assert full.finish_reason == "context" and len(full.token_ids) == 95 and full.n_prompt_tokens == 1
    assert generator.generate("小明", GenerationConfig(max_new_tokens=0)).finish_reason == "length"


def test_a_long_prompt_is_cut_at_its_beginning_on_request(generator):
    long = "熊猫最爱吃竹子。" * 30
    with pytest.raises(UserError, match="leave no room"):
        generator.generate(long, GREEDY)
    cut = generator.generate(long, dataclasses.replace(GREEDY, max_new_tokens=10, truncate_prompt=True))
    assert cut.n_prompt_tokens == 86 and len(cut.token_ids) == 10
    cut = generator.generate(long, dataclasses.replace(GREEDY, truncate_prompt=True))
    assert cut.n_prompt_tokens == 48 and cut.finish_reason == "context"
    assert cut == generator.generate("小明" + long, dataclasses.replace(GREEDY, truncate_prompt=True))


# ---- dialogues --------------------------------------------------------------------------------------------------------


def dialogue(generator, n_turns, config):
    """(history, answer) of each turn, streamed one after the other."""
    history, turns = [], []
    for i in range(n_turns):
        history = [*history, {"role": "user", "content": f"第{i}问"}]
        answer = "".join(generator.stream_chat(history, config))
        turns.append((history, answer))
        history = [*history, {"role": "assistant", "content": answer}]
    return turns


def test_a_turn_reads_only_what_is_new_and_answers_the_same(dataset_folder, monkeypatch):
    generator = TextGenerator(llama.peaked_model(max_seq_len=256), tokenizer_lib.load(dataset_folder / "tokenizer", ""))
    reads, prefill = [], generator._decoder.prefill
    monkeypatch.setattr(
        generator._decoder,
        "prefill",
        lambda params, state, start, S: reads.append((start, S)) or prefill(params, state, start, S=S),
    )
    config = GenerationConfig(max_new_tokens=12, seed=1)
    turns = dialogue(generator, 5, config)
    starts = [start for start, _ in reads]
    assert starts[0] == 0 and starts[-1] > 64 and all(S <= 64 for _, S in reads)
    assert [generator.chat(history, config) for history, _ in turns] == [answer for _, answer in turns]
    reads.clear()
    for history, answer in turns[::-1]:  # back to earlier turns
        assert "".join(generator.stream_chat(history, config)) == answer
    assert reads[0][0] > 0 and reads[-1][0] < 16


def test_an_abandoned_answer_leaves_a_cache_that_goes_on(generator):
    history = [{"role": "user", "content": "小明"}]
    answer = "".join(generator.stream_chat(history, SAMPLED))
    stream = generator.stream_chat(history, SAMPLED)
    next(stream), next(stream)
    stream.close()
    assert "".join(generator.stream_chat(history, SAMPLED)) == answer


def test_a_prompt_that_was_not_read_to_its_end_leaves_no_cache(generator, monkeypatch):
    history = [{"role": "user", "content": "小明"}]
    answer = generator.chat(history, GREEDY)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(generator._decoder, "prefill", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(generator.stream_chat(history, GREEDY))
    assert "".join(generator.stream_chat(history, GREEDY)) == answer


def test_other_weights_do_not_read_the_cache_of_these(model, dataset_folder):
    generator = TextGenerator(model, tokenizer_lib.load(dataset_folder / "tokenizer", ""))
    history = [{"role": "user", "content": "今天早上，老王去公园"}]
    first = "".join(generator.stream_chat(history, SAMPLED))
    generator.params = jax.tree.map(lambda p: 0.7 * p if p.ndim > 1 else p, generator.params)
    answer = "".join(generator.stream_chat(history, SAMPLED))
    assert answer == generator.chat(history, SAMPLED) != first


def test_nothing_recompiles_in_a_chat_of_20_turns_beyond_the_buckets(dataset_folder):
    generator = TextGenerator(llama.peaked_model(max_seq_len=1024), tokenizer_lib.load(dataset_folder / "tokenizer", ""))
    decoder, config = generator._decoder, GenerationConfig(max_new_tokens=5)
    turns = dialogue(generator, 20, config)
    assert generator.n_chat_tokens(turns[-1][0]) > 256
    assert 4 <= decoder.loop._cache_size() == decoder.append._cache_size() <= 5  # caches of 64, 128, 256, 512 and 1,024
    assert decoder.prefill._cache_size() <= 2 * 5 and decoder.resize._cache_size() <= 4
    generator.batch_generate(["熊" * n for n in (1, 5, 20, 33, 60)], config)
    programs = [decoder.prefill, decoder.append, decoder.loop, decoder.resize]
    sizes = [program._cache_size() for program in programs]
    for history, _ in turns[5:8]:  # again, with other numbers
        list(generator.stream_chat(history, GenerationConfig(max_new_tokens=5, seed=5, temperature=0.5, top_p=0.8)))
    generator.batch_generate(["猫" * n for n in (60, 7, 3, 30, 2)], GenerationConfig(max_new_tokens=7, top_p=0.5))
    assert sizes[1:3] == [program._cache_size() for program in programs[1:3]]  # a shorter cache may be cut out
    assert programs[0]._cache_size() <= sizes[0] + 3  # another part of those prompts is new


# ---- numbers ----------------------------------------------------------------------------------------------------------


def test_logits_and_scores_equal_transformers(generator, model):
    reference = llama.from_ours(model)
    ids = np.random.default_rng(0).integers(3, 400, (3, 21))
    theirs = reference(torch.tensor(ids)).logits.detach().numpy()
    np.testing.assert_allclose(generator.logits(ids), theirs, atol=2e-4)
    token_ids, log_probs = generator.score(PROMPTS[3])
    assert token_ids == tokenizer_lib.encode(generator.tokenizer, [PROMPTS[3]])[0]
    with torch.no_grad():
        logits = reference(torch.tensor([[1, *token_ids]])).logits[0, :-1]
    expected = torch.log_softmax(logits, -1)[range(len(token_ids)), token_ids]
    np.testing.assert_allclose(log_probs, expected.numpy(), atol=2e-4)
    with pytest.raises(UserError, match="97 tokens do not fit"):
        generator.logits(np.ones((1, 97), int))
    with pytest.raises(UserError, match="expected ids from 0 to 399"):
        generator.logits([[400]])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_streamed_pieces_are_the_text(generator, prompt):
    pieces = list(generator.stream(prompt, SAMPLED))
    assert "".join(pieces) == generator.generate(prompt, SAMPLED)
    assert len(pieces) > 5
    in_tens = list(generator.stream(prompt, SAMPLED, every=10))
    assert "".join(in_tens) == "".join(pieces)


def test_the_device_is_asked_every_so_many_tokens(generator, monkeypatch):
    asked, loop = [], generator._decoder.loop
    monkeypatch.setattr(generator._decoder, "loop", lambda *args: asked.append(args[-1]) or loop(*args))
    config = GenerationConfig(max_new_tokens=21, min_new_tokens=21)
    list(generator.stream("小明", config))
    assert asked == [1] * 20
    asked.clear()
    list(generator.stream("小明", config, every=10))
    assert asked == [10, 10]


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
    sizes = [f._cache_size() for f in (decoder.prefill, decoder.append, decoder.loop, decoder.resize)]
    for seed, temperature in ((7, 0.5), (8, 1.5)):
        config = GenerationConfig(seed=seed, temperature=temperature, top_p=0.8, max_new_tokens=40 + seed)
        generator.batch_generate([*PROMPTS[:3], PROMPTS[3][:-1]], config)
    assert sizes == [f._cache_size() for f in (decoder.prefill, decoder.append, decoder.loop, decoder.resize)]


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
    with pytest.raises(UserError, match="--use_ema: .* has no EMA weights"):
        TextGenerator.from_pretrained(tiny_config.training.out_dir, use_ema=True)
    TextGenerator.from_pretrained(tiny_config.training.out_dir)


@pytest.mark.slow
def test_a_run_trained_with_cudnn_speaks_on_the_cpu(run):
    from pathlib import Path

    path = Path(run) / "config.json"
    text = path.read_text()
    assert '"attention": "auto"' in text
    path.write_text(text.replace('"attention": "auto"', '"attention": "cudnn"'))
    assert TextGenerator.from_pretrained(run).model_config.attention == "blocked"


def test_dtype_is_that_of_the_computation(run):
    halves = TextGenerator.from_pretrained(run, dtype="bfloat16")
    assert halves.model_config.dtype == jnp.bfloat16
    assert isinstance(halves.generate("小明", SAMPLED), str)


def test_no_run_no_checkpoint_or_a_foreign_config_is_an_error(run, tmp_path):
    from pathlib import Path

    with pytest.raises(UserError, match="--model_path: no model at"):
        TextGenerator.from_pretrained(tmp_path / "none")
    path = Path(run) / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"model": values["model"] | {"n_experts": 4}}))
    with pytest.raises(UserError, match="n_experts"):
        TextGenerator.from_pretrained(run)
    path.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        TextGenerator.from_pretrained(run)
    path.write_text(json.dumps(values))
    (Path(run) / "checkpoints").rename(tmp_path / "gone")
    with pytest.raises(UserError, match="no finished checkpoint"):
        TextGenerator.from_pretrained(run)
