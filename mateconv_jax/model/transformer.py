"""The Transformer: a LLaMA-style decoder, as PyTorch MateConv's.

Dimensions in names: B batch, S sequence, T cached positions, D model, H query heads, K key/value heads,
N head_dim, F feed-forward, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from mateconv_jax.model import attention


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What a model is (config.model, resolved) and how it computes (dtype, attention backend)."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    max_seq_len: int
    norm_eps: float
    rope_theta: float
    dropout: float
    attention: str  # a backend of model/attention.py, never "auto"
    dtype: jnp.dtype

    @staticmethod
    def make(model: ConfigDict, dtype: str, platform: str | None = None) -> "ModelConfig":
        """From a resolved config's `model` section, for this process's devices.

        Args:
          model: see `mateconv_jax.config.resolve`.
          dtype: of the computation; "auto" is bfloat16 on an accelerator and float32 on the CPU, where bfloat16
            matrix-vector products are 12 times slower.
          platform: "cpu" or "gpu"; None asks jax.

        Raises:
          UserError: the attention backend asked for cannot run there.
        """
        platform = platform or jax.default_backend()
        if dtype == "auto":
            dtype = "float32" if platform == "cpu" else "bfloat16"
        shape = {field.name: model[field.name] for field in dataclasses.fields(ModelConfig) if field.name in model}
        shape["attention"] = attention.choose_backend(model.attention, platform, jnp.dtype(dtype), model.dropout)
        return ModelConfig(**shape, dtype=jnp.dtype(dtype))


# One pair (k_BKTN, v_BKTN) a layer; slot t holds position t. Keys of one head lie together, so that a decode step's
# scores are matrix products over contiguous memory.
KVCache = tuple[tuple[jax.Array, jax.Array], ...]


def make_kv_cache(c: ModelConfig, batch: int, length: int) -> KVCache:
    """An empty cache of `length` positions in the compute dtype."""
    shape_BKTN = (batch, c.n_kv_heads, length, c.head_dim)
    return tuple((jnp.zeros(shape_BKTN, c.dtype), jnp.zeros(shape_BKTN, c.dtype)) for _ in range(c.n_layers))


def resize_kv_cache(kv_cache: KVCache, length: int) -> KVCache:
    """The same cache with room for `length` positions; what is beyond them goes."""

    def resize(x_BKTN):
        x_BKTN = x_BKTN[:, :, :length]
        return jnp.pad(x_BKTN, ((0, 0), (0, 0), (0, length - x_BKTN.shape[2]), (0, 0)))

    return jax.tree.map(resize, kv_cache)


class RMSNorm(nnx.Module):
    """Root-mean-square norm (Zhang & Sennrich, 2019), computed in fp32 and scaled in the activations' dtype."""

    def __init__(self, dim: int, eps: float):
        self.scale_D = nnx.Param(jnp.ones(dim))
        self.eps = eps

    def __call__(self, x_BSD):
        x32 = x_BSD.astype(jnp.float32)
        x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + self.eps)
        return x32.astype(x_BSD.dtype) * self.scale_D[...].astype(x_BSD.dtype)


def rope(x_BSHN, positions_BS, theta: float):
    """Rotary position embedding (Su et al., 2021) on half-split pairs (j, j + N/2), as Hugging Face lays them out."""
    half = x_BSHN.shape[-1] // 2
    angle_BSn = positions_BS[..., None] * theta ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle_BSn)[:, :, None], jnp.sin(angle_BSn)[:, :, None]
    a, b = jnp.split(x_BSHN.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BSHN.dtype)


