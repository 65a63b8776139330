import jax.numpy as jnp
import numpy as np
import torch
import transformers
from hypothesis import given, strategies as st

from mateconv_jax.inference import logits_processors

# Few distinct values, so that ties are common.
logits = st.integers(1, 8).flatmap(
    lambda rows: st.lists(
        st.lists(st.integers(-6, 6).map(lambda x: x / 2), min_size=12, max_size=12), min_size=rows, max_size=rows
    )
)


def same(ours, warper, logits_BV):
    theirs = warper(None, torch.tensor(logits_BV)).numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


@given(logits, st.floats(0.1, 3))
def test_temperature_equals_transformers(rows, value):
    x = np.array(rows, np.float32)
    same(logits_processors.temperature(jnp.asarray(x), value), transformers.TemperatureLogitsWarper(value), x)


@given(logits, st.integers(1, 12))
def test_top_k_equals_transformers(rows, k):
    x = np.array(rows, np.float32)
    same(logits_processors.top_k(jnp.asarray(x), k), transformers.TopKLogitsWarper(k), x)


@given(st.integers(0, 10**6), st.integers(1, 8), st.floats(0.05, 0.99))
def test_top_p_equals_transformers(seed, rows, p):
    x = np.random.default_rng(seed).normal(size=(rows, 12)).astype(np.float32) * 3
    x[:, ::4] = -np.inf  # what top-k left out
    same(logits_processors.top_p(jnp.asarray(x), p), transformers.TopPLogitsWarper(p), x)
