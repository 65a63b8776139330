"""Inputs as chunks of raw records: JSONL, CSV and text, plain or compressed, standard input, TFDS datasets, flat `.bin` files.

What a chunk holds depends on the input's bytes alone, so that it means the same to any number of workers and to a later run.
"""

import bz2
import dataclasses
import glob
import lzma
import os
import re
import stat
import sys
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson
import zstandard

from mateconv_jax.data.text import csv_rows
from mateconv_jax.errors import UserError, check_values

READ_BYTES = 1 << 18
DECOMPRESSED_BYTES = 1 << 20  # handed on at once, whatever a file promises: 98 kB of .zst can hold 1 GB
DECOMPRESSOR_BYTES = 1 << 31  # memory of a decompressor: `zstd --long=31` needs all of it, `xz -9` 64 MB
# One byte of zstd can stand for 32 kB, and zstandard returns whatever its input holds: 1 kB at a time is at most 32 MB.
ZSTD_BYTES = 1 << 10
DECOMPRESSORS = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lambda: lzma.LZMADecompressor(memlimit=DECOMPRESSOR_BYTES),
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=DECOMPRESSOR_BYTES).decompressobj(),
}
BROKEN = (zlib.error, lzma.LZMAError, zstandard.ZstdError, EOFError)  # what data raises that cannot be decompressed
DELIMITERS = {"csv": ",", "tsv": "\t"}
TXT_DOCUMENTS = ("line", "blank_line", "file")  # what ends a document of a .txt file
_ARCHIVE = re.compile(r"\.(tar|tgz|tbz2?|txz|zip|7z|rar|parquet)(\.(gz|bz2|xz|zst))?$", re.IGNORECASE)
_TFDS = re.compile(r"tfds:([^:]+):([^:\[]+(?:\[[^\]]*\])?):([^:]+)")  # the split may be a part of one, train[:10%]


@dataclasses.dataclass(frozen=True)
class Source:
    """One input.

    Attributes:
      format: jsonl, txt, csv, tsv and tfds (each row or example becomes a line of JSON) or bin (token ids, uint16).
      size: bytes on disk; None: not known.
      modified: when it was last written, nanoseconds since 1970; None: not known.
    """

    path: str
    format: str
    size: int | None = None
    modified: int | None = None


@dataclasses.dataclass(frozen=True)
class ChunkSizes:
    """A chunk ends with the record that brings it to `bytes`, or to `records`; a record above `longest_record` is rejected."""

    bytes: int = 16_000_000  # of input: about 5 M tokens, a shard of 10 MB
    records: int | None = None
    longest_record: int = 16_000_000

    def __post_init__(self):
        check_values(
            self,
            [
                ("bytes", self.bytes >= 1, "at least 1"),
                ("records", self.records is None or self.records >= 1, "at least 1"),
                ("longest_record", self.longest_record >= 1, "at least 1"),
            ],
        )


