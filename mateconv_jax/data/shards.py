"""Rows in shards, the files of a dataset folder.

A shard is an ArrayRecord file of tf.train.Example records, which TFDS reads as well. Every record of a shard has the same
bytes but for its numbers, so that both directions are a few numpy operations a shard or batch: TFDS' own serializer and parser
make 7,000 rows a second, these 290,000 and 60,000.
"""

import collections
import dataclasses
import errno
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from mateconv_jax import cores
from mateconv_jax.data.rows import Batch, starts_after_end
from mateconv_jax.errors import UserError

VERSION = 2  # of the records that are written
PAIRS_VERSION = 3  # of records that hold pairs: versions of this project that know none must not take them for texts
BITS = {"document_starts", "learned"}  # stored as one bit a token, the lowest bit of a byte first


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrower of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """How the rows of a dataset are stored.

    Attributes:
      seq_len, vocab_size: what the rows were made with.
      learned: whether rows record which of their tokens are learned; otherwise all are.
      version: 1: tokens and length. 2: document_starts too, and perhaps learned. 3: pairs: tokens, length and learned.
      pairs: whether a row is a pair: its fields have another dimension of 2 in front, the chosen and the rejected dialogue.
    """

    seq_len: int
    vocab_size: int
    learned: bool = False
    version: int = VERSION
    pairs: bool = False

    @staticmethod
    def of_pairs(seq_len: int, vocab_size: int) -> "RowFormat":
        return RowFormat(seq_len, vocab_size, learned=True, version=PAIRS_VERSION, pairs=True)


def features(format: RowFormat):
    """A row for TFDS, a FeaturesDict of what the records hold; `document_starts` and `learned` as bits, lowest first."""
    import tensorflow_datasets as tfds  # 2 s: not for the workers, which only write

    # As bytes: a list of varints would be 7 times slower to parse, and its length depend on the numbers.
    as_bytes = tfds.features.Encoding.BYTES
    return tfds.features.FeaturesDict(
        {
            name: tfds.features.Tensor(shape=shape, dtype=dtype, encoding=as_bytes)
            for name, (dtype, shape) in _fields(format).items()
        }
    )


# ---- a record -------------------------------------------------------------------------------------------------------


