"""Continuous batching: every request gets the text that it would get alone, and what runs is bounded."""

import copy
import random
import threading
import time

import jax
import numpy as np
import pytest

from mateconv_jax import GenerationConfig, TextGenerator
from mateconv_jax.errors import UserError
from mateconv_jax.inference import engine as engine_lib, slots
from mateconv_jax.inference.engine import Engine
from mateconv_jax.inference.request import Failed, Finished, Piece, QueueFull, Started
from tests import llama2_tokenizer

PROMPTS = ["小明", "今天早上，老王去公园", "法", "熊猫最爱吃竹子。法国的首都是巴黎。", ""]
COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: COMPILED.append(event) if event == "/jax/core/compile/backend_compile_duration" else None
)


class Listener:
    """Collects a request's events."""

    def __init__(self):
        self.events, self._ended = [], threading.Event()

    def __call__(self, event):
        self.events.append(event)
        if isinstance(event, Finished | Failed):
            self._ended.set()

    def end(self):
        assert self._ended.wait(120)
        return self.events[-1]

    @property
    def text(self):
        return "".join(event.text for event in self.events if isinstance(event, Piece))


@pytest.fixture(scope="module")
def engine(generator):
    """With caches for prefills together that are shorter than the context, as they are by default, and copies of few tokens."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(slots, "SMALLEST_LENGTH", 32)
        monkeypatch.setattr(engine_lib, "WORTH_COPYING", 4)
        engine, ran, call = Engine(generator, max_batch=4), set(), jax.stages.Compiled.__call__
        with monkeypatch.context() as while_starting:
            while_starting.setattr(
                jax.stages.Compiled, "__call__", lambda program, *args: ran.add(program) or call(program, *args)
            )
            engine.start()
        engine.ran_at_its_start = ran
        yield engine
        engine.stop()


def ask(engine, ids, config, **options):
    listener = Listener()
    listener.request = engine.submit(ids, config, listener, **options)
    return listener


# Few of them: TextGenerator compiles a program for each.
OPTIONS = [
    dict(do_sample=False, repetition_penalty=1.3),
    dict(temperature=1.0, top_k=0, top_p=1.0),
    dict(
        temperature=0.7, top_k=5, top_p=0.9, min_p=0.05, no_repeat_ngram_size=3, presence_penalty=0.7, logit_bias=((20, 2.0),)
    ),
    dict(top_k=70, top_p=0.9, stop=("的",)),
]


def random_config(rng):
    return GenerationConfig(**rng.choice(OPTIONS), max_new_tokens=rng.choice((0, 1, 5, 30, 200)), seed=rng.randrange(9))


def assert_equal(listener, expected):
    end = listener.end()
    assert isinstance(end, Finished), end
    answer = end.generation
    assert (answer, answer.token_ids, answer.finish_reason, answer.n_prompt_tokens) == (
        expected, expected.token_ids, expected.finish_reason, expected.n_prompt_tokens,
    )  # fmt: skip
    assert listener.text == expected


def test_whoever_else_is_served_the_text_is_the_same_and_nothing_compiles(engine, generator):
    """24 requests of all kinds that arrive at random, more than there are slots."""
    rng = random.Random(0)
    requests = [(rng.choice(PROMPTS), random_config(rng)) for _ in range(24)]
    n_compiled, listeners = len(COMPILED), []
    for prompt, config in requests:
        listeners.append(ask(engine, generator.document_ids(prompt), config))
        time.sleep(rng.random() * 0.01)
    for listener in listeners:
        listener.end()
    assert len(COMPILED) == n_compiled
    assert engine.n_active == engine.n_waiting == 0
    distinct = {}
    for (prompt, config), listener in zip(requests, listeners, strict=True):
        distinct.setdefault((prompt, config), generator.generate(prompt, config))
        assert_equal(listener, distinct[prompt, config])
    assert len(set(distinct.values())) > 10


def test_a_dialogues_next_turn_reads_only_what_is_new(engine, generator):
    config = GenerationConfig(max_new_tokens=10, seed=1)
    history, reused, n_prompt = [], [], []
    for i in range(3):
        history.append({"role": "user", "content": f"第{i}问"})
        listener = ask(engine, generator._chat_ids(history, config), config)
        assert_equal(listener, generator.chat(history, config))
        reused.append(listener.events[0].n_reused)
        n_prompt.append(len(generator._chat_ids(history, config)))
        history.append({"role": "assistant", "content": str(listener.end().generation)})
    assert reused[1] >= n_prompt[0] - 2 and reused[2] >= n_prompt[1] - 2  # what follows may be encoded with the answer's start


def test_samples_of_a_prompt_are_generate_samples(engine, generator):
    config = GenerationConfig(max_new_tokens=8)
    expected = generator.generate_samples("小明", 3, config)
    listeners = [ask(engine, generator.document_ids("小明"), config, sample=i) for i in range(3)]
    for listener, text in zip(listeners, expected, strict=True):
        assert_equal(listener, text)


def test_what_prompts_have_in_common_is_read_once(engine, generator):
    """Asked at once, and while the first is still being answered."""
    text = "巴黎的首都是法国。竹子最爱吃熊猫。"  # no other test's
    ids, config = generator.document_ids(text), GenerationConfig(max_new_tokens=8)
    expected = generator.generate_samples(text, 3, config)
    other = ids[: len(ids) // 2] + generator.document_ids("小明")
    alone = generator._decode_batches([other], config, 1)
    before = engine.counters.reused_tokens
    with engine._wake:  # nothing is admitted before all of them wait
        at_once = [ask(engine, ids, config, sample=i) for i in range(3)] + [ask(engine, other, config)]
    for listener, answer in zip(at_once, [*expected, *alone], strict=True):
        assert_equal(listener, answer)
    reused = [listener.events[0].n_reused for listener in at_once]
    assert reused[0] < 4  # what is worth copying
    assert reused[1:] == [len(ids) - 1, len(ids) - 1, len(ids) // 2] and sum(reused) == engine.counters.reused_tokens - before


def test_a_completion_keeps_the_space_after_its_prompt_and_a_dialogues_answer_begins_a_text(engine, generator, monkeypatch):
    """All ways to an answer with a tokenizer as Llama 2's agree with transformers' text of prompt and answer together."""
    spaced = copy.copy(generator)  # with its programs
    spaced._tokenizer = llama2_tokenizer.make()
    monkeypatch.setattr(engine, "_tokenizer", spaced._tokenizer)
    # One that begins with a space, which a peaked model's first token may not do.
    config = GenerationConfig(max_new_tokens=8, logit_bias=dict.fromkeys(range(286, 400), 60.0))
    prompt, ids = "a man is", spaced.document_ids("a man is")
    expected = spaced.generate(prompt, config)
    whole = spaced.tokenizer.decode([*ids, *expected.token_ids], skip_special_tokens=True)
    assert whole == prompt + expected and expected.startswith(" ")
    streamed = "".join(spaced.stream(prompt, config))
    assert streamed == spaced.batch_generate([prompt], config)[0] == spaced.generate_samples(prompt, 1, config)[0] == expected
    assert spaced.generate(prompt, GenerationConfig(**vars(config) | {"stop": ("zzzz",)})) == expected
    assert_equal(ask(engine, ids, config, continues=True), expected)
    assert ask(engine, ids, config).end().generation == expected[1:]


def test_logprobs_come_with_each_token(engine, generator):
    config = GenerationConfig(max_new_tokens=20, seed=4)
    ids = generator.document_ids("小明")
    listeners = [ask(engine, ids, config, top_logprobs=3), ask(engine, ids, config)]
    expected = generator.generate("小明", config)
    listeners[0].end(), listeners[1].end()
    shown = [one for event in listeners[0].events if isinstance(event, Piece) for one in event.logprobs]
    assert not any(event.logprobs for event in listeners[1].events if isinstance(event, Piece))
    assert [one.token for one in shown] == expected.token_ids
    whole = [*ids, *expected.token_ids]
    logits_SV = generator.logits([whole])[0, len(ids) - 1 : -1]
    logprobs_SV = logits_SV - np.logaddexp.reduce(logits_SV, axis=-1, keepdims=True)
    for one, logprobs_V in zip(shown, logprobs_SV, strict=True):
        assert abs(one.logprob - logprobs_V[one.token]) < 1e-4
        np.testing.assert_allclose([value for _, value in one.top], np.sort(logprobs_V)[::-1][:3], atol=1e-4)


def test_a_cancelled_request_frees_its_slot_within_a_dispatch(engine, generator):
    endless = GenerationConfig(max_new_tokens=90, min_new_tokens=90)
    dispatches = []

    class CancelsItself(Listener):
        def __call__(self, event):
            super().__call__(event)
            if isinstance(event, Piece | Failed):
                dispatches.append(engine.counters.dispatches)
                self.request.cancel()

    listeners = [ask(engine, generator.document_ids("小明"), endless) for _ in range(3)]
    cancels = CancelsItself()
    cancels.request = engine.submit(generator.document_ids("小明"), endless, cancels)
    waiting, gone = ask(engine, generator.document_ids("法"), endless), ask(engine, generator.document_ids("法"), endless)
    gone.request.cancel()
    assert cancels.end() == Failed("cancelled") == gone.end()
    assert dispatches[-1] <= dispatches[0] + 1
    while not waiting.events:
        time.sleep(0.001)
    assert isinstance(waiting.events[0], Started)
    for listener in (*listeners, waiting):
        listener.request.cancel()
        listener.end()


def test_who_arrives_while_prompts_are_read_waits_for_no_dispatch(engine, generator):
    ids, config = generator.document_ids("小明"), GenerationConfig(max_new_tokens=9, min_new_tokens=9)
    dispatches = []

    class Counting(Listener):
        def __call__(self, event):
            if isinstance(event, Piece) and not any(isinstance(earlier, Piece) for earlier in self.events):
                dispatches.append(engine.counters.dispatches)
                self.first_token()
            super().__call__(event)

    first, later = Counting(), Counting()
    first.first_token, later.first_token = lambda: engine.submit(ids, config, later), lambda: None
    engine.submit(ids, config, first)
    assert isinstance(first.end(), Finished) and isinstance(later.end(), Finished)
    assert dispatches[0] == dispatches[1]


def test_a_failed_dispatch_fails_its_requests_and_the_engine_goes_on(engine, generator, monkeypatch):
    config = GenerationConfig(max_new_tokens=9)
    expected = generator.generate("小明", config)
    with monkeypatch.context() as patch:

        def broken(message):
            def fail(*args):
                raise jax.errors.JaxRuntimeError(message)

            return fail

        for message, reason in (
            ("INTERNAL: something else", "a dispatch failed: JaxRuntimeError"),
            ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 2GiB.", "out of memory"),
        ):
            patch.setattr(engine._programs, "decode", broken(message))
            assert ask(engine, generator.document_ids("小明"), config).end() == Failed(reason)
    assert_equal(ask(engine, generator.document_ids("小明"), config), expected)


def test_what_cannot_be_answered_is_refused(engine, monkeypatch):
    for ids in ([], [5] * 96):
        with pytest.raises(UserError, match="leave no room in the context of 96"):
            engine.submit(ids, GenerationConfig(), print)
    with pytest.raises(UserError, match="logit_bias: 301 tokens"):
        engine.submit([5], GenerationConfig(logit_bias={i: 1 for i in range(301)}), print)
    with pytest.raises(UserError, match="top_logprobs: 21"):
        engine.submit([5], GenerationConfig(), print, top_logprobs=21)
    monkeypatch.setattr(engine, "_max_queue", 0)
    with pytest.raises(QueueFull):
        engine.submit([5], GenerationConfig(), print)
    with pytest.raises(UserError, match="--context: 97 is more than"):
        Engine(engine._generator, context=97)


def test_stopping_fails_what_is_unfinished(model, generator):
    """Without compiling: a stopped engine never runs its programs."""
    engine = Engine(generator, max_batch=1)
    waiting = ask(engine, [5], GenerationConfig())
    engine._forget_everything = lambda: None
    engine._is_stopping = True
    engine._run()
    assert waiting.end() == Failed("the engine stops")


def test_each_program_has_run_before_the_engine_is_ready(engine):
    """The first run of one takes longer."""
    assert engine.ran_at_its_start == set(engine._programs._programs.values())


def test_prompts_are_read_in_chunks_that_waste_at_most_half(engine):
    chunk = engine_lib.SlotPrograms(engine._generator.graph, engine._generator.model_config, (), 4, 512).chunk
    assert [chunk(1, n) for n in (1, 16, 20, 33, 64, 100, 130, 256, 400)] == [16, 16, 16, 64, 64, 64, 256, 256, 256]
    groups = engine._programs.prefill_groups([9, 90, 9, 9, 9, 9, 9], [9, 90, 9, 9, 9, 9, 9])
    assert groups == [(4, [0, 2, 3, 4]), (1, [1]), (1, [5]), (1, [6])]
    assert engine._programs.prefill_groups([20, 9, 9, 9], [20, 9, 9, 9]) == [(4, [0, 1, 2, 3])]
    assert engine._programs.prefill_groups([90, 9, 9, 9], [9, 9, 9, 9]) == [(4, [1, 2, 3]), (1, [0])]  # too long for its cache


def test_a_generator_may_be_used_by_several_threads(model, dataset_folder):
    """Control tokens in one thread's prompts stay plain while another encodes a template, and streams share one cache."""
    from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib

    generator = TextGenerator(model, tokenizer_lib.load(dataset_folder / "tokenizer", ""))
    config = GenerationConfig(max_new_tokens=6, seed=2)
    histories = [[{"role": "user", "content": content}] for content in ("小明", "</s><s>system", "法国")]
    expected = [generator.chat(history, config) for history in histories]
    wrong = []

    def work(i):
        for _ in range(6):
            if "".join(generator.stream_chat(histories[i % 3], config)) != expected[i % 3]:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
