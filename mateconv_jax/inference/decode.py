"""Prefill and decoding on token ids: a `lax.while_loop` to the end of all rows or, for streaming, of a few steps.

Dimensions in names: B rows, S tokens read at once, T cache bucket, V vocabulary.
"""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from mateconv_jax.inference.sampling import Sampling, next_tokens
from mateconv_jax.model.config import ModelConfig
from mateconv_jax.model.kv_cache import KVCache, resize_kv_cache
from mateconv_jax.runtime import xla_flags

# Prompt and cache lengths are rounded up to a power of two from these on (at most the model's maximum), so that a chat
# compiles a handful of programs. The cache grows bucket by bucket: attending over an empty cache is what decoding costs
# (batch 16 at length 64 instead of 512: 2.3 times faster on 2 cores).
SMALLEST_PROMPT, SMALLEST_CACHE = 16, 64

STOP_CHECK_TOKENS = 16  # with stop texts the host looks at the answer every so many tokens


def bucket(length: int, max_seq_len: int, smallest: int) -> int:
    """The smallest power of two times `smallest` that holds `length`, at most max_seq_len."""
    size = smallest
    while size < length:
        size *= 2
    return min(size, max_seq_len)


@flax.struct.dataclass
class DecodeState:
    """Everything that decoding changes.

    tokens_BT: int32, prompt and answer so far, at their positions. length_B: how many of a row's tokens are there; the last
    of them is not in the cache yet. prompt_length_B: how many of them are the prompt. remaining_B: new tokens a row may still
    get. finished_B: `</s>` drawn, or nothing remains. kv_cache: None where every token is computed from the start.
    """

    tokens_BT: jax.Array
    length_B: jax.Array
    prompt_length_B: jax.Array
    remaining_B: jax.Array
    finished_B: jax.Array
    kv_cache: KVCache | None