@dataclasses.dataclass
class Part:
    """Consecutive records of one source.

    Attributes:
      records: (line, from 1; text in UTF-8, JSON, or token ids).
      rejects: (line, rule, reason) of what the reader itself refused.
      position: bytes of the source's file read so far.
    """

    source: Source
    records: list[tuple[int, bytes]] = dataclasses.field(default_factory=list)
    rejects: list[tuple[int, str, str]] = dataclasses.field(default_factory=list)
    position: int = 0


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The unit of work, which becomes at most one shard of each split: a part of one large source, or several small sources.

    Attributes:
      name: GROUP-NUMBER, two numbers that sort: the order of all chunks.
    """

    name: str
    parts: list[Part]


def open_local(path: str) -> BinaryIO:
    return open(path, "rb")


def local_files(pattern: str) -> list[tuple[str, int, int | None]]:
    """(path, bytes, when it was last written in nanoseconds) of the files that a path or glob names, sorted.

    Raises:
      UserError: nothing is there, or a folder is.
    """
    found: list[tuple[str, int, int | None]] = []
    for path in sorted(glob.glob(pattern, recursive=True)) or [pattern]:
        try:
            status = os.stat(path)
        except OSError as error:
            raise UserError(f"--input: no file at {path!r} (expected .jsonl, .csv, .txt or .bin files, or a glob)") from error
        if stat.S_ISDIR(status.st_mode):
            raise UserError(f"--input: {path!r} is a folder (expected files, or a glob such as {Path(path) / '*.jsonl'})")
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"--input: {path!r} is not a regular file (expected one, or - with the data piped in)")
        found.append((path, status.st_size, status.st_mtime_ns))
    return found


def find(patterns: list[str], files: Callable[[str], list[tuple[str, int, int | None]]] = local_files) -> list[Source]:
    """The inputs that paths, globs, `-` and `tfds:NAME/CONFIG:SPLIT:FEATURE` name, in the order given.

    Args:
      files: (path, bytes, time) of what a path or glob names; Beam brings its own.

    Raises:
      UserError: nothing is there.
    """
    sources = []
    for pattern in patterns:
        if pattern == "-":
            sources.append(Source("-", "jsonl"))
        elif pattern.startswith("tfds:"):
            if not _TFDS.fullmatch(pattern):
                raise UserError(f"--input: {pattern!r} is incomplete (expected tfds:NAME/CONFIG:SPLIT:FEATURE)")
            sources.append(Source(pattern, "tfds"))
        else:
            for path, size, modified in files(pattern):
                if archive := _ARCHIVE.search(path):
                    raise UserError(f"--input: {path!r} is a {archive[0]} file (expected JSONL or text; unpack it first)")
                suffixes = [suffix for suffix in Path(path.lower()).suffixes if suffix not in DECOMPRESSORS]
                kind = (suffixes or [""])[-1].removeprefix(".")
                sources.append(Source(path, kind if kind in ("txt", "bin", *DELIMITERS) else "jsonl", size, modified))
    return sources


def groups(sources: list[Source], sizes: ChunkSizes) -> list[list[Source]]:
    """Sources in order, small ones together: a chunk becomes a shard, and a shard is a file of at least 130 kB.

    Consecutive inputs of at most 1/16 chunk each are joined, up to the size of a chunk; token ids are never joined with text.
    """
    found: list[list[Source]] = []
    joined = 0  # bytes of the last group; a large input is never added to
    for source in sources:
        size = sizes.bytes if source.size is None else source.size
        small = size <= sizes.bytes // 16
        if small and found and joined + size <= sizes.bytes and _same_kind(source, found[-1][0]):
            found[-1].append(source)
            joined += size
        else:
            found.append([source])
            joined = size if small else sizes.bytes
    return found


def _same_kind(a: Source, b: Source) -> bool:
    return (a.format == "bin") == (b.format == "bin")


def chunks(
    group: list[Source],
    number: int,
    sizes: ChunkSizes,
    txt_document: str = "line",
    bos_eos: tuple[int | None, int] | None = None,
    open_file: Callable[[str], BinaryIO] = open_local,
) -> Iterator[Chunk]:
    """The chunks of one of `groups`, in order.

    Args:
      number: of the group among all.
      txt_document: what a document of a .txt file is, one of TXT_DOCUMENTS.
      bos_eos: the ids of `<s>` and `</s>`, between which a document of a .bin file stands.
      open_file: opens a path for reading bytes; Beam brings its own.

    Raises:
      UserError: a TFDS dataset that is not there; a .bin file that holds no 16-bit numbers.
    """
    index, parts, size, n_records = 0, [], 0, 0
    for source in group:
        progress = [0]
        part = Part(source)
        for line, record in _records(source, sizes, txt_document, bos_eos, open_file, progress):
            if isinstance(record, bytes):
                part.records.append((line, record))
                size += len(record)
                n_records += 1
            else:
                part.rejects.append((line, *record))
            part.position = progress[0]
            if size >= sizes.bytes or n_records == sizes.records:
                yield Chunk(f"{number:07d}-{index:06d}", [*parts, part])
                part = Part(source)
                index, parts, size, n_records = index + 1, [], 0, 0
        if part.records or part.rejects:
            parts.append(part)
    if parts:
        yield Chunk(f"{number:07d}-{index:06d}", parts)


def _records(source: Source, sizes: ChunkSizes, txt_document: str, bos_eos, open_file, progress: list[int]):
    """(line, record) or (line, (rule, reason)) of a source; progress[0] is kept at the bytes read so far."""
    if source.format == "bin":
        return _bin_records(source.path, bos_eos, sizes.bytes, progress)
    blocks = _tfds_lines(source.path) if source.format == "tfds" else _blocks(source.path, open_file, progress)
    if source.format in DELIMITERS:
        return _csv_records(blocks, DELIMITERS[source.format], sizes.longest_record)
    return _text_records(blocks, txt_document if source.format == "txt" else "line", sizes.longest_record)


# ---- text ---------------------------------------------------------------------------------------------------------


def _text_records(blocks: Iterator[bytes], document: str, longest: int) -> Iterator[tuple[int, bytes | tuple[str, str]]]:
    """(line, record) or (line, (rule, reason)). A blank line is nothing, or the end of a document, or inside one."""
    start, lines, size, number = 0, [], 0, 0

    def record():
        if size > longest:
            return start, ("line_too_long", f"a record of {size:,} bytes (at most {longest:,})")
        return start, b"\n".join(lines)

    try:
        for number, (line, line_size) in enumerate(_lines(blocks, longest), 1):
            blank = line_size <= longest and not line.strip()
            if start and blank and document == "blank_line":
                yield record()
                start, lines, size = 0, [], 0
            elif start or not blank:
                start = start or number
                lines.append(line)
                size += line_size
                if size > longest:
                    lines.clear()  # will be rejected: only its size is counted on
                if document == "line":
                    yield record()
                    start, lines, size = 0, [], 0
        if start:
            yield record()
    except BROKEN as error:
        yield number + 1, ("broken_file", f"cannot be decompressed further ({error})")


def _csv_records(blocks: Iterator[bytes], delimiter: str, longest: int) -> Iterator[tuple[int, bytes | tuple[str, str]]]:
    """As `_text_records`."""
    number = 0
    try:
        for number, row in csv_rows.rows(_lines(blocks, longest), delimiter, longest):
            yield number, row
    except BROKEN as error:
        yield number + 1, ("broken_file", f"cannot be decompressed further ({error})")


def _lines(blocks: Iterator[bytes], longest: int) -> Iterator[tuple[bytes, int]]:
    """(line, its bytes). A line above `longest` comes empty with its true size: it is never held."""
    parts, size = [], 0
    for block in blocks:
        for i, part in enumerate(block.split(b"\n")):
            if i:  # a line ended before this part
                yield b"".join(parts), size
                parts, size = [], 0
            size += len(part)
            parts.append(part)
            if size > longest:
                parts.clear()
    if size:
        yield b"".join(parts), size


def _blocks(path: str, open_file, progress: list[int]) -> Iterator[bytes]:
    """The file's bytes, decompressed as its suffix says, in bounded blocks."""
    with sys.stdin.buffer if path == "-" else open_file(path) as file:
        suffix = Path(path).suffix.lower()
        member = None  # compressed files may be several, one behind the other
        while block := file.read(READ_BYTES):
            progress[0] += len(block)
            if suffix not in DECOMPRESSORS:
                yield block
                continue
            while block:
                member = member or DECOMPRESSORS[suffix]()
                block = yield from _decompress(member, block, suffix)
                if member.eof:
                    member, block = None, block.lstrip(b"\0")
        if member is not None:
            raise EOFError("the file ends too early")


