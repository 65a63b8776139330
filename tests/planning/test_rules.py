"""The rules of a recipe: what they give for the sizes that are there, and what holds for all others."""

import math

import pytest
from hypothesis import given, settings, strategies as st

from mateconv_jax import config as config_lib
from mateconv_jax.model import flops
from mateconv_jax.model.config import ModelConfig, ModelOptions
from mateconv_jax.planning import rules

PARAMETERS = st.floats(1e6, 1e10)
TOKENS = st.floats(1e5, 1e12)
VOCABULARIES = st.sampled_from([256, 2048, 6400, 32_000])
few = settings(max_examples=50, deadline=None)


def model_config(shape, vocab_size):
    config = config_lib.default_config()
    config.model.update(dict(dim=shape.dim, n_layers=shape.n_layers, n_heads=shape.n_heads, n_kv_heads=shape.n_kv_heads))
    config.model.vocab_size = vocab_size
    return ModelConfig.make(config_lib.options(ModelOptions, config_lib.resolve(config).model), "float32")


@pytest.mark.parametrize("shape", [rules.Shape(96, 3), rules.Shape(512, 8), rules.Shape(896, 12)])
def test_parameters_are_the_models(shape):
    c = model_config(shape, 1000)
    assert shape.parameters(1000) == flops.parameters(c)[0]
    assert (shape.head_dim, shape.hidden_dim) == (c.head_dim, c.hidden_dim)


def test_the_base_model_is_the_shape_of_its_size():
    assert rules.shape(26.88e6, 6400) == rules.shape(26e6, 6400) == rules.Shape(512, 8)
    assert rules.Shape(512, 8).parameters(6400) == 26_878_464


@few
@given(PARAMETERS, st.floats(1, 3), VOCABULARIES)
def test_a_larger_wish_gives_no_smaller_model(parameters, factor, vocab_size):
    smaller, larger = (rules.shape(wish, vocab_size) for wish in (parameters, factor * parameters))
    assert smaller.parameters(vocab_size) <= larger.parameters(vocab_size)


@few
@given(st.floats(1e7, 1e10), VOCABULARIES)
def test_a_shape_has_about_the_parameters_asked_for(parameters, vocab_size):
    """Below 10 M, steps of a layer are larger, and so may be the embedding alone."""
    shape = rules.shape(parameters, vocab_size)
    assert abs(math.log(shape.parameters(vocab_size) / parameters)) < 0.08
    assert shape.n_heads % shape.n_kv_heads == 0 and shape.dim == shape.n_heads * shape.head_dim


@few
@given(st.floats(1e5, 1e11), st.floats(1e13, 1e22))
def test_time_is_spent_whole_unless_the_data_are_the_limit(unique, flops_in_all):
    budget = rules.budget(unique, flops_in_all)
    spent = rules.flops(budget.parameters, budget.tokens)
    assert budget.tokens <= rules.MAX_EPOCHS * unique * (1 + 1e-9)
    if budget.limited_by is None:
        assert spent == pytest.approx(flops_in_all)
        assert budget.tokens == pytest.approx(rules.TOKENS_PER_PARAMETER * budget.parameters)
    else:
        assert spent <= flops_in_all * (1 + 1e-9)
        assert budget.tokens / budget.parameters >= rules.FEWEST_TOKENS_PER_PARAMETER * (1 - 1e-9)


@few
@given(st.floats(1e6, 1e11), st.floats(1e13, 1e21), st.floats(1, 10))
def test_more_time_gives_no_less(unique, flops_in_all, factor):
    less, more = (rules.budget(unique, f) for f in (flops_in_all, factor * flops_in_all))
    assert more.tokens >= less.tokens * (1 - 1e-9) and more.parameters >= less.parameters * (1 - 1e-9)


def test_what_is_asked_for_is_what_is_done():
    assert rules.budget(1e6, parameters=1e8, tokens=1e9) == rules.Budget(1e8, 1e9)
    assert rules.budget(1e6, tokens=1e9).tokens == 1e9  # a thousand epochs: the command warns
    assert rules.budget(1e10, parameters=1e8).tokens == 2e9
    assert rules.budget(1e8, parameters=1e8) == rules.Budget(1e8, 4e8, "data")
    assert rules.budget(1e10, 6e17, tokens=1e9).parameters == 1e8
    assert rules.budget(1e10, 6e17, parameters=1e8).tokens == 1e9


@few
@given(TOKENS, st.sampled_from([64, 128, 512, 2048]), st.integers(1, 64))
def test_a_step_splits_over_the_devices_and_the_warm_up_ends_before_the_run(tokens, seq_len, devices):
    steps = rules.steps(tokens, seq_len, devices)
    assert steps.rows % devices == 0 and steps.steps >= 1
    warmup_steps = int(rules.warmup_ratio(steps.steps) * steps.steps)
    assert 0 <= warmup_steps < steps.steps and warmup_steps <= 1.05 * rules.MAX_WARMUP_STEPS
    if steps.rows > devices:  # within the rounding to a power of two
        assert 0.7 < steps.rows * seq_len / rules.batch_tokens(tokens) < 1.5


@few
@given(TOKENS, st.floats(1, 100), st.integers(1, 16))
def test_more_tokens_take_no_smaller_batch(tokens, factor, devices):
    assert rules.steps(tokens, 512, devices).rows <= rules.steps(factor * tokens, 512, devices).rows


def test_the_learning_rate_is_the_measured_one_and_constant_beyond():
    rates, batch = rules.MEASURED_LEARNING_RATES, rules.MEASURED_BATCH
    for width, rate in rates.items():
        assert rules.learning_rate(width, batch) == pytest.approx(rate)
    assert rates[128] > rules.learning_rate(160, batch) > rates[256]
    width, largest = 64, max(rates)
    assert rules.learning_rate(8 * largest, batch) == pytest.approx(rates[largest])
    assert rules.learning_rate(width, 2 * batch) == pytest.approx(2**0.5 * rates[width])
    assert rules.learning_rate(width, 1e9) == pytest.approx(rules.LARGEST_BATCH_FACTOR * rates[width])


def test_the_matrices_learning_rate_is_inverse_to_the_width():
    assert rules.matrix_lr_ratio(rules.MATRICES_WIDTH) == 1
    assert rules.matrix_lr_ratio(1024) == pytest.approx(rules.matrix_lr_ratio(512) / 2)


def test_the_matrices_learning_rate_is_near_common_practice_and_below_step_law():
    """GPT-3's (Brown et al., 2020, table 2.1) are known to be low, Step Law's (Li et al., 2025) are fitted optima."""
    for name, gpt3 in (("110m", 6e-4), ("340m", 3e-4), ("1b", 2e-4)):
        shape = rules.shape({"110m": 110e6, "340m": 340e6, "1b": 1e9}[name], 6400)
        tokens = rules.TOKENS_PER_PARAMETER * shape.parameters(6400)
        step_law = 1.79 * shape.non_embedding**-0.713 * tokens**0.307
        of_matrices = rules.matrix_lr_ratio(shape.dim) * rules.learning_rate(shape.dim, rules.batch_tokens(tokens))
        assert 0.8 * gpt3 < of_matrices < step_law