class Attention(nnx.Module):
    """Grouped-query causal attention. One product makes queries, keys and values: J = H + 2K heads side by side."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        self.wqkv_DJN = nnx.Param(init(rngs.params(), (c.dim, c.n_heads + 2 * c.n_kv_heads, c.head_dim)))
        self.wo_HND = nnx.Param(init(rngs.params(), (c.n_heads, c.head_dim, c.dim)) / (2 * c.n_layers) ** 0.5)
        self.c = c

    def __call__(self, x_BSD, positions_BS, layer_cache, documents_BS, key):
        c, dtype = self.c, x_BSD.dtype
        qkv_BSJN = jnp.einsum("BSD,DJN->BSJN", x_BSD, self.wqkv_DJN[...].astype(dtype))
        q_BSHN, k_BSKN, v_BSKN = jnp.split(qkv_BSJN, [c.n_heads, c.n_heads + c.n_kv_heads], axis=2)
        q_BSHN, k_BSKN = rope(q_BSHN, positions_BS, c.rope_theta), rope(k_BSKN, positions_BS, c.rope_theta)
        if layer_cache is None:
            out_BSHN = attention.causal_attention(q_BSHN, k_BSKN, v_BSKN, c.attention, documents_BS, c.dropout, key)
        else:
            layer_cache = tuple(
                _write(cache_BKTN, new_BSKN, positions_BS[:, 0])
                for cache_BKTN, new_BSKN in zip(layer_cache, (k_BSKN, v_BSKN), strict=True)
            )
            out_BSHN = attention.cached_attention(q_BSHN, *layer_cache, positions_BS)
        return jnp.einsum("BSHN,HND->BSD", out_BSHN, self.wo_HND[...].astype(dtype)), layer_cache


def _write(cache_BKTN, new_BSKN, start_B):
    """Put each row's S new positions at its own place in the cache."""
    write_row = jax.vmap(lambda cache_KTN, new_KSN, start: jax.lax.dynamic_update_slice(cache_KTN, new_KSN, (0, start, 0)))
    return write_row(cache_BKTN, new_BSKN.transpose(0, 2, 1, 3), start_B)


class FeedForward(nnx.Module):
    """SwiGLU (Shazeer, 2020): w2(silu(w1 x) * w3 x), w1 and w3 as one matrix."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        w1_DF = init(rngs.params(), (c.dim, c.hidden_dim))
        w3_DF = init(rngs.params(), (c.dim, c.hidden_dim)) / (2 * c.n_layers) ** 0.5
        self.w13_D2F = nnx.Param(jnp.stack([w1_DF, w3_DF], axis=1))
        self.w2_FD = nnx.Param(init(rngs.params(), (c.hidden_dim, c.dim)))

    def __call__(self, x_BSD):
        gate_up_BS2F = jnp.einsum("BSD,DCF->BSCF", x_BSD, self.w13_D2F[...].astype(x_BSD.dtype))
        hidden_BSF = jax.nn.silu(gate_up_BS2F[:, :, 0]) * gate_up_BS2F[:, :, 1]
        return hidden_BSF @ self.w2_FD[...].astype(x_BSD.dtype)


class Block(nnx.Module):
    """Pre-norm residual block."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(c.dim, c.norm_eps)
        self.attention = Attention(c, rngs)
        self.ffn_norm = RMSNorm(c.dim, c.norm_eps)
        self.feed_forward = FeedForward(c, rngs)
        self.dropout = c.dropout

    def __call__(self, x_BSD, positions_BS, layer_cache=None, documents_BS=None, key=None):
        weights_key, attention_key, ffn_key = (None,) * 3 if key is None else jax.random.split(key, 3)
        normed_BSD = self.attention_norm(x_BSD)
        out_BSD, layer_cache = self.attention(normed_BSD, positions_BS, layer_cache, documents_BS, weights_key)
        x_BSD = x_BSD + attention.dropout(out_BSD, self.dropout, attention_key)
        out_BSD = self.feed_forward(self.ffn_norm(x_BSD))
        return x_BSD + attention.dropout(out_BSD, self.dropout, ffn_key), layer_cache


# What the backward pass keeps of a block; the rest it computes again.
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # the products with weights, not attention's
}


