"""MateConv's flat `.bin` file as rows."""

import os
from pathlib import Path

import numpy as np

from mateconv_jax.data.rows import Batch, starts_after_end
from mateconv_jax.errors import UserError

HEAD_TOKENS = 1 << 20  # at the file's beginning, which show whether documents begin with `<s>`


def n_rows(path: str | Path, seq_len: int, key: str) -> int:
    """How many rows of seq_len targets the file is cut into.

    Raises:
      UserError: no such file, or not such a stream. `key` names the flag or configuration key that gave the path.
    """
    if not Path(path).is_file():
        raise UserError(f"{key}: no file at {os.fspath(path)!r}")
    n_bytes = Path(path).stat().st_size
    if n_bytes % 2 or n_bytes < 4:
        raise UserError(f"{key}: {os.fspath(path)!r} has {n_bytes} bytes (expected 16-bit token ids, at least two)")
    return -(-(n_bytes // 2 - 1) // seq_len)


class FlatRows:
    """A flat stream of 16-bit token ids, MateConv's pretrain_data.bin, as rows that overlap by one token.

    The rows are those that packing.pack would make of the stream. Any number of threads may read.

    Args:
      key: as in `n_rows`.
      document_starts: the ids of `<s>`, if there is one, and `</s>`: batches have `document_starts`, see rows.starts_after_end;
        a file that does not begin with documents in `<s>` has none. None: batches come without.

    Raises:
      UserError: as `n_rows`.
    """

    def __init__(self, path: str | Path, seq_len: int, key: str, document_starts: tuple[int | None, int] | None = None):
        self._n_rows = n_rows(path, seq_len, key)
        self._path = path
        self._seq_len = seq_len
        self._bos_eos = document_starts
        # Not a memory map: reading is 1.3 times faster, and the process does not seem to grow by the size of the file.
        self._file = open(path, "rb", buffering=0)
        if document_starts is not None and document_starts[0] not in np.fromfile(path, "<u2", HEAD_TOKENS):
            self._bos_eos = None, document_starts[1]

    def __len__(self) -> int:
        return self._n_rows

    def read(self, indices: np.ndarray) -> Batch:
        """Rows by number (B,), in any order; the file's last row is padded with 0.

        Raises:
          UserError: the file cannot be read.
        """
        n_bytes = 2 * (self._seq_len + 1)
        try:
            records = [os.pread(self._file.fileno(), n_bytes, 2 * self._seq_len * index) for index in indices.tolist()]
        except OSError as error:
            raise UserError(f"{os.fspath(self._path)!r}: cannot read token ids ({error.strerror})") from error
        tokens = np.frombuffer(b"".join(record.ljust(n_bytes, b"\0") for record in records), "<u2")
        length = np.array([len(record) // 2 for record in records], np.int32)
        batch = {"tokens": tokens.reshape(len(records), self._seq_len + 1), "length": length}
        if self._bos_eos is not None:
            batch["document_starts"] = starts_after_end(batch["tokens"], *self._bos_eos)
        return batch

    def largest_token(self) -> int:
        """Over the whole file, in blocks of 32 MB."""
        largest = 0
        with open(self._path, "rb") as file:
            while len(block := np.fromfile(file, "<u2", 2**24)):
                largest = max(largest, int(block.max()))
        return largest
