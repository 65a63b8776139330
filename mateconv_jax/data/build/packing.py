"""Token streams, whole dialogues and pairs as rows."""

import bisect
from collections.abc import Sequence

import numpy as np

from mateconv_jax.data.build.dialogues import RowPair
from mateconv_jax.data.rows import Batch


def pack(stream: dict[str, np.ndarray], seq_len: int) -> Batch:
    """Cut a shard's stream into rows that overlap by one token, so that every token except the first is a target exactly once.

    Args:
      stream: (n,) arrays of concatenated documents, n >= 2: tokens, and optionally document_starts and learned.
      seq_len: S; a row holds S inputs and S targets.

    Returns:
      R = ceil((n - 1) / S) rows with the same fields, (R, S + 1) in the stream's dtypes, the last one padded with 0; and length
      (R,) int32, the number of non-padding tokens. (MateConv's tokenizer has no `<pad>`, so no token id can mark padding.)
    """
    n = len(stream["tokens"])
    n_rows = -(-(n - 1) // seq_len)

    def windows(values: np.ndarray) -> np.ndarray:
        padded = np.zeros(n_rows * seq_len + 1, values.dtype)
        padded[:n] = values
        return np.lib.stride_tricks.sliding_window_view(padded, seq_len + 1)[::seq_len]

    length = np.minimum(n - np.arange(n_rows) * seq_len, seq_len + 1).astype(np.int32)
    return {name: windows(values) for name, values in stream.items()} | {"length": length}


def pack_whole(documents: Sequence[tuple[np.ndarray, np.ndarray]], seq_len: int, dtype: np.dtype) -> Batch:
    """Pack whole documents into rows by best fit.

    Args:
      documents: (ids, learned) of each, (n,) arrays, n <= seq_len + 1.
      dtype: of the tokens.

    Returns:
      R rows: tokens, document_starts and learned, (R, S + 1), padded with 0; and length (R,) int32.
    """
    rows = best_fit([len(ids) for ids, _ in documents], seq_len + 1)
    tokens_RS = np.zeros((len(rows), seq_len + 1), dtype)
    starts_RS, learned_RS = (np.zeros(tokens_RS.shape, bool) for _ in range(2))
    length_R = np.zeros(len(rows), np.int32)
    for r, row in enumerate(rows):
        for document in row:
            ids, learned = documents[document]
            place = slice(length_R[r], length_R[r] + len(ids))
            tokens_RS[r, place], learned_RS[r, place] = ids, learned
            starts_RS[r, length_R[r]] = True
            length_R[r] += len(ids)
    return {"tokens": tokens_RS, "document_starts": starts_RS, "learned": learned_RS, "length": length_R}


def pair_rows(pairs: Sequence[RowPair], seq_len: int, dtype: np.dtype) -> Batch:
    """A row for each pair, of dialogues of at most seq_len + 1 tokens: tokens and learned (R, 2, S + 1), padded with 0, and
    length (R, 2) int32.
    """
    tokens_R2S = np.zeros((len(pairs), 2, seq_len + 1), dtype)
    learned_R2S = np.zeros(tokens_R2S.shape, bool)
    length_R2 = np.zeros(tokens_R2S.shape[:2], np.int32)
    for r, pair in enumerate(pairs):
        for i, (ids, learned, _) in enumerate(pair):
            length_R2[r, i] = len(ids)
            tokens_R2S[r, i, : len(ids)], learned_R2S[r, i, : len(ids)] = ids, learned
    return {"tokens": tokens_R2S, "learned": learned_R2S, "length": length_R2}


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing bin packing: at most 11/9 of the optimal number of bins (Johnson, 1973).

    Returns:
      Bins of at most `capacity`, each a sorted list of items, ordered by their first item.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, bin), sorted
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
        i = bisect.bisect_left(rooms, (sizes[item], 0))
        if i < len(rooms):
            room, b = rooms.pop(i)
        else:
            room, b = capacity, len(bins)
            bins.append([])
        bins[b].append(item)
        if room > sizes[item]:
            bisect.insort(rooms, (room - sizes[item], b))
    return sorted(map(sorted, bins))


def join(parts: list[Batch]) -> Batch:
    """Concatenate rows. If some have the field `learned`, all non-padding tokens of the others are learned."""
    if any("learned" in rows for rows in parts):
        parts = [{"learned": is_real(rows)} | rows for rows in parts]
    return {name: np.concatenate([rows[name] for rows in parts]) for name in parts[0]}


def is_real(rows: Batch) -> np.ndarray:
    """(R, S + 1) bool, True for non-padding tokens."""
    return np.arange(rows["tokens"].shape[1]) < rows["length"][:, None]
