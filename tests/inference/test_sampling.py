import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import transformers
from hypothesis import given, settings, strategies as st

from mateconv_jax import GenerationConfig
from mateconv_jax.inference import sampling
from mateconv_jax.inference.sampling import Sampling
from tests.inference.test_logits_processors import EOS, is_close_call, of_row, ragged_tokens

filtered_logits = jax.jit(sampling.filtered_logits, static_argnames="eos_ids")
next_tokens = jax.jit(sampling.next_tokens, static_argnames="eos_ids")
draw = jax.jit(sampling.draw)

V = 40
EVERYTHING = dict(repetition_penalty=1.3, no_repeat_ngram_size=2, min_new_tokens=3, top_k=20, top_p=0.8, min_p=0.05)
PLAIN = dict(temperature=1.0, top_k=0, top_p=1.0)
OFF = PLAIN | dict(min_p=0.0, repetition_penalty=1.0, no_repeat_ngram_size=0, min_new_tokens=0, do_sample=False)


def random_rows(rng, B):
    """(logits_BV, tokens_BT, length_B, prompt_length_B)"""
    logits_BV = (rng.normal(size=(B, V)) * rng.uniform(0.5, 4)).astype(np.float32)
    tokens_BT, length_B = ragged_tokens(rng, B, vocab_size=8)
    return logits_BV, tokens_BT, length_B, rng.integers(1, length_B + 1).astype(np.int32)


# ---- the filters together ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama():
    """Only for its `_get_logits_processor`."""
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    return transformers.LlamaForCausalLM(config)


def processors_of_transformers(llama, config: GenerationConfig, prompt_length: int):
    names = "do_sample temperature top_k top_p min_p repetition_penalty no_repeat_ngram_size min_new_tokens".split()
    theirs = transformers.GenerationConfig(**{name: getattr(config, name) for name in names}, eos_token_id=EOS)
    llama._prepare_special_tokens(theirs, device="cpu")
    return llama._get_logits_processor(theirs, input_ids_seq_length=prompt_length, device="cpu")


@pytest.mark.parametrize("off", ["nothing", *OFF])
@settings(max_examples=5)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_filters_together_equal_those_of_transformers_generate(llama, off, seed):
    """Temperature and penalty round as torch does, the rest only bans: equal to the bit, unless a boundary is within 1e-6."""
    rng = np.random.default_rng(seed)
    B = 1 + len(off) % 8
    for _ in range(8):
        changes = dict(
            temperature=float(rng.uniform(0.2, 2)),
            top_k=15,
            top_p=float(rng.uniform(0.1, 1)),
            min_p=float(rng.uniform(0, 0.5)),
            repetition_penalty=float(rng.uniform(0.5, 2)),
            no_repeat_ngram_size=2,
            min_new_tokens=int(rng.integers(1, 5)),
        )
        config = GenerationConfig(**changes | {off: OFF[off]} if off in OFF else changes)
        rows = random_rows(rng, B)
        ours_BV = filtered_logits(rows[0], Sampling.make(config, np.arange(B), V), *rows[1:], eos_ids=(EOS,))
        for ours_V, logits_V, tokens_T, length, prompt_length in zip(ours_BV, *rows, strict=True):
            close_call = False
            for processor in processors_of_transformers(llama, config, int(prompt_length)):
                close_call |= is_close_call(processor, logits_V)
                logits_V = of_row(processor, logits_V, tokens_T[:length])
            if not close_call:
                np.testing.assert_array_equal(ours_V, logits_V)


def test_greedy_takes_the_most_likely_token_that_is_left():
    rows = random_rows(np.random.default_rng(0), 8)
    config = GenerationConfig(do_sample=False, repetition_penalty=1.5, no_repeat_ngram_size=2, min_new_tokens=5)
    greedy = Sampling.make(config, np.zeros(8), V)
    expected_B = np.argmax(filtered_logits(rows[0], greedy, *rows[1:], eos_ids=(EOS,)), axis=-1)
    assert (next_tokens(rows[0], greedy, *rows[1:], eos_ids=(EOS,)) == expected_B).all()
    assert (expected_B != np.argmax(rows[0], axis=-1)).any()


