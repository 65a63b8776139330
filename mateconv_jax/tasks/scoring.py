"""Log-likelihoods of answers, batched by length.

Answers that differ in their last token alone, such as the letters of one question, are one row of a batch. Rows are sorted, so
that batches, and with them the numbers to the last bit, do not depend on the order of the questions.

Dimensions in names: B rows, S tokens, T positions that are scored, K candidates for the last token, N answers.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mateconv_jax.runtime import sharding
from mateconv_jax.tasks.encoding import Scored

TOKENS_PER_DEVICE = 8192  # of a batch
LOGITS_PER_DEVICE = 2**26  # of a batch: 256 MB in fp32
SHORTEST = 32
LAG = 4  # batches dispatched but not yet read


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of one length, of which this process holds its part.

    Attributes:
      tokens_BS: int32, the answer's last token left out.
      last_B: int32, index of each row's last token.
      candidates_BK: int32, the tokens that may come next.
      n_positions: T; how many positions, at a row's end, are scored.
      members: of every answer (n, row of the global batch, candidate, its tokens).
    """

    tokens_BS: np.ndarray
    last_B: np.ndarray
    candidates_BK: np.ndarray
    n_positions: int
    members: list[tuple[int, int, int, int]]


@dataclasses.dataclass(frozen=True)
class Scores:
    """
    Attributes:
      log_likelihood_N: float64, natural log, summed over an answer's tokens.
      is_likeliest_N: whether each token of the answer is the likeliest one at its place.
    """

    log_likelihood_N: np.ndarray
    is_likeliest_N: np.ndarray


class Scorer:
    """Scores the same answers with any weights of one model, on all devices of the mesh."""

    def __init__(
        self,
        graph: nnx.GraphDef,
        mesh: Mesh,
        max_seq_len: int,
        vocab_size: int,
        answers: list[Scored],
        batch_size: int | None = None,
    ):
        """batch_size: rows over all devices, in every batch; None: as many as TOKENS_PER_DEVICE allows."""
        self._mesh, self._n_answers = mesh, len(answers)
        self.batches = make_batches(answers, max_seq_len, vocab_size, mesh.size, batch_size)
        self._score = jax.jit(
            functools.partial(_score, graph), static_argnames="n_positions", out_shardings=sharding.replicated(mesh)
        )

    def __call__(
        self,
        params: nnx.State,
        should_stop: Callable[[], bool] = lambda: False,
        progress: Callable[[Iterable, int], Iterable] = lambda batches, n: batches,
    ) -> Scores | None:
        """Score with parameters that are on the mesh. None if `should_stop` became true before the end.

        Args:
          progress: wraps the iteration over n batches, to show its progress.
        """
        scores = Scores(np.zeros(self._n_answers), np.zeros(self._n_answers, bool))
        pending = collections.deque()

        def read_oldest():
            batch, results = pending.popleft()
            _put_in_place(scores, batch, *(np.asarray(x) for x in jax.device_get(results)))

        for batch in progress(self.batches, len(self.batches)):
            if should_stop():
                return None
            arrays = {"tokens_BS": batch.tokens_BS, "last_B": batch.last_B, "candidates_BK": batch.candidates_BK}
            on_devices = sharding.to_devices({name: _own_part(x) for name, x in arrays.items()}, self._mesh)
            pending.append((batch, self._score(params, **on_devices, n_positions=batch.n_positions)))
            if len(pending) > LAG:
                read_oldest()
        while pending:
            read_oldest()
        return scores


def _score(graph: nnx.GraphDef, params: nnx.State, tokens_BS, last_B, candidates_BK, n_positions: int):
    """Of the last T positions of each row: log-probabilities (B, T) fp32 of the tokens that follow within the row, the last
    column without meaning; likeliest tokens (B, T) int32; and log-probabilities (B, K) fp32 of the candidates for the last one.
    """
    positions_BT = jnp.maximum(last_B[:, None] - jnp.arange(n_positions)[::-1], 0)
    logits_BTV = nnx.merge(graph, params).logits_at(tokens_BS, positions_BT).astype(jnp.float32)
    log_probs_BTV = jax.nn.log_softmax(logits_BTV)
    next_BT = jnp.take_along_axis(tokens_BS, jnp.minimum(positions_BT + 1, tokens_BS.shape[1] - 1), axis=1)
    log_probs_BT = jnp.take_along_axis(log_probs_BTV, next_BT[..., None], axis=-1)[..., 0]
    log_probs_BK = jnp.take_along_axis(log_probs_BTV[:, -1], candidates_BK, axis=-1)
    return log_probs_BT, jnp.argmax(logits_BTV, axis=-1).astype(jnp.int32), log_probs_BK


