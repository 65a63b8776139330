"""MateConv's flat `.bin` file as rows."""

import os
from pathlib import Path

import numpy as np

from mateconv_jax.data.shards import Batch
from mateconv_jax.errors import UserError


class FlatRows:
    """A flat stream of 16-bit token ids, MateConv's pretrain_data.bin, as rows that overlap by one token.

    The rows are those that packing.pack would make of the stream. Any number of threads may read.

    Raises:
      UserError: no such file, or not such a stream. `key` names the configuration key that gave the path.
    """

    def __init__(self, path: str | Path, seq_len: int, key: str):
        if not Path(path).is_file():
            raise UserError(f"{key}: no file at {os.fspath(path)!r}")
        n_bytes = Path(path).stat().st_size
        if n_bytes % 2 or n_bytes < 4:
            raise UserError(f"{key}: {os.fspath(path)!r} has {n_bytes} bytes (expected 16-bit token ids, at least two)")
        self._path = path
        self._n_tokens = n_bytes // 2
        self._seq_len = seq_len
        # Not a memory map: reading is 1.3 times faster, and the process does not seem to grow by the size of the file.
        self._file = open(path, "rb", buffering=0)

    def __len__(self) -> int:
        return -(-(self._n_tokens - 1) // self._seq_len)

    def read(self, indices: np.ndarray) -> Batch:
        """Rows by number (B,), in any order; the file's last row is padded with 0."""
        n_bytes = 2 * (self._seq_len + 1)
        records = [os.pread(self._file.fileno(), n_bytes, 2 * self._seq_len * index) for index in indices.tolist()]
        tokens = np.frombuffer(b"".join(record.ljust(n_bytes, b"\0") for record in records), "<u2")
        length = np.array([len(record) // 2 for record in records], np.int32)
        return {"tokens": tokens.reshape(len(records), self._seq_len + 1), "length": length}

    def largest_token(self) -> int:
        """Over the whole file, in blocks of 32 MB."""
        largest = 0
        with open(self._path, "rb") as file:
            while len(block := np.fromfile(file, "<u2", 2**24)):
                largest = max(largest, int(block.max()))
        return largest