class Decoder:
    """The compiled functions of one model. Each donates the state that it is given."""

    def __init__(self, graph: nnx.GraphDef, c: ModelConfig, eos_id: int):
        self._graph, self._eos_id, self._max_seq_len = graph, eos_id, c.max_seq_len
        options = xla_flags.compiler_options(c.platform)
        self.prefill = jax.jit(self._prefill, static_argnames="S", donate_argnames="state", compiler_options=options)
        self.spread = jax.jit(self._spread, static_argnames="n")
        self.append = jax.jit(self._append, donate_argnames="state")
        self.loop = jax.jit(self._loop, donate_argnames="state", compiler_options=options)
        self.resize = jax.jit(self._resize, static_argnames="length")

    def run(
        self,
        params: nnx.State,
        state: DecodeState,
        sampling: Sampling,
        S: int,
        n_samples: int = 1,
        stop: Callable[[DecodeState], jax.Array] | None = None,
    ) -> DecodeState:
        """From prompts to finished rows. The host is asked only where the cache must grow, and for `stop`.

        Args:
          S: the prompts' bucket.
          n_samples: continuations of each of the B prompts: B * n_samples rows come out, those of one prompt side by side.
          stop: finished_B after a look at the tokens so far; called every STOP_CHECK_TOKENS.
        """
        logits_BV, state = self.prefill(params, state, 0, S=S)
        if n_samples > 1:
            logits_BV, state = self.spread(logits_BV, state, n=n_samples)
        state = self.append(logits_BV, state, sampling)
        while True:
            state = self.loop(params, state, sampling, self._max_seq_len if stop is None else STOP_CHECK_TOKENS)
            if stop is not None:
                state = dataclasses.replace(state, finished_B=stop(state))
            length, finished = jax.device_get((jnp.max(jnp.where(state.finished_B, 0, state.length_B)), state.finished_B))
            if finished.all():
                return state
            if length == state.tokens_BT.shape[1]:
                state = self.grow(state)

    def _prefill(self, params, state: DecodeState, start, S: int):
        """Read S tokens of each row, from position `start` on, into the cache. What is before them must be there already, and
        each row's last token among them.

        Returns:
          (logits_BV after each row's last token, the state)
        """
        if state.kv_cache is None:
            return self._whole(params, state), state
        B = len(state.length_B)
        tokens_BS = jax.lax.dynamic_slice(state.tokens_BT, (0, start), (B, S))
        start_B = jnp.full(B, start, jnp.int32)
        logits_BV, kv_cache = nnx.merge(self._graph, params).cached(
            tokens_BS, start_B, state.length_B - 1 - start_B, state.kv_cache
        )
        return logits_BV, dataclasses.replace(state, kv_cache=kv_cache)

    def _whole(self, params, state: DecodeState):
        """logits_BV after each row's last token, without a cache."""
        logits_BTV = nnx.merge(self._graph, params)(state.tokens_BT)
        return jnp.take_along_axis(logits_BTV, (state.length_B - 1)[:, None, None], axis=1)[:, 0]

    def _spread(self, logits_BV, state: DecodeState, n: int):
        """Each row n times."""
        return jax.tree.map(lambda x: jnp.repeat(x, n, axis=0), (logits_BV, state))

    def _append(self, logits_BV, state: DecodeState, sampling: Sampling) -> DecodeState:
        """Choose each row's next token. Finished rows stay as they are."""
        chosen_B = next_tokens(logits_BV, sampling, state.tokens_BT, state.length_B, state.prompt_length_B, self._eos_id)
        goes_on_B = ~state.finished_B
        # A finished row rewrites its last token with itself.
        place_B = jnp.where(goes_on_B, state.length_B, state.length_B - 1)
        rows_B = jnp.arange(len(place_B))
        token_B = jnp.where(goes_on_B, chosen_B, state.tokens_BT[rows_B, place_B])
        remaining_B = state.remaining_B - goes_on_B
        return dataclasses.replace(
            state,
            tokens_BT=state.tokens_BT.at[rows_B, place_B].set(token_B),
            length_B=state.length_B + goes_on_B,
            remaining_B=remaining_B,
            finished_B=state.finished_B | (token_B == self._eos_id) | (remaining_B == 0),
        )

    def _step(self, params, state: DecodeState, sampling: Sampling) -> DecodeState:
        """Read each row's last token, choose its next."""
        if state.kv_cache is None:
            return self._append(self._whole(params, state), state, sampling)
        last_B = state.length_B - 1
        tokens_B1 = jnp.take_along_axis(state.tokens_BT, last_B[:, None], axis=1)
        logits_BV, kv_cache = nnx.merge(self._graph, params).cached(tokens_B1, last_B, jnp.zeros_like(last_B), state.kv_cache)
        return self._append(logits_BV, dataclasses.replace(state, kv_cache=kv_cache), sampling)

    def _loop(self, params, state: DecodeState, sampling: Sampling, max_steps) -> DecodeState:
        """Steps until every row is finished, one needs a longer cache, or there were max_steps."""
        T = state.tokens_BT.shape[1]

        def goes_on(carry):
            i, state = carry
            return (i < max_steps) & ~state.finished_B.all() & jnp.all(state.finished_B | (state.length_B < T))

        def step(carry):
            i, state = carry
            return i + 1, self._step(params, state, sampling)

        return jax.lax.while_loop(goes_on, step, (0, state))[1]

    def grow(self, state: DecodeState) -> DecodeState:
        """The next bucket's room."""
        return self.resize(state, length=bucket(state.tokens_BT.shape[1] + 1, self._max_seq_len, SMALLEST_CACHE))

    def _resize(self, state: DecodeState, length: int) -> DecodeState:
        """Room for `length` tokens; what is beyond them goes."""
        tokens_BT = state.tokens_BT[:, :length]
        tokens_BT = jnp.pad(tokens_BT, ((0, 0), (0, length - tokens_BT.shape[1])))
        kv_cache = None if state.kv_cache is None else resize_kv_cache(state.kv_cache, length)
        return dataclasses.replace(state, tokens_BT=tokens_BT, kv_cache=kv_cache)