def _decompress(member, block: bytes, suffix: str) -> Generator[bytes, None, bytes]:
    """What a block holds, in bounded pieces; returns what stands behind the end of the compressed member."""
    if suffix == ".zst":
        for start in range(0, len(block), ZSTD_BYTES):
            yield member.decompress(block[start : start + ZSTD_BYTES])
            if member.eof:
                return member.unused_data + block[start + ZSTD_BYTES :]
        return b""
    while True:
        try:
            piece = member.decompress(block, DECOMPRESSED_BYTES)
        except OSError as error:  # what bz2 raises for broken data
            raise EOFError(error) from error
        yield piece
        # zlib gives back the input that it has not used; the others keep it and say so.
        block = member.unconsumed_tail if suffix == ".gz" else b""
        all_used = len(piece) < DECOMPRESSED_BYTES and not block if suffix == ".gz" else member.needs_input
        if member.eof or all_used:
            return member.unused_data if member.eof else b""


def _tfds_lines(name: str) -> Iterator[bytes]:
    """Each example's text as a line of JSON. Invalid UTF-8 is passed on as it is: the line is rejected later."""
    import tensorflow_datasets as tfds  # 2 s

    parts = _TFDS.fullmatch(name)
    assert parts is not None, f"{name!r} is not of `find`"
    builder_name, split, feature = parts.groups()
    try:
        builder: Any = tfds.builder(builder_name)
        if not builder.is_prepared():
            builder = tfds.builder(builder_name, file_format="array_record")  # TFDS' default needs TensorFlow
            builder.download_and_prepare()
        info = builder.info
    except ImportError as error:  # what the code that makes this dataset uses; of TFDS itself nothing
        package = error.name or "tensorflow"
        raise UserError(f"--input: TFDS cannot make {builder_name!r} without {package} (pip install {package})") from error
    except Exception as error:  # TFDS raises whatever its datasets raise
        raise UserError(
            f"--input: TFDS has no dataset {builder_name!r} ({' '.join(str(error).split())[:300]}); prepared ones "
            "are looked for in $TFDS_DATA_DIR or ~/tensorflow_datasets"
        ) from error
    if split.split("[")[0] not in info.splits:
        raise UserError(f"--input: {builder_name} has no split {split!r} (there are: {', '.join(info.splits)})")
    if feature not in info.features:
        raise UserError(f"--input: {builder_name} has no feature {feature!r} (there are: {', '.join(info.features)})")
    if info.file_format == tfds.core.FileFormat.TFRECORD:  # which TFDS itself reads with TensorFlow alone
        examples = map(info.features.deserialize_example_np, _tfrecords(info.splits[split].file_instructions))
    else:
        examples = builder.as_data_source(split)
    for example in examples:
        text = example[feature]
        text = text.encode() if isinstance(text, str) else bytes(text)
        try:
            yield orjson.dumps({"text": text.decode()}) + b"\n"
        except UnicodeDecodeError:
            yield b'{"text": "' + text.replace(b"\n", b" ") + b'"}\n'