@pytest.mark.parametrize("p", [0.2, 0.4, 0.6, 0.7, 0.8, 0.9])
def test_top_p_of_ten_equal_tokens_is_rounded_as_transformers_does(p):
    logits_1V = np.full((1, V), -np.inf, np.float32)
    logits_1V[:, :10] = 0
    rows = (np.ones((1, 1), np.int32), np.array([1]), np.array([1]))
    drawing = Sampling.make(GenerationConfig(temperature=1, top_k=0, top_p=p), np.zeros(1), V)
    kept = np.isfinite(filtered_logits(logits_1V, drawing, *rows, eos_ids=(EOS,))).sum()
    assert kept == np.isfinite(of_row(transformers.TopPLogitsWarper(p), logits_1V[0])).sum()


@pytest.mark.parametrize("do_sample", [False, True])
def test_bfloat16_logits_are_filtered_in_fp32(do_sample):
    rows = random_rows(np.random.default_rng(0), 4)
    halves = jnp.asarray(rows[0], jnp.bfloat16)
    config = Sampling.make(GenerationConfig(**EVERYTHING, do_sample=do_sample), np.zeros(4), V)
    ours_BV = filtered_logits(halves, config, *rows[1:], eos_ids=(EOS,))
    assert ours_BV.dtype == jnp.float32
    np.testing.assert_array_equal(ours_BV, filtered_logits(halves.astype(jnp.float32), config, *rows[1:], eos_ids=(EOS,)))


def test_rows_with_options_of_their_own_choose_as_they_would_alone():
    """Every filter on in some rows and off in others, k below and above what a TopK call serves; one program for all."""
    rng = np.random.default_rng(4)
    vocab_size, B = 300, 16
    choices = dict(
        do_sample=(True, True, False), temperature=(0.3, 1.0, 1.7), top_k=(0, 1, 20, 64, 65, 200, 1000), top_p=(0.3, 0.9, 1.0),
        min_p=(0.0, 0.0, 0.2), repetition_penalty=(1.0, 1.5), presence_penalty=(0.0, 1.5), frequency_penalty=(0.0, -0.7),
        no_repeat_ngram_size=(0, 1, 2, 3), min_new_tokens=(0, 0, 9), logit_bias=((), ((3, 5.0), (EOS, -100.0)), ((7, 2.5),)),
        seed=(1, 2, 3),
    )  # fmt: skip
    n_programs = set()
    for _ in range(2):
        configs = [
            GenerationConfig(max_new_tokens=99, **{name: values[rng.integers(len(values))] for name, values in choices.items()})
            for _ in range(B)
        ]
        logits_BV = rng.normal(size=(B, vocab_size), scale=2).astype(np.float32)
        tokens_BT, length_B = ragged_tokens(rng, B, vocab_size=8)
        tokens_BT = np.pad(tokens_BT, ((0, 0), (0, 40 - tokens_BT.shape[1])))
        rows = logits_BV, tokens_BT, length_B, rng.integers(1, length_B + 1).astype(np.int32)
        samples = rng.integers(0, 3, B).tolist()
        together = Sampling.for_rows(configs, samples, vocab_size)
        ours_B = np.asarray(next_tokens(rows[0], together, *rows[1:], eos_ids=(EOS,)))
        n_programs.add(next_tokens._cache_size())
        for i in range(0, B, 3):  # operation by operation each takes a second
            alone = Sampling.make(configs[i], np.array(samples[i : i + 1]), vocab_size)
            of_row_i = [x[i : i + 1] for x in rows]
            with jax.disable_jit():
                expected = sampling.next_tokens(*map(jnp.asarray, of_row_i[:1]), alone, *of_row_i[1:], eos_ids=(EOS,))
            assert ours_B[i] == expected[0], configs[i]
    assert len(n_programs) == 1


# ---- draws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "vocab_size, changes",
    [
        (12, PLAIN | dict(temperature=0.7)),
        (300, PLAIN),
        (300, PLAIN | dict(top_k=7)),
        (300, PLAIN | dict(top_p=0.7)),
        (300, EVERYTHING),
    ],
    ids=str,
)
def test_draws_follow_the_filtered_distribution(vocab_size, changes):
    """Chi-square over 20,000 draws; the bound is exceeded once in 10,000 seeds. Tokens expected less than 5 times count as one."""
    n = 20_000
    config = GenerationConfig(**changes, seed=5)
    drawing = Sampling.make(config, np.arange(n), vocab_size)
    logits_1V = np.random.default_rng(vocab_size).normal(size=(1, vocab_size)).astype(np.float32)
    tokens_1T, length_1 = np.array([[1, 3, 4, 3]], np.int32), np.array([4], np.int32)
    rows = [np.repeat(x, n, axis=0) for x in (logits_1V, tokens_1T, length_1, length_1 - 1)]
    drawn_B = next_tokens(rows[0], drawing, *rows[1:], eos_ids=(EOS,))
    left_V = np.asarray(filtered_logits(logits_1V, drawing, tokens_1T, length_1, length_1 - 1, eos_ids=(EOS,))[0], np.float64)
    expected_V = n * np.exp(left_V - left_V.max()) / np.exp(left_V - left_V.max()).sum()
    seen_V = np.bincount(drawn_B, minlength=vocab_size)
    assert not seen_V[expected_V == 0].any()
    rare_V = expected_V < 5
    seen, expected = (np.append(x[~rare_V], x[rare_V].sum()) for x in (seen_V, expected_V))
    cells = expected > 0
    assert cells.sum() > 2
    bound = scipy.stats.chi2.isf(1e-4, cells.sum() - 1)
    assert ((seen - expected)[cells] ** 2 / expected[cells]).sum() < bound


