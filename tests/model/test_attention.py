from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mateconv_jax import config as config_lib
from mateconv_jax.errors import UserError
from mateconv_jax.model.attention import backends, blocked
from mateconv_jax.model.attention.deterministic import deterministic_attention
from mateconv_jax.model.attention.request import Request
from mateconv_jax.model.config import ModelConfig, ModelOptions
from mateconv_jax.model.device import Device


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


CPU, T4, A100, H100, AMD = (
    Device("cpu"), Device("gpu", (7, 5)), Device("gpu", (8, 0)), Device("gpu", (9, 0)), Device("gpu"),
)  # fmt: skip
BF16, FP16, FP32 = map(jnp.dtype, ("bfloat16", "float16", "float32"))


@pytest.mark.parametrize(
    "device, dtype, head_dim, length, dropout, expected, reason",
    [
        (CPU, FP32, 32, 512, 0.0, "blocked", None),
        (CPU, FP32, 32, 512, 0.1, "xla", "blocked: has no dropout on attention weights, and model.dropout is 0.1"),
        (A100, BF16, 32, 512, 0.0, "cudnn", None),
        (A100, FP16, 128, None, 0.0, "cudnn", None),
        (A100, FP32, 32, 512, 0.0, "xla", "cudnn: needs bfloat16 or float16, and the dtype is float32"),
        (
            A100,
            BF16,
            136,
            512,
            0.0,
            "xla",
            "cudnn: needs model.head_dim to be a multiple of 8 up to 128, and it is 136",
        ),
        (H100, BF16, 256, 512, 0.0, "cudnn", None),
        (
            H100,
            BF16,
            264,
            512,
            0.0,
            "xla",
            "cudnn: needs model.head_dim to be a multiple of 8 up to 256, and it is 264",
        ),
        (H100, BF16, 20, 512, 0.0, "xla", "cudnn: needs model.head_dim to be a multiple of 8 up to 256, and it is 20"),
        (H100, BF16, 32, 511, 0.0, "xla", "cudnn: needs an even length, and data.seq_len is 511"),
        (H100, BF16, 32, 512, 0.1, "xla", "cudnn: has no dropout on attention weights, and model.dropout is 0.1"),
        (T4, FP16, 32, 512, 0.0, "xla", "cudnn: needs compute capability 8.0, and this GPU has 7.5"),
        (AMD, BF16, 32, 512, 0.0, "xla", "cudnn: needs an NVIDIA GPU, and this device is a GPU of another vendor"),
        (Device("tpu"), BF16, 32, 512, 0.0, "xla", None),
    ],
)
def test_auto_takes_the_fastest_backend_that_can_serve(device, dtype, head_dim, length, dropout, expected, reason):
    request = Request(dtype, head_dim, length, dropout, device)
    assert backends.choose("auto", request) == (expected, [reason] if reason else [])
    if reason:
        name, why = reason.split(": ", 1)
        with pytest.raises(UserError, match=f"model.attention: {name} is unavailable: it {why}"):
            backends.choose(name, request)
    assert backends.choose("xla", request) == ("xla", [])


def test_auto_computes_in_what_the_device_has():
    model = config_lib.resolve(config_lib.default_config()).model
    made = {
        device: ModelConfig.make(config_lib.options(ModelOptions, model), "auto", device) for device in (CPU, T4, A100, AMD)
    }
    assert {device: c.dtype for device, c in made.items()} == {CPU: FP32, T4: FP32, A100: BF16, AMD: BF16}
    assert not made[CPU].passed_over and not made[A100].passed_over
    bfloat16, attention = made[T4].passed_over
    assert "compute capability 8.0, and this GPU has 7.5" in bfloat16 and "float16 is faster" in bfloat16
    assert attention.startswith("cudnn: needs compute capability 8.0")
    assert ModelConfig.make(config_lib.options(ModelOptions, model), "float16", T4).dtype == FP16


def test_a_gpus_compute_capability_is_read(monkeypatch):
    for said, expected in (("7.5", (7, 5)), ("10.0", (10, 0)), ("gfx90a", None)):
        gpu = SimpleNamespace(platform="gpu", compute_capability=said)
        monkeypatch.setattr(jax, "devices", lambda gpu=gpu: [gpu])
        assert Device.here() == Device("gpu", expected)
    monkeypatch.undo()
    assert Device.here() == CPU


def test_only_the_thread_that_asks_for_deterministic_attention_gets_it():
    """Otherwise programs lowered beside it ask cuDNN for two kinds of kernels, and XLA fails in their first step."""
    from jax._src.cudnn import fused_attention_stablehlo as fused
    from jax._src.interpreters import mlir

    def is_deterministic():
        with mlir.make_ir_context():
            shape = (1, 4, 64, 64, mlir.dtype_to_ir_type(jnp.dtype("bfloat16")), 1.0)
            how = (fused.MaskType.CAUSAL, fused.AttentionLayout.BTNH.value)
            config = fused.create_dot_product_attention_backend_config_base(*shape, *how, is_bwd=True)
        return "force_deterministic" in config["cudnn_fmha_backend_config"]

    with ThreadPoolExecutor(1) as other_thread:
        with deterministic_attention():
            assert is_deterministic() and not other_thread.submit(is_deterministic).result()
        assert not is_deterministic()