def _tfrecords(file_instructions: Iterable) -> Iterator[bytes]:
    """The records of TFRecord files: each a length in 8 bytes, 4 bytes of checksum, the data, 4 bytes of checksum.

    Checksums are not compared: in Python that makes 5 MB/s, as slow as tokenising.

    Args:
      file_instructions: of TFDS; `filename`, and from `skip` on the next `take` records of that file.

    Raises:
      UserError: a file is shorter than its records say, or no such file.
    """
    for instruction in file_instructions:
        end = os.stat(instruction.filename).st_size
        with open(instruction.filename, "rb") as file:
            for number in range(instruction.skip + instruction.take):
                size = int.from_bytes(file.read(12)[:8], "little")
                if file.tell() + size + 4 > end:
                    raise UserError(f"--input: {instruction.filename!r} is broken or cut short at record {number + 1}")
                record = file.read(size)
                file.seek(4, os.SEEK_CUR)
                if number >= instruction.skip:
                    yield record


# ---- token ids ----------------------------------------------------------------------------------------------------


def _bin_records(
    path: str, bos_eos: tuple[int | None, int] | None, longest: int, progress: list[int]
) -> Iterator[tuple[int, bytes]]:
    """Documents of a flat uint16 stream; (number of its first token from 1, its ids as bytes).

    A document ends with a `</s>` that a `<s>` follows directly, so that the turns of a dialogue, which have a line feed between
    them, stay together; in a stream without `<s>`, with every `</s>`. Where none ends within `longest` bytes, it is cut.
    """
    bos, eos = bos_eos or (None, None)
    if Path(path).stat().st_size % 2:
        raise UserError(f"--input: {path!r} has an odd number of bytes (expected a flat stream of 16-bit token ids)")
    tokens = np.memmap(path, np.uint16, "r") if Path(path).stat().st_size else np.zeros(0, np.uint16)
    start, window = 0, longest // 2
    for offset in range(0, len(tokens), window):
        part = tokens[offset : offset + window + 1]
        is_end = part[:-1] == eos
        if (part == bos).any():
            is_end &= part[1:] == bos
        ends = offset + np.flatnonzero(is_end) + 1
        for end in [*ends.tolist(), *([offset + window] if not len(ends) else [])]:
            yield start + 1, tokens[start:end].tobytes()
            start = min(end, len(tokens))
            progress[0] = 2 * start
    if start < len(tokens):
        yield start + 1, tokens[start:].tobytes()
        progress[0] = 2 * len(tokens)
