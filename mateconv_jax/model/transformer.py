"""The Transformer: a LLaMA-style decoder, equal to PyTorch MateConv's.

Dimensions in names: B batch, S sequence, T cached positions, D model, H query heads, K key/value heads,
N head_dim, F feed-forward, V vocabulary, L layers. Weights are (out, in), as in PyTorch.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from mateconv_jax.model import layers, moe
from mateconv_jax.model.attention import backends, xla
from mateconv_jax.model.config import ModelConfig
from mateconv_jax.model.kv_cache import KVCache
from mateconv_jax.model.layers import FeedForward, RMSNorm, linear
from mateconv_jax.model.rope import rope, rope_angles


class Attention(nnx.Module):
    """Grouped-query causal attention. Queries, keys and values come from one matmul, with J = H + 2K heads in a row."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        self.wqkv_JND = nnx.Param(init(rngs.params(), (c.n_heads + 2 * c.n_kv_heads, c.head_dim, c.dim)))
        bias_shape = ((c.n_heads + 2 * c.n_kv_heads) * c.head_dim,)  # one axis: weight decay is for matrices
        self.bqkv_O = nnx.Param(jnp.zeros(bias_shape)) if c.qkv_bias else None
        self.wo_DHN = nnx.Param(init(rngs.params(), (c.dim, c.n_heads, c.head_dim)) / (2 * c.n_layers) ** 0.5)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None
        self.c = c

    def __call__(self, x_BSD, positions_BS, angles, layer_cache, documents_BS, key_B):
        c = self.c
        qkv_BSO = linear(x_BSD, self.wqkv_JND[...].reshape(-1, c.dim), c.platform)
        if self.bqkv_O is not None:
            qkv_BSO = qkv_BSO + self.bqkv_O[...].astype(c.dtype)
        qkv_BSJN = qkv_BSO.reshape(*x_BSD.shape[:2], -1, c.head_dim)
        q_BSHN, k_BSKN, v_BSKN = jnp.split(qkv_BSJN, [c.n_heads, c.n_heads + c.n_kv_heads], axis=2)
        if self.q_norm is not None and self.k_norm is not None:  # per head, as in Qwen3
            q_BSHN, k_BSKN = self.q_norm(q_BSHN), self.k_norm(k_BSKN)
        q_BSHN, k_BSKN = rope(q_BSHN, angles), rope(k_BSKN, angles)
        if layer_cache is None:
            out_BSHN = backends.causal_attention(q_BSHN, k_BSKN, v_BSKN, c.attention, documents_BS, c.dropout, key_B)
        else:
            k_BKNT, v_BKTN = layer_cache
            start_B = positions_BS[:, 0]
            k_BKNT = _write(k_BKNT, k_BSKN.transpose(0, 2, 3, 1), start_B, axis=2)
            v_BKTN = _write(v_BKTN, v_BSKN.transpose(0, 2, 1, 3), start_B, axis=1)
            layer_cache = k_BKNT, v_BKTN
            out_BSHN = xla.cached_attention(q_BSHN, *layer_cache, positions_BS)
        out_BSE = out_BSHN.reshape(*x_BSD.shape[:2], -1)  # E = H N
        return linear(out_BSE, self.wo_DHN[...].reshape(c.dim, -1), c.platform), layer_cache


def _write(cache, new, start_B, axis: int):
    """Write each row's new keys or values into its cache, from its own start along `axis` (of the row)."""
    write_row = jax.vmap(lambda cache, new, start: jax.lax.dynamic_update_slice_in_dim(cache, new, start, axis))
    return write_row(cache, new, start_B)


def _split_keys(key_B, n: int):
    """n lists of independent keys, one key per row each; n times None for None."""
    return [None] * n if key_B is None else list(jax.vmap(lambda key: jax.random.split(key, n), out_axes=1)(key_B))