@pytest.mark.parametrize("changes", [PLAIN, EVERYTHING], ids=["plain", "everything"])
def test_a_row_does_not_depend_on_its_batch_or_padding(changes):
    rows = random_rows(np.random.default_rng(1), 8)
    sample_B = np.arange(8) % 3

    def tokens(these, padding=0):
        logits_BV, tokens_BT, length_B, prompt_length_B = (x[these] for x in rows)
        tokens_BT = np.pad(tokens_BT, ((0, 0), (0, padding)), constant_values=3)
        drawing = Sampling.make(GenerationConfig(**changes, seed=9), sample_B[these], V)
        return np.asarray(next_tokens(logits_BV, drawing, tokens_BT, length_B, prompt_length_B, eos_ids=(EOS,))).tolist()

    together = tokens(np.arange(8))
    assert [tokens([i])[0] for i in range(8)] == together
    assert tokens(np.arange(8)[::-1], padding=20) == together[::-1]
    assert len(set(together)) > 1


def test_seed_sample_and_position_each_make_another_draw():
    """Of a flat distribution over 1,000 tokens, 200 draws: a number that does not count would give one token."""
    n, flat_BV = 200, np.zeros((200, 1000), np.float32)

    def draws(seed, sample_B, position_B):
        return set(np.asarray(draw(flat_BV, np.uint32(seed), sample_B, position_B)).tolist())

    fixed, counted = np.full(n, 7), np.arange(n)
    assert len(draws(1, counted, fixed)) > 150
    assert len(draws(1, fixed, counted)) > 150
    assert len(draws(1, fixed, fixed)) == 1 and draws(1, fixed, fixed) != draws(2, fixed, fixed)
    assert draws(1, fixed, fixed + 1) != draws(1, fixed + 1, fixed)


# ---- what a program is made of -----------------------------------------------------------------------------------------


def test_numbers_that_change_compile_nothing():
    rows = random_rows(np.random.default_rng(2), 2)
    sizes = []
    for changes in (
        EVERYTHING,
        EVERYTHING | dict(temperature=0.3, seed=2, max_new_tokens=50),
        EVERYTHING | dict(repetition_penalty=2.0, min_new_tokens=9, top_p=0.3, min_p=0.5),
    ):
        next_tokens(rows[0], Sampling.make(GenerationConfig(**changes), np.arange(2), V), *rows[1:], eos_ids=(EOS,))
        sizes.append(next_tokens._cache_size())
    assert len(set(sizes)) == 1


@pytest.mark.parametrize(
    "changes, loops",
    [
        (dict(do_sample=False), 0),
        (PLAIN, 0),
        (PLAIN | dict(top_k=7), 0),
        (PLAIN | dict(top_k=7, top_p=0.8), 0),
        (PLAIN | dict(top_p=0.8), 1),
    ],
    ids=str,
)
def test_no_program_sorts_the_vocabulary_and_greedy_draws_nothing(changes, loops):
    """lax.top_k is a TopK call, which turns into a sort if XLA sees that only its last value is needed. Only top-p without
    top-k loops over the vocabulary.
    """
    rows = random_rows(np.random.default_rng(3), 2)
    arguments = (rows[0], Sampling.make(GenerationConfig(**changes), np.arange(2), V), *rows[1:])
    program = next_tokens.lower(*arguments, eos_ids=(EOS,)).compile().as_text()
    assert " sort(" not in program
    assert ("TopK" in program) == (changes.get("top_k", 0) > 0)
    steps = str(jax.make_jaxpr(lambda *x: sampling.next_tokens(*x, (EOS,)))(*arguments))
    assert ("random_bits" in steps) == changes.get("do_sample", True)
    assert steps.count("scan[") + steps.count("while[") == loops
