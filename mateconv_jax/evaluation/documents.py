"""Documents to be scored one by one: raw text as `prepare` reads and cleans it, or a dataset folder, decoded."""

import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import tokenizers

from mateconv_jax.data.build import chunk_reader, pipeline
from mateconv_jax.data.build.chunk_reader import CleanChunk
from mateconv_jax.data.build.options import PrepareOptions
from mateconv_jax.data.build.unreadable import UnreadableInputs
from mateconv_jax.data.dataset import Dataset, is_dataset, open_dataset
from mateconv_jax.data.dialogue import Dialogue
from mateconv_jax.data.rows import Rows
from mateconv_jax.data.text import sources
from mateconv_jax.data.text.sources import Chunk, ChunkSizes
from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib
from mateconv_jax.errors import UserError
from mateconv_jax.evaluation.comparison import EVERYTHING

NO_SPLITS = "--split: {!r} has no splits (only dataset folders from python -m mateconv_jax.prepare do)"
NO_VALUE = "(none)"  # the group of a document without the field
CHUNK = 1_000_000  # bytes of input: of a text that is too long every n-th chunk is read
BLOCK = 512  # rows that are read at once


@dataclasses.dataclass(frozen=True)
class Document:
    """A document.

    Attributes:
      place: FILE:LINE, or FOLDER:NUMBER of a dataset's.
      group: the value of the field that documents are grouped by; empty: they are not.
    """

    place: str
    content: str | Dialogue
    group: str = ""


def grouped(documents: Sequence[Document]) -> dict[str, np.ndarray]:
    """{group: numbers of its documents}; EVERYTHING has all."""
    groups: dict[str, list[int]] = defaultdict(list)
    for i, document in enumerate(documents):
        groups[document.group].append(i)
    return {EVERYTHING: np.arange(len(documents))} | {
        name: np.array(members) for name, members in sorted(groups.items()) if name
    }


def texts_of(documents: Sequence[Document], problem: str) -> list[str]:
    """Raises UserError, with this message, if one is a dialogue."""
    texts = [document.content for document in documents if isinstance(document.content, str)]
    if len(texts) < len(documents):
        raise UserError(problem)
    return texts


def is_prepared(paths: list[str]) -> bool:
    """Whether all are dataset folders or flat .bin files, not raw text."""
    return all(is_dataset(path) and not _holds_raw_files(Path(path)) for path in paths)


def _holds_raw_files(path: Path) -> bool:
    return path.is_dir() and any(path.iterdir()) and not (path / "metadata.json").is_file()


def read(
    paths: list[str],
    key: str,
    split: str | None,
    reading: dict[str, Any],
    by: str | None = None,
    max_bytes: int | None = None,
) -> tuple[list[Document], dict[str, int]]:
    """The documents of raw files or of dataset folders, and {rule: raw documents rejected}. Each of several dataset folders
    is a group.

    Args:
      key: the flag that named the paths, for errors.
      split: of a dataset folder.
      reading: how to read raw files, as in PrepareOptions.
      by: a field of their JSON, by whose value raw documents are grouped; None: they are not.
      max_bytes: of a longer text take evenly spaced pieces of a megabyte, of this size together; None: everything.

    Raises:
      UserError: nothing is there, it is no text, or no document has the field.
    """
    if is_prepared(paths):
        if reading or by is not None:
            flag = next(iter(reading), "by")
            raise UserError(f"--{flag}: {' '.join(paths)!r} is prepared already (expected only with raw text)")
        share = None if max_bytes is None else max_bytes // len(paths)
        documents, rejected = [], {}
        for path in paths:
            of_path = _read_dataset(path, key, split or "validation", share)
            documents += of_path if len(paths) == 1 else [dataclasses.replace(document, group=path) for document in of_path]
    else:
        documents, rejected = _read_raw(paths, key, reading, by, max_bytes)
    if not documents:
        raise UserError(f"{key}: {' '.join(paths)!r} holds no document")
    return documents, rejected


# ---- raw text -----------------------------------------------------------------------------------------------------


