"""Prefill and decoding of token ids. Decoding is a `lax.while_loop` that runs until all rows are finished or, for streaming,
for a few steps.

Dimensions in names: B rows, S tokens of one prefill, T cache bucket, V vocabulary, N recorded tokens, K alternatives.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from mateconv_jax.inference.sampling import Sampling, next_tokens
from mateconv_jax.model.config import ModelConfig
from mateconv_jax.model.kv_cache import KVCache, resize_kv_cache
from mateconv_jax.runtime import xla_flags

# Prompt and cache lengths are rounded up to these times a power of two (at most the model's maximum), so that a chat compiles
# only a handful of programs. The cache starts small and grows bucket by bucket, because attention over unused slots dominates
# decoding: batch 16 is 2.3 times faster at cache length 64 than at 512 (2 cores).
SMALLEST_PROMPT, SMALLEST_CACHE = 16, 64

STOP_CHECK_TOKENS = 16  # with stop strings, the host checks the answers every this many tokens


def bucket(length: int, max_seq_len: int, smallest: int) -> int:
    """`smallest` times the first power of two that makes it at least `length`, capped at max_seq_len."""
    size = smallest
    while size < length:
        size *= 2
    return min(size, max_seq_len)


@flax.struct.dataclass
class Logprobs:
    """Natural log-probabilities of new tokens in the model's own distribution, before any filter.

    Attributes:
      wanted_B: bool; other rows' numbers mean nothing.
      first_B: int32, the position that column 0 stands for.
      chosen_BN: fp32, of the tokens that were chosen.
      token_BNK, logprob_BNK: int32 and fp32, the K most likely tokens at each position, in descending order.
    """

    wanted_B: jax.Array
    first_B: jax.Array
    chosen_BN: jax.Array
    token_BNK: jax.Array
    logprob_BNK: jax.Array

    @staticmethod
    def make(wanted_B: jax.Array, first_B: jax.Array, N: int, K: int) -> "Logprobs":
        B = len(wanted_B)
        zeros_BNK = jnp.zeros((B, N, K))
        return Logprobs(wanted_B, first_B, jnp.zeros((B, N)), zeros_BNK.astype(jnp.int32), zeros_BNK)

    def record(self, logits_BV, token_B, column_B) -> "Logprobs":
        """Write column column_B of each row; a column out of range is dropped."""
        K = self.token_BNK.shape[2]

        def compute(logits_BV):
            logprobs_BV = jax.nn.log_softmax(logits_BV.astype(jnp.float32))
            highest_BK, token_BK = jax.lax.top_k(logprobs_BV, K)
            return jnp.take_along_axis(logprobs_BV, token_B[:, None], axis=1)[:, 0], token_BK, highest_BK

        def nothing(logits_BV):
            B = len(token_B)
            return jnp.zeros(B), jnp.zeros((B, K), jnp.int32), jnp.zeros((B, K))

        chosen_B, token_BK, highest_BK = jax.lax.cond(self.wanted_B.any(), compute, nothing, logits_BV)
        at = jnp.arange(len(token_B)), column_B
        return dataclasses.replace(
            self,
            chosen_BN=self.chosen_BN.at[at].set(chosen_B, mode="drop"),
            token_BNK=self.token_BNK.at[at].set(token_BK, mode="drop"),
            logprob_BNK=self.logprob_BNK.at[at].set(highest_BK, mode="drop"),
        )


@flax.struct.dataclass
class DecodeState:
    """Everything that decoding updates.

    Attributes:
      tokens_BT: int32, prompt and answer so far, each token at its position.
      length_B: int32, tokens in each row; the last one is not in the cache yet.
      prompt_length_B: int32, how many of them are the prompt.
      remaining_B: int32, new tokens each row may still get.
      finished_B: bool, an end token was drawn or no tokens remain.
      kv_cache: None: recompute all positions for every token.
      logprobs: None: not recorded.
    """

    tokens_BT: jax.Array
    length_B: jax.Array
    prompt_length_B: jax.Array
    remaining_B: jax.Array
    finished_B: jax.Array
    kv_cache: KVCache | None
    logprobs: Logprobs | None = None


def _on_each_device(mesh: Mesh | None, function: Callable) -> Callable:
    """`function` of rows, on each device for its rows; parameters and scalars are on all. XLA's partitioner would exchange
    seven small arrays between the devices for every token, and let none end its loop before the last one.
    """
    if mesh is None or mesh.size == 1:
        return function
    everywhere, rows = PartitionSpec(), PartitionSpec(mesh.axis_names)

    @functools.wraps(function)
    def on_each_device(*arguments, **static):
        specs = tuple(
            jax.tree.map(lambda x, of=argument: everywhere if isinstance(of, nnx.State) or jnp.ndim(x) == 0 else rows, argument)
            for argument in arguments
        )
        of_its_rows = functools.partial(function, **static)
        return jax.shard_map(of_its_rows, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)(*arguments)

    return on_each_device


class Decoder:
    """The functions of one model: `read`, `choose` and `steps` for other programs to call, and compiled as `prefill`, `append`
    and `loop`. These donate the state they are given; `repeat` and `resize` do not.
    """

    def __init__(self, graph: nnx.GraphDef, c: ModelConfig, eos_ids: tuple[int, ...], mesh: Mesh | None = None):
        """
        Args:
          eos_ids: the tokens that end an answer; with none, every answer runs to its limit.
          mesh: each of its devices decodes its share of the rows; None: one device decodes all.
        """
        self._graph, self._eos_ids, self._max_seq_len = graph, eos_ids, c.max_seq_len
        options = xla_flags.compiler_options(c.platform)
        on_each = functools.partial(_on_each_device, mesh)
        self.prefill = jax.jit(on_each(self.read), static_argnames="S", donate_argnames="state", compiler_options=options)
        self.repeat = jax.jit(on_each(self._repeat), static_argnames="n")
        self.append = jax.jit(on_each(self.choose), donate_argnames="state")
        self.loop = jax.jit(on_each(self.steps), donate_argnames="state", compiler_options=options)
        self.resize = jax.jit(on_each(self._resize), static_argnames="length")

    def run(
        self,
        params: nnx.State,
        state: DecodeState,
        sampling: Sampling,
        S: int,
        n_samples: int = 1,
        stop: Callable[[DecodeState], jax.Array] | None = None,
    ) -> DecodeState:
        """Decode from prompts to finished rows. Control returns to the host only to grow the cache and to call `stop`.

        Args:
          state: B prompts; donated.
          S: the bucket of the longest prompt.
          n_samples: continuations per prompt; the result has B * n_samples rows, those of a prompt next to each other.
          stop: computes a new finished_B from the state; called every STOP_CHECK_TOKENS tokens. None: decode to the end.
        """
        logits_BV, state = self.prefill(params, state, 0, S=S)
        if n_samples > 1:
            logits_BV, state = self.repeat(logits_BV, state, n=n_samples)
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

    def read(self, params, state: DecodeState, start, S: int):
        """Read positions start .. start + S - 1 of each row into the cache. Earlier positions must be in the cache already.

        Args:
          start: int32, of all rows or (B,); start + S must fit the cache.

        Returns:
          (logits_BV after each row's last token, which mean nothing for a row whose last token is not in this range; the state)
        """
        if state.kv_cache is None:
            return self._uncached_logits(params, state), state
        start_B = jnp.broadcast_to(jnp.asarray(start, jnp.int32), state.length_B.shape)
        tokens_BS = jnp.take_along_axis(state.tokens_BT, start_B[:, None] + jnp.arange(S), axis=1)
        last_B = jnp.clip(state.length_B - 1 - start_B, 0, S - 1)
        logits_BV, kv_cache = nnx.merge(self._graph, params).cached(tokens_BS, start_B, last_B, state.kv_cache)
        return logits_BV, dataclasses.replace(state, kv_cache=kv_cache)

    def _uncached_logits(self, params, state: DecodeState):
        """logits_BV after each row's last token."""
        logits_BTV = nnx.merge(self._graph, params)(state.tokens_BT)
        return jnp.take_along_axis(logits_BTV, (state.length_B - 1)[:, None, None], axis=1)[:, 0]

    def _repeat(self, logits_BV, state: DecodeState, n: int):
        """Repeat each row n times."""
        return jax.tree.map(lambda x: jnp.repeat(x, n, axis=0), (logits_BV, state))

    def choose(self, logits_BV, state: DecodeState, sampling: Sampling) -> DecodeState:
        """Choose and append each row's next token. Finished rows do not change."""
        chosen_B = next_tokens(logits_BV, sampling, state.tokens_BT, state.length_B, state.prompt_length_B, self._eos_ids)
        active_B = ~state.finished_B
        # A finished row overwrites its last token with itself.
        position_B = jnp.where(active_B, state.length_B, state.length_B - 1)
        rows_B = jnp.arange(len(position_B))
        token_B = jnp.where(active_B, chosen_B, state.tokens_BT[rows_B, position_B])
        remaining_B = state.remaining_B - active_B
        logprobs = state.logprobs
        if logprobs is not None:
            column_B = jnp.where(active_B, position_B - logprobs.first_B, logprobs.chosen_BN.shape[1])
            logprobs = logprobs.record(logits_BV, token_B, column_B)
        ends_B = jnp.isin(token_B, jnp.array(self._eos_ids, jnp.int32))
        return dataclasses.replace(
            state,
            tokens_BT=state.tokens_BT.at[rows_B, position_B].set(token_B),
            length_B=state.length_B + active_B,
            remaining_B=remaining_B,
            finished_B=state.finished_B | ends_B | (remaining_B == 0),
            logprobs=logprobs,
        )

    def _step(self, params, state: DecodeState, sampling: Sampling) -> DecodeState:
        """One decode step: read each row's last token and append the next."""
        if state.kv_cache is None:
            return self.choose(self._uncached_logits(params, state), state, sampling)
        last_B = state.length_B - 1
        tokens_B1 = jnp.take_along_axis(state.tokens_BT, last_B[:, None], axis=1)
        logits_BV, kv_cache = nnx.merge(self._graph, params).cached(tokens_B1, last_B, jnp.zeros_like(last_B), state.kv_cache)
        return self.choose(logits_BV, dataclasses.replace(state, kv_cache=kv_cache), sampling)

    def steps(self, params, state: DecodeState, sampling: Sampling, max_steps) -> DecodeState:
        """Decode until all rows are finished, an active row needs a longer cache, or max_steps steps are done."""
        T = state.tokens_BT.shape[1]

        def is_active(carry):
            i, state = carry
            return (i < max_steps) & ~state.finished_B.all() & jnp.all(state.finished_B | (state.length_B < T))

        def step(carry):
            i, state = carry
            return i + 1, self._step(params, state, sampling)

        return jax.lax.while_loop(is_active, step, (0, state))[1]

    def grow(self, state: DecodeState) -> DecodeState:
        """Resize to the next bucket."""
        return self.resize(state, length=bucket(state.tokens_BT.shape[1] + 1, self._max_seq_len, SMALLEST_CACHE))

    def _resize(self, state: DecodeState, length: int) -> DecodeState:
        """Pad or cut tokens and cache to `length` positions."""
        tokens_BT = state.tokens_BT[:, :length]
        tokens_BT = jnp.pad(tokens_BT, ((0, 0), (0, length - tokens_BT.shape[1])))
        kv_cache = None if state.kv_cache is None else resize_kv_cache(state.kv_cache, length)
        return dataclasses.replace(state, tokens_BT=tokens_BT, kv_cache=kv_cache)
