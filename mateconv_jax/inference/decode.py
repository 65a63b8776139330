"""Prefill and decoding on token ids. One decode step, two drivers: a `lax.while_loop`, and step by step for streaming.

Dimensions in names: B rows, P prompt bucket, T cache bucket, V vocabulary.
"""

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from mateconv_jax.inference.sampling import Sampling, next_tokens
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
class DecodeState:
    """Everything that decoding changes.

    tokens_BT: prompt and answer so far, at their positions. length_B: how many of a row's tokens are there; the last of
    them is not in the cache yet. remaining_B: new tokens a row may still get. finished_B: `</s>` drawn or nothing remains.
    prompt_length_B: set by the prefill.
    """

    tokens_BT: jax.Array
    length_B: jax.Array
    remaining_B: jax.Array
    finished_B: jax.Array
    kv_cache: KVCache
    prompt_length_B: jax.Array | None = None


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
        return self._append(state.replace(prompt_length_B=state.length_B), logits_BV, kv_cache, sampling)

    def _step(self, params, state: DecodeState, sampling: Sampling) -> DecodeState:
        """Read each row's last token, draw its next. Finished rows stay as they are."""
        last_B = state.length_B - 1
        tokens_B1 = jnp.take_along_axis(state.tokens_BT, last_B[:, None], axis=1)
        logits_BV, kv_cache = nnx.merge(self._graph, params).cached(tokens_B1, last_B, jnp.zeros_like(last_B), state.kv_cache)
        return self._append(state, logits_BV, kv_cache, sampling)

    def _append(self, state: DecodeState, logits_BV, kv_cache: KVCache, sampling: Sampling) -> DecodeState:
        drawn_B = next_tokens(logits_BV, sampling, state.tokens_BT, state.length_B, state.prompt_length_B, self._eos_id)
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
            prompt_length_B=state.prompt_length_B,
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