def _read_raw(
    paths: list[str], key: str, reading: dict[str, Any], by: str | None, max_bytes: int | None
) -> tuple[list[Document], dict[str, int]]:
    options = PrepareOptions(val_fraction=0.0, dedup="none", sizes=ChunkSizes(bytes=CHUNK), **reading).split_at("<s>", "</s>")
    unreadable = UnreadableInputs(keep_going=False, one_document_files=options.txt_document == "file")
    documents: list[Document] = []
    rejected: Counter[str] = Counter()
    size = 0
    try:
        found = sources.find(paths)
        if any(source.format == "bin" for source in found):
            raise UserError(f"--input: {' '.join(paths)!r} holds token ids (expected text, or a dataset folder)")
        every = 1 if max_bytes is None else max(1, -(-sum(source.size or 0 for source in found) // max_bytes))
        for number, chunk in enumerate(pipeline.all_chunks(found, options, None)):
            if number % every or max_bytes is not None and size >= max_bytes:
                continue
            unreadable.begin(part.source.name for part in chunk.parts)
            clean = chunk_reader.read_chunk(chunk, options, (), 0)
            unreadable.done(clean.inputs)
            rejected.update(rule for _, _, rule, _ in clean.rejects)
            documents += _documents(chunk, clean, key, by)
            size += clean.statistics.bytes_in
        unreadable.finish()
    except UserError as error:
        raise UserError(in_terms_of(key, error)) from error
    if by is not None and all(document.group == NO_VALUE for document in documents):
        raise UserError(f"--by: no document of {' '.join(paths)!r} has the field {by!r} (expected a key of its JSON)")
    return documents, dict(rejected)


def in_terms_of(key: str, error: UserError) -> str:
    """The message of an error of `prepare`, with the flag `key` in place of its flags and without how to resume it."""
    message = str(error).split(" (finished chunks")[0].removesuffix(" (--keep_going uses what is readable)")
    return message.replace("--input:", f"{key}:").replace("--output:", f"{key}:")


def _documents(chunk: Chunk, clean: CleanChunk, key: str, by: str | None) -> Iterator[Document]:
    lines = [dict(part.records) for part in chunk.parts] if by is not None else []
    for pieces, (part, line) in zip(clean.documents, clean.places, strict=True):
        place = f"{chunk.parts[part].source.name}:{line}"
        group = "" if by is None else _value(lines[part][line], by)
        for content in pieces:
            if not isinstance(content, str | Dialogue):
                raise UserError(f"{key}: {place!r} is a preference (expected a text or a dialogue)")
            yield Document(place, content, group)


def _value(record: bytes, field: str) -> str:
    """The value of a field of a line, as a name for its group."""
    try:
        value = orjson.loads(record)[field]
    except (orjson.JSONDecodeError, KeyError, TypeError):  # a line of a .txt file
        return NO_VALUE
    return value or NO_VALUE if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# ---- dataset folders ----------------------------------------------------------------------------------------------


def _read_dataset(path: str, key: str, split: str, max_bytes: int | None) -> list[Document]:
    if Path(path).suffix == ".bin":
        raise UserError(f"{key}: {path!r} holds token ids (expected text, or a dataset folder)")
    dataset = open_dataset(path, key, 0)
    if dataset.content != "texts" or dataset.learned:
        raise UserError(f"{key}: {path!r} holds {'dialogues' if dataset.learned else dataset.content} (expected texts)")
    assert dataset.tokenizer_folder is not None
    tokenizer = tokenizer_lib.load(dataset.tokenizer_folder, key)
    rows = dataset.rows(split, (tokenizer.bos_token_id, tokenizer.eos_token_id))
    if rows is None:
        raise UserError(f"--split: {path!r} has no split {split!r} (available: {', '.join(dataset.splits or ())})")
    every = 1 if max_bytes is None else max(1, -(-_likely_bytes(dataset, split) // max_bytes))
    documents, backend = [], tokenizer.backend_tokenizer
    for ids in _whole_documents(rows, every):
        documents += _decoded(backend, ids)
    return [Document(f"{path}:{i}", text) for i, text in enumerate(documents, 1) if text]


def _likely_bytes(dataset: Dataset, split: str) -> int:
    """Of a split's text, at 4 bytes a token."""
    return 4 * dataset.n_rows(split) * dataset.seq_len


def _decoded(tokenizer: tokenizers.Tokenizer, documents: list[np.ndarray]) -> list[str]:
    return tokenizer.decode_batch([ids.tolist() for ids in documents], skip_special_tokens=True)


def _whole_documents(rows: Rows, every: int) -> Iterator[list[np.ndarray]]:
    """Token ids of the documents of every n-th block of rows; where that is not all, of those that are whole in a block."""
    rest, last = np.zeros(0, np.int64), -1  # of a document whose end has not come yet, and the last row's last token
    for start in range(0, len(rows), BLOCK * every):
        batch = rows.read(np.arange(start, min(start + BLOCK, len(rows))))
        tokens_RS, is_start_RS = batch["tokens"].astype(np.int64), batch["document_starts"].copy()
        # A row begins with the last token of the one before, unless that was the last of its shard.
        last_R = tokens_RS[np.arange(len(tokens_RS)), batch["length"] - 1]
        goes_on_R = tokens_RS[:, 0] == np.append(last, last_R[:-1])
        is_start_RS[~goes_on_R, 0] = True
        is_token_RS = np.arange(tokens_RS.shape[1]) < batch["length"][:, None]
        is_token_RS[goes_on_R, 0] = False
        if every > 1:
            is_start_RS[0, 0] = batch["document_starts"][0, 0]
        ids_N, starts = tokens_RS[is_token_RS], np.flatnonzero(is_start_RS[is_token_RS])
        first, *others = np.split(ids_N, starts)
        if every > 1:
            yield others[:-1]
        else:
            *ended, rest = [np.append(rest, first), *others]
            yield ended
            last = int(last_R[-1])
    if every == 1:
        yield [rest]
