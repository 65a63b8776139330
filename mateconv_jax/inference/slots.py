"""The compiled programs of continuous batching, over slots that keep what they have read.

The pool has a row for each slot, as long as the context: what its last request said and answered, for the next one that
continues it. Requests are prefilled in the pool. While they decode, their rows are copies in a batch, which is only as large
as it has to be: attention over unused positions and rows dominates decoding (batch 16: 2.3 times slower at length 512 than
at 96). A row moves from pool to batch when its request begins to decode, and back when it ends.

Dimensions in names: S slots, P rows prefilled together, B rows of the batch, C tokens of a prefill, T cache length, N steps.
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mateconv_jax.generation_config import GenerationConfig
from mateconv_jax.inference.decode import Decoder, DecodeState, Logprobs
from mateconv_jax.inference.sampling import Sampling
from mateconv_jax.model.config import ModelConfig
from mateconv_jax.model.kv_cache import KVCache, make_kv_cache
from mateconv_jax.runtime import xla_flags

MAX_STEPS = 16  # decode steps of one dispatch, at most
TOP_LOGPROBS = 20  # alternatives recorded for each token: OpenAI's limit
# Few sizes, so that few programs serve all. Prefills (P, C): four short prompts together take 0.7 of the time of four, but four
# of 256 tokens twice as long (2 cores). Several are prefilled together only where none is longer than SMALLEST_LENGTH, as
# questions that begin a dialogue are: a cache of 512 for each would take as long to fill and to attend over as all the rest (16
# prompts: 193 instead of 94 ms). Batches: B grows by a factor of 4 and T of 2, 3 x 4 programs for 16 slots and a context of
# 512. A step of 16 rows takes 14.5, 17.5 and 31 ms at a T of 64, 128 and 512.
PREFILL_TOKENS = {1: (16, 64, 256), 4: (16, 64), 16: (16,)}
BATCH_ROWS, SMALLEST_LENGTH = 4, 64


@flax.struct.dataclass
class Rows:
    """Cache rows and their tokens: the pool's (S, context), or the batch's (B, T)."""

    tokens: jax.Array
    kv_cache: KVCache


class Progress(NamedTuple):
    """Where the rows of a batch are, numpy arrays (B,) as in DecodeState."""

    length_B: np.ndarray
    prompt_length_B: np.ndarray
    remaining_B: np.ndarray
    finished_B: np.ndarray
    wants_logprobs_B: np.ndarray


class Moves(NamedTuple):
    """The first n pairs of batch rows and slots, int32: (rows_B, slots_B, n)."""

    rows_B: np.ndarray
    slots_B: np.ndarray
    n: np.int32

    @staticmethod
    def make(pairs: list[tuple[int, int]], B: int) -> "Moves":
        rows_slots_2B = np.zeros((2, B), np.int32)
        for i, pair in enumerate(pairs):
            rows_slots_2B[:, i] = pair
        return Moves(rows_slots_2B[0], rows_slots_2B[1], np.int32(len(pairs)))


class Output(NamedTuple):
    """What a dispatch did. tokens_BN: each row's new tokens; length_B and finished_B after it."""

    tokens_BN: jax.Array
    length_B: jax.Array
    finished_B: jax.Array
    logprobs: Logprobs