def _put_in_place(scores: Scores, batch: Batch, log_probs_BT, likeliest_BT, log_probs_BK) -> None:
    for n, row, candidate, n_tokens in batch.members:
        end = batch.last_B[row] + 1
        before = log_probs_BT[row, -n_tokens:-1].astype(np.float64)  # of the answer, up to its last token
        scores.log_likelihood_N[n] = before.sum() + np.float64(log_probs_BK[row, candidate])
        answer = [*batch.tokens_BS[row, end - n_tokens + 1 : end], batch.candidates_BK[row, candidate]]
        scores.is_likeliest_N[n] = np.array_equal(likeliest_BT[row, -n_tokens:], answer)


def _own_part(x: np.ndarray) -> np.ndarray:
    """This process's rows of a global batch."""
    share = len(x) // jax.process_count()
    return x[jax.process_index() * share :][:share]


# ---- batches ------------------------------------------------------------------------------------------------------


def make_batches(
    answers: list[Scored], max_seq_len: int, vocab_size: int, n_devices: int, batch_size: int | None = None
) -> list[Batch]:
    """All rows, the longest first, padded to a few lengths: one shape, and one compiled program, for each of them.

    Args:
      batch_size: rows of every batch, divisible by n_devices; None: TOKENS_PER_DEVICE and LOGITS_PER_DEVICE decide.
    """
    rows: dict[bytes, list[int]] = {}  # inputs: the answers that they are scored for
    for n, answer in enumerate(answers):
        rows.setdefault(answer.ids[:-1].tobytes(), []).append(n)
    by_length: dict[int, list[bytes]] = {}
    for inputs in rows:
        by_length.setdefault(_padded_length(len(inputs) // 4, max_seq_len), []).append(inputs)
    batches = []
    for length in sorted(by_length, reverse=True):
        of_length = sorted(by_length[length], key=lambda inputs: (len(inputs), inputs))
        members = [n for inputs in of_length for n in rows[inputs]]
        n_positions = min(_power_of(4, max(answers[n].n_answer for n in members)), length)
        n_candidates = _power_of(2, max(len({_last(answers[n]) for n in rows[inputs]}) for inputs in of_length))
        n_rows = batch_size or _n_rows(len(of_length), length, n_positions * vocab_size, n_devices)
        for some in _chunks(of_length, n_rows):
            batches.append(_batch(answers, rows, some, (n_rows, length, n_candidates, n_positions)))
    return batches


def _batch(answers: list[Scored], rows: dict[bytes, list[int]], some: list[bytes], shape: tuple[int, int, int, int]) -> Batch:
    B, S, K, T = shape
    batch = Batch(np.zeros((B, S), np.int32), np.zeros(B, np.int32), np.zeros((B, K), np.int32), T, [])
    for row, inputs in enumerate(some):
        tokens = np.frombuffer(inputs, np.int32)
        batch.tokens_BS[row, : len(tokens)] = tokens
        batch.last_B[row] = len(tokens) - 1
        candidates = sorted({_last(answers[n]) for n in rows[inputs]})
        batch.candidates_BK[row, : len(candidates)] = candidates
        batch.members.extend((n, row, candidates.index(_last(answers[n])), answers[n].n_answer) for n in rows[inputs])
    return batch


def _last(answer: Scored) -> int:
    return int(answer.ids[-1])


def _padded_length(length: int, max_seq_len: int) -> int:
    """32, 48, 64, 96, 128 …: at most half of a row is padding. All are even, as cuDNN's attention wants it."""
    padded = SHORTEST
    while padded < length:
        padded = padded * 3 // 2 if padded & (padded - 1) == 0 else padded * 4 // 3
    return max(length, min(padded, max_seq_len))


def _n_rows(n: int, length: int, logits_per_row: int, n_devices: int) -> int:
    """Of a batch over all devices: no more than n need."""
    most = max(1, min(TOKENS_PER_DEVICE // length, LOGITS_PER_DEVICE // logits_per_row))
    return n_devices * min(most, _power_of(2, -(-n // n_devices)))


def _power_of(base: int, at_least: int) -> int:
    power = 1
    while power < at_least:
        power *= base
    return power


def _chunks(rows: list[bytes], size: int) -> Iterator[list[bytes]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