class Block(nnx.Module):
    """Pre-norm residual block."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(c.dim, c.norm_eps)
        self.attention = Attention(c, rngs)
        self.ffn_norm = RMSNorm(c.dim, c.norm_eps)
        self.feed_forward = moe.MixtureOfExperts(c, rngs) if c.use_moe else FeedForward(c, rngs)
        self.c = c

    def __call__(self, x_BSD, positions_BS, angles, layer_cache=None, documents_BS=None, key_B=None, is_real_BS=None):
        """Returns (output, layer_cache with the new positions or None, moe.Routing or None)."""
        scores_key_B, attention_key_B, ffn_key_B = _split_keys(key_B, 3)
        normed_BSD = self.attention_norm(x_BSD)
        out_BSD, layer_cache = self.attention(normed_BSD, positions_BS, angles, layer_cache, documents_BS, scores_key_B)
        x_BSD = x_BSD + layers.dropout(out_BSD, self.c.dropout, attention_key_B)
        normed_BSD = self.ffn_norm(x_BSD)
        if isinstance(self.feed_forward, moe.MixtureOfExperts):
            out_BSD, routing = self.feed_forward(normed_BSD, is_real_BS)
        else:
            out_BSD, routing = self.feed_forward(normed_BSD), None
        return x_BSD + layers.dropout(out_BSD, self.c.dropout, ffn_key_B), layer_cache, routing


# Activations of a block that are saved for the backward pass; it recomputes the rest.
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # matmuls with weights, not attention's
}


@jax.custom_vjp
def gradients_together(args):
    """The identity, with a barrier that computes all gradients of `args` before any of them is used.

    Without it, XLA on a GPU defers the weight gradients to the end of the backward pass and keeps all recomputed activations
    for them: the base model took 3.10 GB with full remat and 2.90 without; with the barrier it takes 1.15.
    """
    return args


gradients_together.defvjp(lambda args: (args, None), lambda _, g: (jax.lax.optimization_barrier(g),))


def float32_is_float32(method):
    """Compute the matmuls of a float32 model in float32: by default, NVIDIA GPUs round their operands to TF32, whose mantissa
    has 10 bits. JAX_DEFAULT_MATMUL_PRECISION=tensorfloat32 allows that again, as torch.backends.cuda.matmul.allow_tf32 does.
    """

    @functools.wraps(method)
    def with_precision(self, *args, **kwargs):
        is_plain = self.c.dtype == jnp.float32 and jax.config.jax_default_matmul_precision is None  # pyrefly: ignore[missing-attribute]
        with jax.default_matmul_precision("highest") if is_plain else contextlib.nullcontext():
            return method(self, *args, **kwargs)

    return with_precision


class Transformer(nnx.Module):
    """The language model. Parameters are fp32, activations c.dtype. Layers are unrolled, each with its own arrays, because
    scanning over stacked weights made cached decoding on the CPU 1.6 to 4 times slower.
    """

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        self.embedding_VD = nnx.Param(init(rngs.params(), (c.vocab_size, c.dim)))
        self.blocks = nnx.List([Block(c, rngs) for _ in range(c.n_layers)])
        self.norm = RMSNorm(c.dim, c.norm_eps)
        self.output_VD = None if c.tie_word_embeddings else nnx.Param(init(rngs.params(), (c.vocab_size, c.dim)))
        self.c = c

    def __call__(self, tokens_BS, documents_BS=None, dropout_key_B=None, remat: str = "none"):
        """Next-token logits (B, S, V) in the compute dtype. Cast them to fp32 before a log-sum-exp; if the matmul itself gave
        fp32, XLA would run one of its gradient matmuls in fp32 x fp32.

        Args:
          tokens_BS: int32.
          documents_BS: int32 document numbers, non-decreasing along a row. Attention stays within a document, and positions
            restart at 0 in each. None: each row is one document.
          dropout_key_B: one key per row, for dropout at rate c.dropout on embeddings, attention weights and residual branches;
            None: no dropout.
          remat: "none", or a key of REMAT_POLICIES: recompute in the backward pass what that policy does not save.
        """
        return self.logits_and_routing(tokens_BS, documents_BS, dropout_key_B, remat)[0]

    def logits_at(self, tokens_BS, positions_BT):
        """Next-token logits (B, T, V) in the compute dtype behind T tokens of each row, whose indices are int32: without those
        of all the others, which for a vocabulary of 150,000 would take the most memory.
        """
        return self.logits_and_routing(tokens_BS, positions_BT=positions_BT)[0]

    @float32_is_float32
    def logits_and_routing(
        self, tokens_BS, documents_BS=None, dropout_key_B=None, remat: str = "none", is_real_BS=None, positions_BT=None
    ):
        """Returns (logits as above, moe.Routing of the tokens where is_real_BS, each array (L, …); None without experts).
        positions_BT: see logits_at.
        """
        positions_BS = None  # 0, 1, 2 …
        if documents_BS is not None:
            positions_BS = jnp.arange(tokens_BS.shape[1])[None]
            is_first_BS = jnp.diff(documents_BS, axis=1, prepend=documents_BS[:, :1] - 1) != 0
            positions_BS = positions_BS - jax.lax.cummax(jnp.where(is_first_BS, positions_BS, 0), axis=1)
        angles = rope_angles(self.c, tokens_BS.shape[1], positions_BS)
        *layer_keys, embedding_key_B = _split_keys(dropout_key_B, self.c.n_layers + 1)
        x_BSD = layers.dropout(self._embed(tokens_BS), self.c.dropout, embedding_key_B)
        routings = []
        for block, key_B in zip(self.blocks, layer_keys, strict=True):
            graph, params = nnx.split(block)

            def run(params, x_BSD, key_B, graph=graph):
                x_BSD, _, routing = nnx.merge(graph, params)(x_BSD, positions_BS, angles, None, documents_BS, key_B, is_real_BS)
                return x_BSD, routing

            if remat != "none":
                run = jax.checkpoint(run, policy=REMAT_POLICIES[remat])
                params, x_BSD = gradients_together((params, x_BSD))
            x_BSD, routing = run(params, x_BSD, key_B)
            routings.append(routing)
        x = self.norm(x_BSD)
        if positions_BT is not None:
            x = jnp.take_along_axis(x, positions_BT[..., None], axis=1)
        return self._logits(x), jax.tree.map(lambda *layers: jnp.stack(layers), *routings)

    @float32_is_float32
    def cached(self, tokens_BS, start_B, last_B, kv_cache: KVCache):
        """Read S more tokens into the cache: a prefill (S = the prompts' bucket) or a decode step (S = 1).

        Args:
          tokens_BS: int32. Anything after a row's last token is padding; it lands in cache slots that are overwritten before
            any query reads them.
          start_B: int32, position of each row's first token; start_B + S must fit the cache.
          last_B: int32, index in 0 .. S - 1 of each row's last token.
          kv_cache: see `make_kv_cache`; donate it.

        Returns:
          (logits_BV after each row's last token in the compute dtype, the updated cache)
        """
        positions_BS = start_B[:, None] + jnp.arange(tokens_BS.shape[1])
        angles = rope_angles(self.c, kv_cache[0][0].shape[3], positions_BS)
        x_BSD = self._embed(tokens_BS)
        new_cache = []
        for block, layer_cache in zip(self.blocks, kv_cache, strict=True):
            x_BSD, layer_cache, _ = block(x_BSD, positions_BS, angles, layer_cache)
            new_cache.append(layer_cache)
        x_BD = jnp.take_along_axis(self.norm(x_BSD), last_B[:, None, None], axis=1)[:, 0]
        return self._logits(x_BD), tuple(new_cache)

    def _embed(self, tokens_BS):
        if self.c.deterministic and self.c.platform != "cpu":
            return layers.embed_deterministically(self.embedding_VD[...], tokens_BS, self.c.dtype)
        # Looked up in fp32, so that the gradients of a frequent token accumulate in fp32.
        return self.embedding_VD[...].astype(jnp.float32)[tokens_BS].astype(self.c.dtype)

    def _logits(self, x):
        output_VD = self.embedding_VD if self.output_VD is None else self.output_VD
        return linear(x, output_VD[...], self.c.platform)


@functools.lru_cache(maxsize=8)  # 0.1 s a call, and a run asks four times
def abstract_model(c: ModelConfig):
    """(graph definition, parameters as ShapeDtypeStructs), without allocating any array. Do not change what it returns."""
    return nnx.split(nnx.eval_shape(lambda: Transformer(c, nnx.Rngs(0))))


def init_params(c: ModelConfig, seed: int) -> nnx.State:
    """Initial fp32 parameters: normal(0.02), with wo and w3 scaled by 1/sqrt(2 n_layers); norms 1; gates: see moe.py. Call it
    inside jit.
    """
    return nnx.split(Transformer(c, nnx.Rngs(seed)))[1]
