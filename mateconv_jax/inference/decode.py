"""Prefill and decoding on token ids. One decode step, two drivers: a `lax.while_loop`, and step by step for streaming.

Dimensions in names: B rows, P prompt bucket, T cache bucket, V vocabulary.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mateconv_jax.inference import logits_processors
from mateconv_jax.inference.generation_config import GenerationConfig
from mateconv_jax.model.transformer import KVCache, grow_kv_cache

# Prompt and cache lengths are rounded up to one of these (or the model's maximum), so that a chat compiles a handful of
# programs. The cache grows bucket by bucket: attending over an empty cache is what decoding costs (batch 16 at length 64
# instead of 512: 2.3 times faster on 2 cores).
SMALLEST_BUCKET = 16


def bucket(length: int, max_seq_len: int) -> int:
    """The smallest power of two from 16 on that holds `length`, at most max_seq_len."""
    size = SMALLEST_BUCKET
    while size < length:
        size *= 2
    return min(size, max_seq_len)


@flax.struct.dataclass
class Sampling:
    """What the draws depend on. do_sample, top_k and filter_top_p choose the program; the rest are numbers in it.

    sample_B: a row's number among the samples of one prompt.
    """

    seed: jax.Array
    sample_B: jax.Array
    temperature: jax.Array
    top_p: jax.Array
    do_sample: bool = flax.struct.field(pytree_node=False)
    top_k: int = flax.struct.field(pytree_node=False)
    filter_top_p: bool = flax.struct.field(pytree_node=False)

    @staticmethod
    def make(config: GenerationConfig, sample_B: np.ndarray, vocab_size: int) -> "Sampling":
        return Sampling(
            seed=jnp.uint32(config.seed),
            sample_B=jnp.asarray(sample_B, jnp.int32),
            temperature=jnp.float32(config.temperature),
            top_p=jnp.float32(config.top_p),
            do_sample=config.do_sample,
            top_k=min(config.top_k, vocab_size) if config.do_sample else 0,
            filter_top_p=config.do_sample and config.top_p < 1,
        )


@flax.struct.dataclass
class DecodeState:
    """Everything that decoding changes.

    tokens_BT: prompt and answer so far, at their positions. length_B: how many of a row's tokens are there; the last of
    them is not in the cache yet. remaining_B: new tokens a row may still get. finished_B: `</s>` drawn or nothing remains.
    """

    tokens_BT: jax.Array
    length_B: jax.Array
    remaining_B: jax.Array
    finished_B: jax.Array
    kv_cache: KVCache


def next_tokens(logits_BV, sampling: Sampling, position_B):
    """The token of each row for `position_B`. A draw's key is (seed, sample, position): a row does not depend on its batch.

    Returns int32 (B,).
    """
    logits_BV = logits_BV.astype(jnp.float32)
    if not sampling.do_sample:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_processors.temperature(logits_BV, sampling.temperature)
    if sampling.top_k:
        logits_BV = logits_processors.top_k(logits_BV, sampling.top_k)
    if sampling.filter_top_p:
        logits_BV = logits_processors.top_p(logits_BV, sampling.top_p)

    def draw(sample, position, logits_V):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(sampling.seed), sample), position)
        return jax.random.categorical(key, logits_V)

    return jax.vmap(draw)(sampling.sample_B, position_B, logits_BV).astype(jnp.int32)


class Decoder:
    """The compiled functions of one model: prefill, a loop to the cache's end, a single step."""

    def __init__(self, graph: nnx.GraphDef, eos_id: int, max_seq_len: int):
        self._graph, self._eos_id, self._max_seq_len = graph, eos_id, max_seq_len
        self.prefill = jax.jit(self._prefill, donate_argnums=1)
        self.loop = jax.jit(self._loop, donate_argnums=1)
        self.step = jax.jit(self._step, donate_argnums=1)
        self.grow = jax.jit(self._grow)

    def run(self, params: nnx.State, state: DecodeState, sampling: Sampling) -> DecodeState:
        """From prompts to finished rows, with a host read only where the cache must grow."""
        state = self.prefill(params, state, sampling)
        while True:
            state = self.loop(params, state, sampling)
            if bool(state.finished_B.all()):
                return state
            state = self.grow(state)

    def _prefill(self, params, state: DecodeState, sampling: Sampling) -> DecodeState:
        """Read the prompts, draw the first token."""
        logits_BV, kv_cache = nnx.merge(self._graph, params).cached(
            state.tokens_BT, jnp.zeros_like(state.length_B), state.length_B - 1, state.kv_cache
        )
        return self._append(state, logits_BV, kv_cache, sampling)

    def _step(self, params, state: DecodeState, sampling: Sampling) -> DecodeState:
        """Read each row's last token, draw its next. Finished rows stay as they are."""
        last_B = state.length_B - 1
        tokens_B1 = jnp.take_along_axis(state.tokens_BT, last_B[:, None], axis=1)
        logits_BV, kv_cache = nnx.merge(self._graph, params).cached(tokens_B1, last_B, jnp.zeros_like(last_B), state.kv_cache)
        return self._append(state, logits_BV, kv_cache, sampling)

    def _append(self, state: DecodeState, logits_BV, kv_cache: KVCache, sampling: Sampling) -> DecodeState:
        drawn_B = next_tokens(logits_BV, sampling, state.length_B)
        goes_on_B = ~state.finished_B & (state.remaining_B > 0)
        # A finished row rewrites its last token with itself.
        place_B = jnp.where(goes_on_B, state.length_B, state.length_B - 1)
        rows_B = jnp.arange(len(place_B))
        token_B = jnp.where(goes_on_B, drawn_B, state.tokens_BT[rows_B, place_B])
        remaining_B = state.remaining_B - goes_on_B
        return DecodeState(
            tokens_BT=state.tokens_BT.at[rows_B, place_B].set(token_B),
            length_B=state.length_B + goes_on_B,
            remaining_B=remaining_B,
            finished_B=state.finished_B | (goes_on_B & (drawn_B == self._eos_id)) | (remaining_B == 0),
            kv_cache=kv_cache,
        )

    def _loop(self, params, state: DecodeState, sampling: Sampling) -> DecodeState:
        """Steps until every row is finished or one needs a longer cache."""
        T = state.tokens_BT.shape[1]

        def goes_on(state: DecodeState):
            return ~state.finished_B.all() & jnp.all(state.finished_B | (state.length_B < T))

        return jax.lax.while_loop(goes_on, lambda state: self._step(params, state, sampling), state)

    def _grow(self, state: DecodeState) -> DecodeState:
        """The next bucket's room."""
        length = bucket(state.tokens_BT.shape[1] + 1, self._max_seq_len)
        padding = ((0, 0), (0, length - state.tokens_BT.shape[1]))
        return state.replace(tokens_BT=jnp.pad(state.tokens_BT, padding), kv_cache=grow_kv_cache(state.kv_cache, length))