class SlotPrograms:
    """All programs that an engine needs, compiled by `compile`; a call never compiles anything.

    Attributes:
      batch_sizes, lengths: the B and T that a batch may have, ascending.
    """

    def __init__(self, graph: nnx.GraphDef, c: ModelConfig, eos_ids: tuple[int, ...], n_slots: int, context: int):
        self._decoder, self._c = Decoder(graph, c, eos_ids), c
        self.n_slots, self.context = n_slots, context
        self.batch_sizes = _sizes(1, BATCH_ROWS, n_slots)
        self.lengths = _sizes(SMALLEST_LENGTH, 2, context)
        self._chunks = {
            P: sorted({min(C, self.prefill_length(P)) for C in sizes}) for P, sizes in PREFILL_TOKENS.items() if P <= n_slots
        }
        self._programs: dict[tuple, jax.stages.Compiled] = {}

    def compile(self, params: nnx.State, progress=lambda done, total: None) -> None:
        """Compile everything, several programs at a time, and run each once. progress(done, total) is called after each."""
        options = xla_flags.compiler_options(self._c.platform)
        copy = jax.jit(
            lambda pool, source, target: _copy(pool, source, pool, target), donate_argnames="pool", compiler_options=options
        )
        prefill = jax.jit(self._prefill, static_argnames="C", donate_argnames="pool", compiler_options=options)
        decode = jax.jit(self._decode, donate_argnames=("pool", "batch"), compiler_options=options)
        shape = functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype))
        shapes, pool = shape(params), jax.eval_shape(lambda: self._empty(self.n_slots, self.context))
        tasks: dict[tuple, Callable[[], jax.stages.Lowered]] = {
            ("pool",): lambda: _zeros(self._empty, self.n_slots, self.context),
            ("copy",): lambda: copy.lower(pool, np.int32(0), np.int32(0)),
        }
        for P, chunks in self._chunks.items():
            rows = shape(self.prefill_arguments(P))
            for C in chunks:
                tasks["prefill", P, C] = functools.partial(prefill.lower, shapes, pool, *rows, C=C)
        for B in self.batch_sizes:
            for T in self.lengths:
                batch = jax.eval_shape(functools.partial(self._empty, B, T))
                rows = shape(self.decode_arguments(B))
                tasks["decode", B, T] = functools.partial(decode.lower, shapes, pool, batch, *rows)
                tasks["batch", B, T] = functools.partial(_zeros, self._empty, B, T)
        with ThreadPoolExecutor(2) as threads:
            compiled = threads.map(lambda task: task().compile(), tasks.values())
            for done, (name, program) in enumerate(zip(tasks, compiled, strict=True), 1):
                self._programs[name] = program
                progress(done, len(tasks))
        self._run_each(params)

    def _run_each(self, params: nnx.State) -> None:
        """The first run of a program takes longer: prefills of the base model 130 to 370 ms on 2 cores, in all 3 s."""
        pool = self.copy(self.empty_pool(), 0, 0)
        for P, chunks in self._chunks.items():
            for C in chunks:
                pool, _ = self.prefill(params, pool, C, self.prefill_arguments(P))
        for B in self.batch_sizes:
            progress, *others, _ = self.decode_arguments(B)
            progress = progress._replace(length_B=np.ones(B, np.int32), remaining_B=np.ones(B, np.int32))
            for T in self.lengths:
                pool, _, _ = self.decode(params, pool, self.empty_batch(B, T), (progress, *others, np.int32(1)))
        jax.block_until_ready(pool)

    # ---- calls ------------------------------------------------------------------------------------------------------

    def empty_pool(self) -> Rows:
        return self._programs["pool",]()

    def empty_batch(self, B: int, T: int) -> Rows:
        return self._programs["batch", B, T]()

    def copy(self, pool: Rows, source: int, target: int) -> Rows:
        """The pool with a copy of one slot in another."""
        return self._programs["copy",](pool, np.int32(source), np.int32(target))

    def prefill(self, params, pool: Rows, C: int, arguments):
        """See `_prefill`; `arguments` are its rows, numpy arrays."""
        return self._programs["prefill", len(arguments[0]), C](params, pool, *arguments)

    def decode(self, params, pool: Rows, batch: Rows, arguments):
        """See `_decode`; `arguments` are what follows the batch, numpy arrays."""
        return self._programs["decode", *batch.tokens.shape](params, pool, batch, *arguments)

    def prefill_arguments(self, P: int):
        """Example arguments of a prefill of P rows."""
        zeros_P = np.zeros(P, np.int32)
        tokens_PT = np.zeros((P, self.prefill_length(P)), np.int32)
        return zeros_P, tokens_PT, zeros_P, zeros_P, zeros_P, np.zeros(P, bool), self.no_sampling(P)

    def decode_arguments(self, B: int):
        """Example arguments of a dispatch of B rows."""
        zeros_B, none = np.zeros(B, np.int32), np.zeros(B, bool)
        progress = Progress(zeros_B, zeros_B, zeros_B, none, none)
        return progress, self.no_sampling(B), Moves.make([], B), Moves.make([], B), np.int32(0)

    def no_sampling(self, B: int) -> Sampling:
        return Sampling.for_rows([GenerationConfig(do_sample=False)] * B, [0] * B, self._c.vocab_size)

    def chunk(self, P: int, n_tokens: int) -> int:
        """How many tokens to prefill next of n_tokens: a size that is at most twice as large as needed, if there is one."""
        chunks = self._chunks[P]
        covering = next((size for size in chunks if size >= n_tokens), chunks[-1])
        if covering <= max(2 * n_tokens, chunks[0]):
            return covering
        return max(size for size in chunks if size <= n_tokens)

    def prefill_length(self, P: int) -> int:
        """T: how long the prompts of a prefill of P rows may be."""
        return self.context if P == 1 else min(SMALLEST_LENGTH, self.context)

    def prefill_groups(self, lengths: list[int], n_tokens: list[int]) -> list[tuple[int, list[int]]]:
        """How to prefill the last n_tokens of prompts of these lengths: (P, indices of at most P prompts) of each prefill. Of P
        rows at most a quarter is not used.
        """
        groups, left = [], list(range(len(n_tokens)))
        for P, chunks in sorted(self._chunks.items(), reverse=True):
            T = self.prefill_length(P)
            short = [i for i in left if P == 1 or n_tokens[i] <= chunks[-1] and lengths[i] < T]
            while len(short) >= P - P // 4 and short:
                groups.append((P, short[:P]))
                left = [i for i in left if i not in short[:P]]
                short = short[P:]
        return groups

    # ---- programs -----------------------------------------------------------------------------------------------------

    def _empty(self, rows: int, length: int) -> Rows:
        return Rows(jnp.zeros((rows, length), jnp.int32), make_kv_cache(self._c, rows, length))

    def _prefill(
        self, params, pool: Rows, slots_P, tokens_PT, start_P, length_P, remaining_P, wants_logprobs_P, sampling, C: int
    ):
        """Read C tokens of some slots into the pool, and draw the token that follows the last.

        Args:
          slots_P: int32; rows of the same slot must be equal in everything.
          tokens_PT: int32, whole prompts, length_P tokens each; T as `prefill_length` says.
          start_P: int32, the first position to read; those before it are in the slot.
          remaining_P: int32, new tokens each may get.

        Returns:
          (pool, Output of the drawn tokens, which mean nothing for a row whose last token is not among the C)
        """
        P, T = tokens_PT.shape
        # Loops around the copies, here and below: without them XLA moves reads of the pool behind its update, and copies all of
        # it first: 200 instead of 40 ms for 16 tokens (2 busy cores).
        rows = self._empty(P, T)
        n_continued = jnp.where((start_P > 0).any(), P, 0)
        rows = jax.lax.fori_loop(0, n_continued, lambda p, rows: _copy(pool, slots_P[p], rows, p), rows)
        state = DecodeState(
            tokens_BT=tokens_PT,
            length_B=length_P,
            prompt_length_B=length_P,
            remaining_B=remaining_P,
            finished_B=jnp.zeros(P, bool),
            kv_cache=rows.kv_cache,
            logprobs=Logprobs.make(wants_logprobs_P, length_P, 1, TOP_LOGPROBS),
        )
        logits_PV, state = self._decoder.read(params, state, start_P, C)
        state = self._decoder.choose(logits_PV, state, sampling)
        assert state.kv_cache is not None and state.logprobs is not None
        rows = Rows(state.tokens_BT, state.kv_cache)
        pool = jax.lax.fori_loop(0, P, lambda p, pool: _copy_read(rows, p, pool, slots_P[p], start_P[p], C), pool)
        new_P1 = jnp.take_along_axis(state.tokens_BT, length_P[:, None], axis=1)
        return pool, Output(new_P1, state.length_B, state.finished_B, state.logprobs)

    def _decode(self, params, pool: Rows, batch: Rows, progress: Progress, sampling, load: Moves, store: Moves, max_steps):
        """Copy rows from the pool into the batch, decode at most max_steps <= MAX_STEPS tokens a row, copy rows into the pool.

        Returns:
          (pool, batch, Output)
        """
        length_B, prompt_length_B, remaining_B, finished_B, wants_B = map(jnp.asarray, progress)
        batch = jax.lax.fori_loop(0, load.n, lambda i, b: _copy(pool, load.slots_B[i], b, load.rows_B[i]), batch)
        state = DecodeState(
            tokens_BT=batch.tokens,
            length_B=length_B,
            prompt_length_B=prompt_length_B,
            remaining_B=remaining_B,
            finished_B=finished_B,
            kv_cache=batch.kv_cache,
            logprobs=Logprobs.make(wants_B, length_B, MAX_STEPS, TOP_LOGPROBS),
        )
        state = self._decoder.steps(params, state, sampling, max_steps)
        assert state.kv_cache is not None and state.logprobs is not None
        batch = Rows(state.tokens_BT, state.kv_cache)
        pool = jax.lax.fori_loop(0, store.n, lambda i, p: _copy(batch, store.rows_B[i], p, store.slots_B[i]), pool)
        T = batch.tokens.shape[1]
        positions_BN = jnp.minimum(length_B[:, None] + jnp.arange(MAX_STEPS), T - 1)
        new_BN = jnp.take_along_axis(state.tokens_BT, positions_BN, axis=1)
        return pool, batch, Output(new_BN, state.length_B, state.finished_B, state.logprobs)


