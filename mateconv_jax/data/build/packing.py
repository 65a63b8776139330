"""Token streams into rows."""

import numpy as np

from mateconv_jax.data.rows import Batch


def pack(stream: dict[str, np.ndarray], seq_len: int) -> Batch:
    """Cut a shard's stream into rows that overlap by one token, so that each token but the first is a target exactly once.

    Args:
      stream: (n,) arrays, n >= 2, of documents one behind the other: tokens; document_starts and learned where they are known.
      seq_len: S; a row holds S inputs and S targets.

    Returns:
      R = ceil((n - 1) / S) rows of the same fields, (R, S + 1) in the stream's dtypes, the last one padded with 0; and length
      (R,) int32, how many of a row's tokens are real. (No token id can mark padding: MateConv's tokenizer has no `<pad>`.)
    """
    n = len(stream["tokens"])
    n_rows = -(-(n - 1) // seq_len)

    def windows(values: np.ndarray) -> np.ndarray:
        padded = np.zeros(n_rows * seq_len + 1, values.dtype)
        padded[:n] = values
        return np.lib.stride_tricks.sliding_window_view(padded, seq_len + 1)[::seq_len]

    length = np.minimum(n - np.arange(n_rows) * seq_len, seq_len + 1).astype(np.int32)
    return {name: windows(values) for name, values in stream.items()} | {"length": length}
