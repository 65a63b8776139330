"""Inputs as chunks of raw records: which files there are, what is in each, and how its records are cut into chunks.

What a chunk holds depends on the input's bytes alone, so that it means the same to any number of workers and to a later run.
"""

import dataclasses
import glob
import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import BinaryIO

from mateconv_jax.data.text import archives, bin_documents, csv_rows, encodings, json_array, lines, parquet, tfds_examples
from mateconv_jax.data.text.compression import BROKEN, DECOMPRESSORS, decompressed
from mateconv_jax.data.text.lines import Record
from mateconv_jax.errors import UserError, check_values

READ_BYTES = 1 << 18
DELIMITERS = {"csv": ",", "tsv": "\t"}
TEXT_FORMATS = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".txt": "txt", ".csv": "csv", ".tsv": "tsv"}
ARCHIVES = {".tar": "tar", ".zip": "zip"}
FORMATS = TEXT_FORMATS | ARCHIVES | {".bin": "bin", ".parquet": "parquet"}
COMPRESSIBLE = {*TEXT_FORMATS.values(), "tar"}  # the others are read from the middle, and compressed inside
SHORT_SUFFIXES = {".tgz": (".tar", ".gz"), ".tbz": (".tar", ".bz2"), ".tbz2": (".tar", ".bz2"), ".txz": (".tar", ".xz"), ".tzst": (".tar", ".zst")}  # fmt: skip  # noqa: E501


@dataclasses.dataclass(frozen=True)
class Source:
    """One input, or a member of one.

    Attributes:
      format: of FORMATS, or tfds. What is neither text nor bin (token ids, uint16) becomes lines of JSON.
      size: bytes on disk; None: not known.
      modified: when it was last written, nanoseconds since 1970; None: not known.
      compression: a key of DECOMPRESSORS, or none.
      member: the name of a file in the archive at `path`.
    """

    path: str
    format: str
    size: int | None = None
    modified: int | None = None
    compression: str = ""
    member: str = ""

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.path}:{self.member}" if self.member else self.path


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
      records: (line, from 1; text in UTF-8, JSON, or token ids); the line of an array's element or a table's
        row is its number.
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
    """(path, bytes, when it was last written in nanoseconds) of the files that a path, folder or glob names, sorted.

    Raises:
      UserError: nothing is there.
    """
    found: list[tuple[str, int, int | None]] = []
    matches = sorted(glob.glob(pattern, recursive=True))
    for path in matches or [pattern]:
        try:
            status = os.stat(path)
        except OSError as error:
            raise UserError(f"--input: no file at {path!r} (expected files, a folder, or a glob)") from error
        if stat.S_ISREG(status.st_mode):
            found.append((path, status.st_size, status.st_mtime_ns))
        elif not stat.S_ISDIR(status.st_mode):
            raise UserError(f"--input: {path!r} is not a regular file (expected one, or - with the data piped in)")
        elif matches == [pattern]:  # a glob takes the folders that it finds for what is in them, if it is told **
            found += _files_in(path)
    if not found:
        raise UserError(f"--input: {pattern!r} matches folders only (expected files, as {str(Path(pattern) / '*.jsonl')!r})")
    return found


def _files_in(folder: str) -> list[tuple[str, int, int | None]]:
    """The files of known formats in a folder and below, sorted. Hidden ones are none."""
    if (Path(folder) / "dataset_info.json").is_file():
        raise UserError(f"--input: {folder!r} is a dataset folder (expected raw text)")
    paths: list[str] = []
    others: list[str] = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                (paths if is_data_file(name) else others).append(os.path.join(place, name))
    if not paths:
        raise UserError(f"--input: no file in {folder!r} has a known suffix ({', '.join(FORMATS)})")
    if others:
        print(f"--input: {len(others):,} other files in {folder!r} are not read, as {min(others)!r}", file=sys.stderr)
    return [(path, status.st_size, status.st_mtime_ns) for path in sorted(paths) if (status := os.stat(path))]


