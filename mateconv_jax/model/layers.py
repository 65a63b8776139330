"""Layers other than attention: linear, dropout, embedding gradient, RMSNorm, SwiGLU.

Dimensions in names: B batch, S sequence, D model, F feed-forward, V vocabulary, N = B S tokens, R rows, I in, O out. Weights
are (out, in), as in PyTorch.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from mateconv_jax import cores


def linear(x, w_OI, platform: str):
    """x w^T in x's dtype: (..., I) to (..., O).

    The CPU paths speed up decoding (base model: 108 MB of weights; 2 cores). XLA runs a one-row matmul on one thread but
    batched matmuls in parallel, so the weights are split into one block per core: 2.7 instead of 4.8 ms/token. XLA repacks a
    matmul's second operand on every call, so up to 32 rows are computed as w x^T, which repacks x instead of w: 6 % more
    tokens/s at 16 rows on CPUs where packing is fast, 3 times as many where it is slow. The barrier keeps XLA from swapping the
    operands back.
    """
    w_OI = w_OI.astype(x.dtype)
    x_RI = x.reshape(-1, x.shape[-1])
    if platform == "cpu" and len(x_RI) == 1:
        parts = math.gcd(len(w_OI), cores.usable())
        w_POI = w_OI.reshape(parts, -1, w_OI.shape[1])
        out_RO = jnp.einsum("PRI,POI->PRO", jnp.broadcast_to(x_RI, (parts, *x_RI.shape)), w_POI)
    elif platform == "cpu" and len(x_RI) <= 32:
        out_RO = jax.lax.optimization_barrier(jnp.einsum("OI,RI->OR", w_OI, x_RI)).T
    else:
        out_RO = jnp.einsum("RI,OI->RO", x_RI, w_OI)
    return out_RO.reshape(*x.shape[:-1], -1)


def dropout(x, rate: float, key_B):
    """Zero a fraction `rate` of x (B, …) and divide the rest by 1 - rate (Srivastava et al., 2014). Without keys, return x.

    Each row has its own key, so its mask depends neither on the other rows nor on the number of devices.
    """
    if not rate or key_B is None:
        return x
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(key_B)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def embed_deterministically(embedding_VD, tokens_BS, dtype):
    """Embedding lookup whose gradient has the same bits in every run on a GPU.

    The gradient of a gather is a scatter with atomic additions. XLA's deterministic version sorts and launches 78 more kernels:
    5.5 of the base model's 18.3 ms per step on an H100. Multiplying the one-hot tokens with the gradients instead costs one
    matmul the size of the output layer's, and also accumulates in fp32.
    """
    return embedding_VD[tokens_BS].astype(dtype)


def _embed_forward(embedding_VD, tokens_BS, dtype):
    return embed_deterministically(embedding_VD, tokens_BS, dtype), (tokens_BS, jnp.zeros((len(embedding_VD), 0)))


ONE_HOT_ROWS = 4096  # tokens per matmul: 52 MB of bfloat16 at a vocabulary of 6,400


def _embed_backward(dtype, saved, g_BSD):
    tokens_BS, like_V0 = saved
    tokens_N, g_ND = tokens_BS.reshape(-1), g_BSD.reshape(-1, g_BSD.shape[-1])
    g_embedding_VD = jnp.zeros((len(like_V0), g_ND.shape[1]), jnp.float32)
    for start in range(0, len(tokens_N), ONE_HOT_ROWS):
        rows = slice(start, start + ONE_HOT_ROWS)
        is_token_NV = jax.nn.one_hot(tokens_N[rows], len(like_V0), dtype=g_ND.dtype)
        g_embedding_VD += jnp.einsum(
            "NV,ND->VD", is_token_NV, g_ND[rows], preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST
        )
    return g_embedding_VD, None


embed_deterministically.defvjp(_embed_forward, _embed_backward)


class RMSNorm(nnx.Module):
    """Root-mean-square norm (Zhang & Sennrich, 2019), computed in fp32 and scaled in the activations' dtype."""

    def __init__(self, dim: int, eps: float):
        self.scale_D = nnx.Param(jnp.ones(dim))
        self.eps = eps

    def __call__(self, x_BSD):
        return _rms_norm(x_BSD, self.scale_D[...], self.eps)


