"""Gradients that are written by hand, beside XLA's derivative of the same formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mateconv_jax.losses.next_token import token_losses
from mateconv_jax.model import layers
from mateconv_jax.model.layers import _rms_norm, swiglu
from mateconv_jax.model.transformer import gradients_together

TARGETS_BS = jax.random.randint(jax.random.key(9), (3, 7), 0, 40)


def plain_swiglu(x):
    gate, up = jnp.split(x, 2, axis=-1)
    return jax.nn.silu(gate) * up


def plain_rms_norm(x, scale):
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + 1e-5)
    return normed.astype(x.dtype) * scale.astype(x.dtype)


def plain_losses(logits):
    logits = logits.astype(jnp.float32)
    log_sums = jax.nn.logsumexp(logits, axis=-1)
    return log_sums - jnp.take_along_axis(logits, TARGETS_BS[..., None], axis=-1)[..., 0], log_sums


CASES = {
    "swiglu": (swiglu, plain_swiglu, [(3, 7, 40)]),
    "rms_norm": (lambda x, scale: _rms_norm(x, scale, 1e-5), plain_rms_norm, [(3, 7, 40), (40,)]),
    "token_losses": (lambda logits: token_losses(logits, TARGETS_BS), plain_losses, [(3, 7, 40)]),
}


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("name", CASES)
def test_a_gradient_by_hand_equals_the_derivative(name, dtype, tolerance):
    ours, plain, shapes = CASES[name]
    first, *rest = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
    arguments = (2 * first.astype(dtype), *rest)
    out, backward = jax.vjp(ours, *arguments)
    plain_out, plain_backward = jax.vjp(plain, *arguments)
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(plain_out), strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=tolerance, rtol=tolerance)
    cotangents = jax.tree.map(lambda x: jax.random.normal(jax.random.key(5), x.shape).astype(x.dtype), out)
    for a, b, argument in zip(backward(cotangents), plain_backward(cotangents), arguments, strict=True):
        assert a.dtype == argument.dtype
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=5 * tolerance, rtol=tolerance)


def test_gradients_together_changes_no_value():
    def loss(a, b, tie):
        a, b = tie((a, b))
        return jnp.sum(a**2 * b)

    a, b = jnp.arange(3.0), jnp.array([2.0, -1.0, 5.0])
    for tied, plain in zip(
        jax.grad(loss, (0, 1))(a, b, gradients_together), jax.grad(loss, (0, 1))(a, b, lambda x: x), strict=True
    ):
        np.testing.assert_array_equal(tied, plain)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 1e-6)])
def test_the_deterministic_embedding_has_the_gather_s_values_and_gradient(dtype, tolerance, monkeypatch):
    """Where tokens repeat, in blocks that do not divide their number; both add up in fp32."""
    monkeypatch.setattr(layers, "ONE_HOT_ROWS", 8)
    embedding_VD = jax.random.normal(jax.random.key(0), (40, 6))
    g_BSD = jax.random.normal(jax.random.key(1), (*TARGETS_BS.shape, 6), dtype)

    def gather(embedding_VD):
        return embedding_VD[TARGETS_BS].astype(dtype)

    expected, expected_vjp = jax.vjp(gather, embedding_VD)
    ours, ours_vjp = jax.vjp(lambda e: layers.embed_deterministically(e, TARGETS_BS, jnp.dtype(dtype)), embedding_VD)
    np.testing.assert_array_equal(ours, expected)
    np.testing.assert_allclose(ours_vjp(g_BSD)[0], expected_vjp(g_BSD)[0], rtol=tolerance, atol=tolerance)