def is_data_file(path: str) -> bool:
    """Whether a file of a folder, or a member of an archive, is one of the data. `path`: below the folder."""
    hidden = any(part.startswith((".", "__MACOSX")) for part in PurePath(path).parts)
    return bool(PurePath(path).suffix and format_of(path) and not hidden)


def format_of(path: str) -> tuple[str, str] | None:
    """What a file is by its name, and its compression, or "": ("jsonl", ".gz"). None: nothing that is read here.

    A name without a suffix is that of JSONL, as Spark's part-00000.
    """
    suffixes = [suffix.lower() for suffix in PurePath(path).suffixes]
    if suffixes:
        suffixes[-1:] = SHORT_SUFFIXES.get(suffixes[-1], suffixes[-1:])
    compression = suffixes.pop() if suffixes and suffixes[-1] in DECOMPRESSORS else ""
    format = FORMATS.get(suffixes[-1]) if suffixes else "jsonl"
    return None if format is None or compression and format not in COMPRESSIBLE else (format, compression)


def find(patterns: list[str], files: Callable[[str], list[tuple[str, int, int | None]]] = local_files) -> list[Source]:
    """The inputs that paths, folders, globs, `-` and `tfds:NAME/CONFIG:SPLIT:FEATURE` name, in the order given.

    Args:
      files: (path, bytes, time) of what a path, folder or glob names; Beam brings its own.

    Raises:
      UserError: nothing is there, or it is no kind of file that is read.
    """
    sources = []
    for pattern in patterns:
        if pattern == "-":
            sources.append(Source("-", "jsonl"))
        elif pattern.startswith("tfds:"):
            if not tfds_examples.NAME.fullmatch(pattern):
                raise UserError(f"--input: {pattern!r} is incomplete (expected tfds:NAME/CONFIG:SPLIT:FEATURE)")
            sources.append(Source(pattern, "tfds"))
        else:
            for path, size, modified in files(pattern):
                if not (known := format_of(path)):
                    raise UserError(
                        f"--input: {path!r} is no {''.join(PurePath(path).suffixes[-2:])!r} file that can be read (expected "
                        f"{', '.join(FORMATS)}; text and tar also as {', '.join(DECOMPRESSORS)})"
                    )
                format, compression = known
                sources.append(Source(path, format, size, modified, compression))
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