def _fields(format: RowFormat) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """dtype and shape of what a record holds, in the order of their names, as protobuf maps are written."""
    n_tokens = format.seq_len + 1
    sequences = (2,) * format.pairs
    bits = np.dtype(np.uint8), (*sequences, -(-n_tokens // 8))
    fields = {
        "length": (np.dtype(np.int32), sequences),
        "tokens": (token_dtype(format.vocab_size), (*sequences, n_tokens)),
    }
    if format.version >= 2 and not format.pairs:
        fields["document_starts"] = bits
    if format.learned:
        fields["learned"] = bits
    return dict(sorted(fields.items()))


class _Layout:
    """The bytes of a record: fields in fixed places, and between them the same bytes in every record of a shard."""

    def __init__(self, fields: dict[str, tuple[np.dtype, tuple[int, ...]]]):
        sizes = {name: dtype.itemsize * int(np.prod(shape)) for name, (dtype, shape) in fields.items()}
        headers = {name: _feature_header(name.encode(), size) for name, size in sizes.items()}
        outer = _header(1, sum(map(len, headers.values())) + sum(sizes.values()))  # Example.features
        self._headers, parts = {}, []
        for name, (dtype, shape) in fields.items():
            header = outer + headers[name]
            self._headers[f"before {name}"] = np.frombuffer(header, np.uint8)
            parts += [(f"before {name}", np.uint8, (len(header),)), (name, dtype, shape)]
            outer = b""
        self._fields = list(fields)
        self._record = np.dtype(parts)

    def write(self, rows: Batch) -> np.ndarray:
        """Records (R,) of a structured dtype."""
        records = np.empty(len(rows["length"]), self._record)
        for name, header in self._headers.items():
            records[name] = header
        for name in self._fields:
            records[name] = np.packbits(rows[name], axis=-1, bitorder="little") if name in BITS else rows[name]
        return records

    def read(self, records: list[bytes], wanted: tuple[str, ...]) -> Batch | None:
        """None where these are not such records."""
        joined = b"".join(records)
        if len(joined) != len(records) * self._record.itemsize:
            return None
        table = np.frombuffer(joined, self._record)
        if any((table[name] != header).any() for name, header in self._headers.items()):
            return None
        rows = {name: np.ascontiguousarray(table[name]) for name in wanted}
        n_tokens = self._record["tokens"].shape[-1]
        for name in BITS & rows.keys():
            rows[name] = np.unpackbits(rows[name], axis=-1, count=n_tokens, bitorder="little").view(bool)
        return rows


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


def write_shard(path: Path, rows: Batch, format: RowFormat) -> None:
    """Write rows, of all the fields of `format`, as a file. Equal rows give equal bytes.

    Raises:
      OSError: the disk is full, or the path cannot be written. What is at `path` then is no shard.
    """
    layout = _Layout(_fields(format))
    try:
        # One row a group: training reads rows in random order. Not compressed: 3 times faster to write, 8 % larger.
        writer = ArrayRecordWriter(os.fspath(path), "group_size:1,uncompressed")
        for start in range(0, len(rows["length"]), 4096):
            for record in layout.write({name: values[start : start + 4096] for name, values in rows.items()}):
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
      format: what stands in them.
      document_starts: the ids of `<s>` and `</s>`: batches have `document_starts`, taken from the records or, where these are
        of version 1, from the two tokens (see rows.starts_after_end). None: batches come without.

    Raises:
      UserError: a shard is missing, broken or of another format.
    """

    def __init__(self, paths: Sequence[str | Path], format: RowFormat, document_starts: tuple[int | None, int] | None = None):
        self._shards = _OpenShards([os.fspath(path) for path in paths])
        self._ends = np.cumsum(self._shards.lengths, dtype=np.int64)
        self._starts = np.concatenate([[0], self._ends])
        self._layout = _Layout(_fields(format))
        self._wanted = ("tokens", "length") + ("learned",) * format.learned
        self._bos_eos: tuple[int | None, int] | None = None
        if document_starts is not None and format.version == 1:
            self._bos_eos = document_starts
        elif document_starts is not None:
            self._wanted += ("document_starts",)
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
        records = [
            self._shards.read(shard, position) for shard, position in zip(shard_B.tolist(), position_B.tolist(), strict=True)
        ]
        batch = self._layout.read(records, self._wanted)
        if batch is None:
            raise UserError(f"{self._first_path!r} and its like were written by another version (prepare the dataset again)")
        if self._bos_eos is not None:
            batch["document_starts"] = starts_after_end(batch["tokens"], *self._bos_eos)
        return batch


class _OpenShards:
    """Readers of shards: all of them stay open where the system allows that many files, otherwise those opened last."""

    def __init__(self, paths: list[str]):
        self._paths = paths
        self._limit = _files_to_open(len(paths))
        self._readers: dict[int, ArrayRecordReader] = {}
        self._opened: collections.deque[int] = collections.deque()  # in order
        self._locks = [threading.Lock() for _ in paths]
        self._closing = threading.Lock()
        self.lengths = [self._reader(shard).num_records() for shard in range(len(paths))]

    def read(self, shard: int, position: int) -> bytes:
        # Not reader.read([position, …]), which needs no lock, but takes 25 us a row, and ArrayRecordDataSource starts a thread
        # for each shard of every batch besides.
        with self._locks[shard]:
            reader = self._reader(shard)
            reader.seek(position)
            return reader.read()

    def _reader(self, shard: int) -> ArrayRecordReader:
        """Called with the shard's lock held, or by the only thread."""
        if shard in self._readers:
            return self._readers[shard]
        self._close_some()
        options = "readahead_buffer_size:0,max_parallelism:0"  # otherwise seek and read take 600 us instead of 6
        reader = ArrayRecordReader(self._paths[shard], options, file_reader_buffer_size=4096)
        if not reader.ok():
            raise UserError(f"{self._paths[shard]!r} is missing or broken (prepare the dataset again)")
        self._readers[shard] = reader
        self._opened.append(shard)
        return reader

    def _close_some(self) -> None:
        """Make room for one more. Shards that other threads are reading stay open: there are never many."""
        with self._closing:
            for _ in range(len(self._opened)):
                if len(self._readers) < self._limit:
                    return
                shard = self._opened.popleft()
                if self._locks[shard].acquire(blocking=False):
                    self._readers.pop(shard).close()
                    self._locks[shard].release()
                else:
                    self._opened.append(shard)


def _files_to_open(n: int) -> int:
    """n, or fewer: half of what the system allows beyond 256, as a training opens two splits."""
    return int(max(1, min(n, (cores.allow_open_files(2 * n + 256) - 256) // 2)))
