"""Token streams into rows."""

import numpy as np


def pack(stream: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut a shard's stream into rows that overlap by one token, so that each token but the first is a target exactly once.

    Args:
      stream: (n,) token ids, n >= 2: documents one behind the other.
      seq_len: S; a row holds S inputs and S targets.

    Returns:
      rows (R, S + 1) in the stream's dtype, R = ceil((n - 1) / S), the last one padded with 0;
      lengths (R,) int32, how many of a row's tokens are real. (No token id can mark padding: MateConv's tokenizer has no
      `<pad>`.)
    """
    n_rows = -(-(len(stream) - 1) // seq_len)
    padded = np.zeros(n_rows * seq_len + 1, stream.dtype)
    padded[: len(stream)] = stream
    rows = np.lib.stride_tricks.sliding_window_view(padded, seq_len + 1)[::seq_len]
    lengths = np.minimum(len(stream) - np.arange(n_rows) * seq_len, seq_len + 1).astype(np.int32)
    return rows, lengths