@dataclasses.dataclass(frozen=True)
class Reader:
    """How sources are read.

    Attributes:
      txt_document: what a document of a .txt file is, one of lines.TXT_DOCUMENTS.
      bos_eos: the ids of `<s>` and `</s>`, between which a document of a .bin file stands.
      open_file: opens a path for reading bytes; Beam brings its own.
      encoding: of text without a byte order mark, as `encodings.normal_name` has it.
      text_key: a column of parquet files that is read, besides the dialogue schemas'.
    """

    txt_document: str = "line"
    bos_eos: tuple[int | None, int] | None = None
    open_file: Callable[[str], BinaryIO] = open_local
    encoding: str = encodings.UTF8
    text_key: str = "text"

    def streams(
        self, source: Source, sizes: ChunkSizes, progress: list[int]
    ) -> Iterator[tuple[Source, Iterator[tuple[int, Record]]]]:
        """The source, or each member of an archive, with its records. One is to be read before the next is taken.

        progress[0] is kept at the bytes of the source's file that were read.
        """
        if source.format not in ARCHIVES.values():
            yield source, self._records(source, self._blocks(source, progress), sizes, progress)
            return
        try:
            for name, content in self._members(source, progress):
                member = dataclasses.replace(source, member=name)
                yield member, self._records_of_member(member, content, sizes)
        except BROKEN as error:
            yield source, iter([(1, ("broken_file", f"cannot be read further ({error})"))])

    def _members(self, source: Source, progress: list[int]) -> Iterator[archives.Member]:
        if source.format == "tar":
            yield from archives.tar_members(decompressed(self._blocks(source, progress), source.compression))
            return
        with self.open_file(source.path) as file:
            yield from archives.zip_members(file, progress)

    def _records_of_member(self, member: Source, content: Iterator[bytes], sizes: ChunkSizes) -> Iterator[tuple[int, Record]]:
        known = format_of(member.member) if is_data_file(member.member) else None
        if not known or known[0] not in TEXT_FORMATS.values():
            return iter([(1, ("not_read", f"not a name of {', '.join(TEXT_FORMATS)}"))])
        return self._records(dataclasses.replace(member, format=known[0], compression=known[1]), content, sizes, [0])

    def _blocks(self, source: Source, progress: list[int]) -> Iterator[bytes]:
        """The file's bytes, in bounded blocks."""
        with sys.stdin.buffer if source.path == "-" else self.open_file(source.path) as file:
            while block := file.read(READ_BYTES):
                progress[0] += len(block)
                yield block

    def _records(
        self, source: Source, blocks: Iterator[bytes], sizes: ChunkSizes, progress: list[int]
    ) -> Iterator[tuple[int, Record]]:
        """(line, record) or (line, (rule, reason)); of an array the element's number, of a table the row's."""
        if source.format == "bin":
            yield from bin_documents.documents(source.path, self.bos_eos, sizes.bytes, progress)
        elif source.format == "parquet":
            with self.open_file(source.path) as file:
                yield from parquet.rows(file, source.size, self.text_key, sizes.longest_record, progress)
        elif source.format == "tfds":
            yield from lines.line_records(tfds_examples.lines(source.path), sizes.longest_record)
        else:
            encoding, text = encodings.to_utf8(decompressed(blocks, source.compression), self.encoding)
            records = self._text_records(text, source.format, sizes.longest_record)
            yield from records if encoding == encodings.UTF8 else encodings.rejecting_undecodable(records, encoding)

    def _text_records(self, blocks: Iterator[bytes], format: str, longest: int) -> Iterator[tuple[int, Record]]:
        """Of blocks in UTF-8."""
        if format in DELIMITERS:
            return csv_rows.rows(lines.lines(blocks, longest), DELIMITERS[format], longest)
        if format == "txt" and self.txt_document != "line":
            return lines.text_records(blocks, self.txt_document, longest)
        is_array, blocks = json_array.is_array(blocks) if format == "jsonl" else (False, blocks)
        return (json_array.elements if is_array else lines.line_records)(blocks, longest)


def chunks(group: list[Source], number: int, sizes: ChunkSizes, reader: Reader | None = None) -> Iterator[Chunk]:
    """The chunks of one of `groups`, in order.

    Args:
      number: of the group among all.
      reader: how records are read; None: by default.

    Raises:
      UserError: a TFDS dataset that is not there; a .bin file that holds no 16-bit numbers; pyarrow is needed.
    """
    reader = reader or Reader()
    index, parts, size, n_records = 0, [], 0, 0
    for source in group:
        progress = [0]  # bytes of the source's file read so far
        for stream, records in reader.streams(source, sizes, progress):
            part, line = Part(stream), 0
            try:
                for line, record in records:
                    if isinstance(record, bytes):
                        part.records.append((line, record))
                        size += len(record)
                        n_records += 1
                    else:
                        part.rejects.append((line, *record))
                    if size >= sizes.bytes or n_records == sizes.records:
                        part.position = progress[0]
                        yield Chunk(f"{number:07d}-{index:06d}", [*parts, part])
                        part = Part(stream)
                        index, parts, size, n_records = index + 1, [], 0, 0
            except BROKEN as error:
                part.rejects.append((line + 1, "broken_file", f"cannot be read further ({error})"))
            if part.records or part.rejects:
                part.position = progress[0]
                parts.append(part)
    if parts:
        yield Chunk(f"{number:07d}-{index:06d}", parts)