# A custom VJP, because XLA's derivative of rsqrt also saves the mean and needs two more kernels per norm.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rms_norm(x_BSD, scale_D, eps: float):
    return _rms_norm_forward(x_BSD, scale_D, eps)[0]


def _rms_norm_forward(x_BSD, scale_D, eps: float):
    x32 = x_BSD.astype(jnp.float32)
    factor_BS = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1) + eps)
    normed_BSD = (x32 * factor_BS[..., None]).astype(x_BSD.dtype)
    return normed_BSD * scale_D.astype(x_BSD.dtype), (x_BSD, scale_D, factor_BS)


def _rms_norm_backward(eps, saved, g_BSD):
    x_BSD, scale_D, factor_BS = saved
    normed_BSD = x_BSD.astype(jnp.float32) * factor_BS[..., None]
    g_scale_D = jnp.sum(g_BSD * normed_BSD, axis=range(x_BSD.ndim - 1))
    g_normed_BSD = g_BSD * scale_D.astype(jnp.float32)
    along_BS = jnp.mean(g_normed_BSD * normed_BSD, axis=-1)
    g_x_BSD = factor_BS[..., None] * (g_normed_BSD - along_BS[..., None] * normed_BSD)
    return g_x_BSD.astype(x_BSD.dtype), g_scale_D.astype(scale_D.dtype)


_rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


# A custom VJP that returns one array, because XLA would compute the gradients of gate and up separately and concatenate them
# twice.
@jax.custom_vjp
def swiglu(x_BS2F):
    """silu(gate) * up (Shazeer, 2020); the gate is the first half of the last axis."""
    gate_BSF, up_BSF = jnp.split(x_BS2F, 2, axis=-1)
    return jax.nn.silu(gate_BSF) * up_BSF


def _swiglu_backward(x_BS2F, g_BSF):
    gate_BSF, up_BSF = jnp.split(x_BS2F.astype(jnp.float32), 2, axis=-1)
    sigmoid_BSF = jax.nn.sigmoid(gate_BSF)
    g_gate_BSF = g_BSF * up_BSF * sigmoid_BSF * (1 + gate_BSF * (1 - sigmoid_BSF))
    g_up_BSF = g_BSF * gate_BSF * sigmoid_BSF
    g_BS2F = jnp.concatenate([g_gate_BSF, g_up_BSF], axis=-1).astype(x_BS2F.dtype)
    # Without the barrier, a Triton matmul fuses the concatenation, and it is written again for the other matmul.
    return (jax.lax.optimization_barrier(g_BS2F),)


swiglu.defvjp(lambda x_BS2F: (swiglu(x_BS2F), x_BS2F), _swiglu_backward)


class FeedForward(nnx.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x), with w1 and w3 in one matrix."""

    def __init__(self, c, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        w1_FD = init(rngs.params(), (c.hidden_dim, c.dim))
        w3_FD = init(rngs.params(), (c.hidden_dim, c.dim)) / (2 * c.n_layers) ** 0.5
        self.w13_2FD = nnx.Param(jnp.stack([w1_FD, w3_FD]))
        self.w2_DF = nnx.Param(init(rngs.params(), (c.dim, c.hidden_dim)))
        self.platform = c.platform

    def __call__(self, x_BSD):
        w13_2FD = self.w13_2FD[...]
        gate_up_BS2F = linear(x_BSD, w13_2FD.reshape(-1, w13_2FD.shape[-1]), self.platform)
        return linear(swiglu(gate_up_BS2F), self.w2_DF[...], self.platform)
