"""Rows of tokens as they are stored and read: shards of a dataset folder, or MateConv's flat `.bin` file.

A shard is an ArrayRecord file of tf.train.Example records, which TFDS reads as well. Every record of a shard has the same
bytes but for its numbers, so that both directions are a few numpy operations a shard or batch: TFDS' own serializer and parser
make 7,000 rows a second, these 290,000 and 60,000.
"""

import errno
import os
import resource
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from mateconv_jax.errors import UserError

Batch = dict[str, np.ndarray]  # tokens (B, seq_len + 1) uint16 or uint32, length (B,) int32


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrower of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def features(seq_len: int, vocab_size: int):
    """A row for TFDS, a FeaturesDict: seq_len + 1 `tokens`, of which `length` are real."""
    import tensorflow_datasets as tfds  # 2 s: not for the workers, which only write

    # As bytes: a list of varints would be 7 times slower to parse, and its length depend on the numbers.
    as_bytes = tfds.features.Encoding.BYTES
    return tfds.features.FeaturesDict(
        {
            "length": tfds.features.Tensor(shape=(), dtype=np.int32, encoding=as_bytes),
            "tokens": tfds.features.Tensor(shape=(seq_len + 1,), dtype=token_dtype(vocab_size), encoding=as_bytes),
        }
    )


# ---- a record -------------------------------------------------------------------------------------------------------


class _Layout:
    """Where the numbers of a record stand: the same bytes around them in every record of a shard."""

    def __init__(self, seq_len: int, dtype: np.dtype):
        self.dtype = dtype
        n_bytes = (seq_len + 1) * dtype.itemsize
        before, between = _feature_header(b"length", 4), _feature_header(b"tokens", n_bytes)
        before = _header(1, len(before) + 4 + len(between) + n_bytes) + before  # Example.features
        self.record = np.frombuffer(before + bytes(4) + between + bytes(n_bytes), np.uint8)
        self.before = slice(0, len(before))
        self.length = slice(len(before), len(before) + 4)
        self.between = slice(self.length.stop, self.length.stop + len(between))
        self.tokens = slice(self.between.stop, len(self.record))

    def write(self, rows_RS: np.ndarray, length_R: np.ndarray) -> np.ndarray:
        """Records (R, bytes of one) uint8."""
        records = np.repeat(self.record[None], len(rows_RS), axis=0)
        records[:, self.length] = length_R.astype("<i4")[:, None].view(np.uint8)
        records[:, self.tokens] = np.ascontiguousarray(rows_RS, self.dtype).view(np.uint8)
        return records

    def read(self, records: list[bytes]) -> Batch | None:
        """None where these are not such records."""
        joined = b"".join(records)
        if len(joined) != len(records) * len(self.record):
            return None
        bytes_RB = np.frombuffer(joined, np.uint8).reshape(len(records), len(self.record))
        if any((bytes_RB[:, place] != self.record[place]).any() for place in (self.before, self.between)):
            return None
        tokens = np.ascontiguousarray(bytes_RB[:, self.tokens]).view(self.dtype)
        return {"tokens": tokens, "length": np.ascontiguousarray(bytes_RB[:, self.length]).view("<i4")[:, 0]}


def _header(number: int, size: int) -> bytes:
    """Of a protobuf field that holds `size` bytes."""
    header = bytes([number << 3 | 2])
    while size > 127:
        header, size = header + bytes([size & 127 | 128]), size >> 7
    return header + bytes([size])


def _feature_header(name: bytes, n_bytes: int) -> bytes:
    """What stands before the bytes of a feature: Features.feature {key, value: Feature.bytes_list.value}."""
    value = _header(1, n_bytes)
    for number in (1, 2):  # bytes_list, then value in the map
        value = _header(number, len(value) + n_bytes) + value
    key = _header(1, len(name)) + name
    return _header(1, len(key) + len(value) + n_bytes) + key + value


# ---- shards -------------------------------------------------------------------------------------------------------


def write_shard(path: Path, rows_RS: np.ndarray, length_R: np.ndarray) -> None:
    """Write rows (R, seq_len + 1) uint16 or uint32 with their lengths (R,) int32 as a file. Equal rows give equal bytes.

    Raises:
      OSError: the disk is full, or the path cannot be written. What is at `path` then is no shard.
    """
    layout = _Layout(rows_RS.shape[1] - 1, rows_RS.dtype)
    try:
        # One row a group: training reads rows in random order. Not compressed: 3 times faster to write, 8 % larger.
        writer = ArrayRecordWriter(os.fspath(path), "group_size:1,uncompressed")
        for start in range(0, len(rows_RS), 4096):
            for record in layout.write(rows_RS[start : start + 4096], length_R[start : start + 4096]):
                writer.write(record.tobytes())
        writer.close()  # a full disk is reported here at the latest
    except RuntimeError as error:
        # The library gives the operating system's error as text: "write() failed: No space left on device; writing …".
        code = next((code for code in errno.errorcode if f": {os.strerror(code)};" in str(error)), errno.EIO)
        raise OSError(code, os.strerror(code), os.fspath(path)) from error


class ShardRows:
    """The rows of shards, one behind the other, read at random; any number of threads may read.

    Args:
      paths: of the shards; none gives no rows.
      seq_len, vocab_size: what the rows were made with.

    Raises:
      UserError: a shard is missing, broken or of another version, or there are more than files may be open.
    """

    def __init__(self, paths: Sequence[str | Path], seq_len: int, vocab_size: int):
        _allow_open_files(len(paths) + 256)  # every shard stays open
        options = "readahead_buffer_size:0,max_parallelism:0"  # otherwise seek and read take 600 us instead of 6
        self._readers = [ArrayRecordReader(os.fspath(path), options, file_reader_buffer_size=4096) for path in paths]
        self._locks = [threading.Lock() for _ in paths]
        for path, reader in zip(paths, self._readers, strict=True):
            if not reader.ok():
                raise UserError(f"{os.fspath(path)!r} is missing or broken (prepare the dataset again)")
        self._ends = np.cumsum([reader.num_records() for reader in self._readers], dtype=np.int64)
        self._starts = np.concatenate([[0], self._ends])
        self._layout = _Layout(seq_len, token_dtype(vocab_size))
        self._first_path = os.fspath(paths[0]) if paths else ""
        self.read(np.arange(min(len(self), 1)))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, indices: np.ndarray) -> Batch:
        """Rows by number (B,), in any order.

        Raises:
          UserError: the shards were written by another version.
        """
        shard_B = np.searchsorted(self._ends, indices, side="right")
        position_B = indices - self._starts[shard_B]
        records = []
        for shard, position in zip(shard_B.tolist(), position_B.tolist(), strict=True):
            # Not reader.read([position, …]), which needs no lock, but takes 25 us a row, and ArrayRecordDataSource starts
            # a thread for each shard of every batch besides.
            with self._locks[shard]:
                self._readers[shard].seek(position)
                records.append(self._readers[shard].read())
        batch = self._layout.read(records)
        if batch is None:
            raise UserError(f"{self._first_path!r} and its like were written by another version (prepare the dataset again)")
        return batch


def _allow_open_files(n: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < n:
        raise UserError(f"{n} files are open at once, the system allows {hard} (raise `ulimit -Hn`, or prepare larger shards)")
    if soft != resource.RLIM_INFINITY and soft < n:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