def _copy(source: Rows, source_row, target: Rows, target_row) -> Rows:
    """Copy a row, as much of it as both have room for."""
    T = min(source.tokens.shape[1], target.tokens.shape[1])

    def copy(x, y, axis):
        x = jax.lax.slice_in_dim(jax.lax.dynamic_slice_in_dim(x, source_row, 1), 0, T, axis=axis)
        return jax.lax.dynamic_update_slice(y, x, (target_row, *[0] * (y.ndim - 1)))

    kv_cache = tuple(
        (copy(k, other_k, 3), copy(v, other_v, 2))
        for (k, v), (other_k, other_v) in zip(source.kv_cache, target.kv_cache, strict=True)
    )
    return Rows(copy(source.tokens, target.tokens, 1), kv_cache)


def _copy_read(source: Rows, source_row, target: Rows, target_row, start, C: int) -> Rows:
    """Copy a row's tokens, and keys and values of the positions start .. start + C - 1."""

    def copy(x, y, axis):
        x = jax.lax.dynamic_slice_in_dim(jax.lax.dynamic_slice_in_dim(x, source_row, 1), start, C, axis)
        return jax.lax.dynamic_update_slice(y, x, (target_row, *(start if i == axis else 0 for i in range(1, y.ndim))))

    kv_cache = tuple(
        (copy(k, other_k, 3), copy(v, other_v, 2))
        for (k, v), (other_k, other_v) in zip(source.kv_cache, target.kv_cache, strict=True)
    )
    tokens = jax.lax.dynamic_slice_in_dim(source.tokens, source_row, 1)
    return Rows(jax.lax.dynamic_update_slice(target.tokens, tokens, (target_row, 0)), kv_cache)


def _zeros(empty, rows: int, length: int):
    return jax.jit(lambda: empty(rows, length)).lower()


def _sizes(first: int, factor: int, last: int) -> list[int]:
    """first, first * factor, … below last, and last."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= factor
    return [*sizes, last]