class Transformer(nnx.Module):
    """Parameters are fp32; the computation is in `c.dtype`. Layers are unrolled, each with its own arrays: scanned over
    stacked weights, cached decoding on the CPU was 1.6 to 4 times slower.
    """

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        self.embedding_VD = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (c.vocab_size, c.dim)))
        self.blocks = nnx.List([Block(c, rngs) for _ in range(c.n_layers)])
        self.norm = RMSNorm(c.dim, c.norm_eps)
        self.c = c

    def __call__(self, tokens_BS, documents_BS=None, dropout_key=None, remat: str = "none"):
        """Next-token logits (B, S, V) in the compute dtype; whoever takes a log-sum-exp does it in fp32.

        fp32 logits out of the product would make XLA run a gradient product in fp32 x fp32.

        Args:
          tokens_BS: int32.
          documents_BS: int32, rising along a row: attention stays within a document, whose positions start at 0. None: a row
            is one document.
          dropout_key: drops a share c.dropout of embeddings, attention weights and residual branches; None: nothing.
          remat: "none", or one of REMAT_POLICIES: compute again in the backward pass what it does not keep.
        """
        positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1]), tokens_BS.shape)
        if documents_BS is not None:
            is_first_BS = jnp.diff(documents_BS, axis=1, prepend=documents_BS[:, :1] - 1) != 0
            positions_BS -= jax.lax.cummax(jnp.where(is_first_BS, positions_BS, 0), axis=1)
        keys = [None] * (self.c.n_layers + 1) if dropout_key is None else jax.random.split(dropout_key, self.c.n_layers + 1)
        x_BSD = attention.dropout(self._embed(tokens_BS), self.c.dropout, keys[-1])
        for block, key in zip(self.blocks, keys, strict=False):
            graph, params = nnx.split(block)

            def run(params, x_BSD, key, graph=graph):
                return nnx.merge(graph, params)(x_BSD, positions_BS, None, documents_BS, key)[0]

            if remat != "none":
                run = jax.checkpoint(run, policy=REMAT_POLICIES[remat])
            x_BSD = run(params, x_BSD, key)
        return self._logits(self.norm(x_BSD))

    def cached(self, tokens_BS, start_B, last_B, kv_cache: KVCache):
        """Read S more tokens into the cache: a prefill (S = the prompts' bucket) or a decode step (S = 1).

        Args:
          tokens_BS: int32. What stands after a row's last token is padding: it is written behind the row's end, where
            no query looks before it is overwritten.
          start_B: position of each row's first token here; start_B + S must fit the cache.
          last_B: index in 0 .. S - 1 of each row's last token.
          kv_cache: see `make_kv_cache`; donate it.

        Returns:
          (logits_BV after each row's last token, in the compute dtype; the cache with the tokens in it)
        """
        positions_BS = start_B[:, None] + jnp.arange(tokens_BS.shape[1])
        x_BSD = self._embed(tokens_BS)
        new_cache = []
        for block, layer_cache in zip(self.blocks, kv_cache, strict=True):
            x_BSD, layer_cache = block(x_BSD, positions_BS, layer_cache)
            new_cache.append(layer_cache)
        x_BD = jnp.take_along_axis(self.norm(x_BSD), last_B[:, None, None], axis=1)[:, 0]
        return self._logits(x_BD), tuple(new_cache)

    def _embed(self, tokens_BS):
        return self.embedding_VD[...].astype(self.c.dtype)[tokens_BS]

    def _logits(self, x):
        return jnp.einsum("...D,VD->...V", x, self.embedding_VD[...].astype(x.dtype))


def abstract_model(c: ModelConfig):
    """(graph definition, parameters as ShapeDtypeStructs): everything about the model but its numbers."""
    return nnx.split(nnx.eval_shape(lambda: Transformer(c, nnx.Rngs(0))))


def init_params(c: ModelConfig, seed: int) -> nnx.State:
    """Fresh fp32 parameters: normal(0.02), wo and w3 scaled by 1/sqrt(2 n_layers), norms 1. Call it inside jit."""
    return nnx.split(Transformer(c, nnx.Rngs(seed)))[1]
