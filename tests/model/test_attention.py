import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mateconv_jax.errors import UserError
from mateconv_jax.model.attention import backends, blocked


@pytest.mark.parametrize("S, turn", [(1, blocked.TURN), (64, blocked.TURN), (63, 1), (130, 1)])
def test_blocked_attention_and_its_gradient_equal_pytorch(S, turn, monkeypatch):
    """All key/value heads at once, and one at a time."""
    monkeypatch.setattr(blocked, "TURN", turn)
    keys = jax.random.split(jax.random.key(S), 4)
    q, d_out = (2 * jax.random.normal(key, (2, S, 6, 8)) for key in keys[:2])
    k, v = (2 * jax.random.normal(key, (2, S, 3, 8)) for key in keys[2:])
    theirs = [torch.tensor(np.asarray(x), requires_grad=True) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in theirs), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    expected.backward(torch.tensor(np.asarray(d_out)))
    for backend in ("blocked", "xla"):
        out, pull_back = jax.vjp(lambda q, k, v: backends.causal_attention(q, k, v, backend), q, k, v)  # noqa: B023
        np.testing.assert_allclose(out, expected.detach().numpy(), atol=1e-5)
        for ours, reference in zip(pull_back(d_out), theirs, strict=True):
            np.testing.assert_allclose(ours, reference.grad.numpy(), atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_blocked_attention_and_its_gradient_of_halves_are_those_of_float32_rounded(dtype):
    q, k, v, d_out = (jax.random.normal(key, (2, 70, 4, 8)).astype(dtype) for key in jax.random.split(jax.random.key(0), 4))

    @jax.jit
    def gradients(q, k, v, d_out):
        out, pull_back = jax.vjp(lambda *qkv: backends.causal_attention(*qkv, "blocked"), q, k, v)
        return out, *pull_back(d_out)

    halves = gradients(q, k, v, d_out)
    for half, full in zip(halves, gradients(*(x.astype(jnp.float32) for x in (q, k, v, d_out))), strict=True):
        assert half.dtype == dtype
        np.testing.assert_array_equal(half, full.astype(dtype))


def test_auto_takes_the_fastest_backend_of_the_device():
    choose = backends.choose_backend
    assert choose("auto", "gpu", jnp.dtype("bfloat16")) == "cudnn"
    assert choose("auto", "gpu", jnp.dtype("float32")) == "xla"
    assert choose("auto", "cpu", jnp.dtype("float32")) == "blocked"
    assert choose("xla", "cpu", jnp.dtype("float32")) == "xla"


@pytest.mark.parametrize("platform, dtype", [("cpu", "bfloat16"), ("gpu", "float32")])
def test_cudnn_where_it_cannot_run_is_an_error(platform, dtype):
    with pytest.raises(UserError, match=r"model\.attention: cudnn"):
        backends.choose_backend("cudnn", platform, jnp.dtype(dtype))
