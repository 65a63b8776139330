"""What happens to one chunk, in two halves: `read_chunk` cleans its documents, `write_chunk` tokenises and packs those that are
no duplicates of earlier ones. Both are the same functions for local processes and for Beam.

A finished chunk is a folder:

    train, validation    shards, where there are such documents
    statistics.npz       see data/build/statistics.py
    keys.npy             (documents, keys) uint64, what later chunks' duplicates are found by
    rejected.jsonl       {"file", "line", "rule", "reason"}
    chunk.json           {"digest": of the input, "splits": {split: {"rows", "bytes"}}}
"""

import array
import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import tokenizers

from mateconv_jax import files
from mateconv_jax.data.build import packing
from mateconv_jax.data.build.options import SPLITS, PrepareOptions
from mateconv_jax.data.build.statistics import Statistics
from mateconv_jax.data.rows import starts_after_end
from mateconv_jax.data.shards import RowFormat, token_dtype, write_shard
from mateconv_jax.data.text import duplicates
from mateconv_jax.data.text.cleaning import Cleaner, control_token_pattern
from mateconv_jax.data.text.jsonl import Document, Rejected, parse_line, parse_text
from mateconv_jax.data.text.sources import Chunk

ENCODE_CHARACTERS = 50_000  # of text given to the tokenizer at once: 4 times as much was 10 % slower and took more memory


@dataclasses.dataclass
class CleanChunk:
    """What `read_chunk` found: n documents that passed every rule but duplicates."""

    name: str
    digest: str
    documents: list[Sequence[Document | np.ndarray]]  # pieces of each; an array is token ids already
    lines: list[int]
    keys: np.ndarray  # (n, k) uint64
    rejects: list[tuple[int, str, str]]  # (line, rule, reason)
    statistics: Statistics


def digest(chunk: Chunk) -> str:
    """Of the chunk's input."""
    hasher = blake2b(digest_size=16)
    for line, record in chunk.records:
        hasher.update(b"%d:%d:" % (line, len(record)))
        hasher.update(record)
    return hasher.hexdigest()


def read_chunk(chunk: Chunk, options: PrepareOptions, special_tokens: tuple[str, ...], vocab_size: int) -> CleanChunk:
    """Parse and clean a chunk's records."""
    cleaner = Cleaner(options.cleaning, control_token_pattern(special_tokens))
    result = CleanChunk(chunk.name, digest(chunk), [], [], np.zeros(0), list(chunk.rejects), Statistics(vocab_size))
    cleaned: Counter[str] = Counter()
    keys = []
    for line, record in chunk.records:
        try:
            if chunk.source.format == "bin":
                pieces = [np.frombuffer(record, np.uint16)]
                if pieces[0].max() >= vocab_size:
                    raise Rejected("no_such_token", f"token id {pieces[0].max()} (the vocabulary has {vocab_size})")
                key = [int.from_bytes(blake2b(record, digest_size=8).digest(), "little")]
            else:
                document, changed = cleaner.clean(
                    parse_text(record) if chunk.source.format == "txt" else parse_line(record, options.text_key)
                )
                pieces = cleaner.pieces(document)
                cleaned.update(changed, split=len(pieces) > 1)
                text = duplicates.document_text(document)
                key = [duplicates.text_key(text)]
                if options.dedup == "near":
                    key.extend(duplicates.band_keys(text, options.near_threshold).tolist())
        except Rejected as error:
            result.rejects.append((line, error.rule, str(error)))
            continue
        result.documents.append(pieces)
        result.lines.append(line)
        keys.append(key)
    n_bands = duplicates.bands(options.near_threshold)[0] if options.dedup == "near" else 0
    result.keys = np.array(keys, np.uint64).reshape(len(keys), 1 + n_bands)
    result.statistics.cleaned.update(+cleaned)
    result.statistics.lines = len(chunk.records) + len(chunk.rejects)
    result.statistics.bytes_in = sum(len(record) for _, record in chunk.records)
    return result


def rejects_of(chunk: CleanChunk, source: str, codes: np.ndarray) -> list[dict]:
    """{"file", "line", "rule", "reason"} of what a chunk left out, by line. `codes` (n,) as for `write_chunk`."""
    names = {duplicates.DUPLICATE: "duplicate", duplicates.NEAR_DUPLICATE: "near_duplicate"}
    copies = [
        (line, names[code], "as an earlier document")
        for line, code in zip(chunk.lines, codes.tolist(), strict=True)
        if code != duplicates.KEPT
    ]
    return [
        {"file": source, "line": line, "rule": rule, "reason": reason} for line, rule, reason in sorted(chunk.rejects + copies)
    ]


class ChunkWriter:
    """Tokenises, packs and writes chunks. One in each worker: it holds the tokenizer."""

    def __init__(self, folder: Path, options: PrepareOptions, tokenizer_folder: Path, bos_eos: tuple[int, int]):
        self.folder = folder
        self.options = options
        self.bos_token_id, self.eos_token_id = bos_eos
        self._tokenizer_folder = tokenizer_folder
        self._tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
        self._tokenizer.encode_special_tokens = True  # a literal `</s>` in a text is five ordinary characters
        self._chat_tokenizer = None

    def write_chunk(self, chunk: CleanChunk, source: str, codes: np.ndarray) -> None:
        """Write the chunk's folder aside and rename it. A worker that was killed leaves nothing but what lies aside.

        Args:
          codes: (n,) KEPT, DUPLICATE or NEAR_DUPLICATE for each document.
        """
        with files.aside(self.folder / chunk.name, folder=True) as written:
            self._write_files(written, chunk, source, codes)
            for path in written.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())

    def _write_files(self, folder: Path, chunk: CleanChunk, source: str, codes: np.ndarray) -> None:
        rejects = rejects_of(chunk, source, codes)
        chunk.statistics.rejects.update(reject["rule"] for reject in rejects)
        # The same key decides for every piece of a document, and for every copy of it in any input.
        is_validation = chunk.keys[:, 0] < int(self.options.val_fraction * 2**64)
        splits = {}
        for split in SPLITS:
            chosen = (codes == duplicates.KEPT) & (is_validation == (split == "validation"))
            pieces = [piece for i in np.flatnonzero(chosen) for piece in chunk.documents[i]]
            if pieces:
                splits[split] = self._write_split(folder / split, split, pieces, chunk.statistics)
        chunk.statistics.save(folder / "statistics.npz")
        np.save(folder / "keys.npy", chunk.keys)
        (folder / "rejected.jsonl").write_text(
            "".join(json.dumps(reject, ensure_ascii=False) + "\n" for reject in rejects),
            encoding="utf-8",
            errors="backslashreplace",  # a file's name may be no text
        )
        (folder / "chunk.json").write_text(json.dumps({"digest": chunk.digest, "splits": splits}))

    def _write_split(
        self, path: Path, split: str, pieces: list[Document | np.ndarray], statistics: Statistics
    ) -> dict[str, int]:
        format = RowFormat(self.options.seq_len, self._tokenizer.get_vocab_size())
        documents = list(self._token_ids(pieces))
        lengths = np.array([len(ids) for ids in documents])
        tokens = np.concatenate(documents).astype(token_dtype(format.vocab_size), copy=False)
        if any(isinstance(piece, np.ndarray) for piece in pieces):  # parts of a .bin file's stream, which may be turns
            starts = starts_after_end(tokens[None], self.bos_token_id, self.eos_token_id)[0]
            starts[0] = True
        else:
            starts = np.zeros(len(tokens), bool)
            starts[np.cumsum(lengths) - lengths] = True
        rows = packing.pack({"tokens": tokens, "document_starts": starts}, self.options.seq_len)
        write_shard(path, rows, format)
        n_bytes = path.stat().st_size
        texts = [piece for piece in pieces if isinstance(piece, str)]
        texts += [message["content"] for piece in pieces if isinstance(piece, list) for message in piece]
        n_rows = len(rows["length"])
        statistics.add_documents(split, texts, lengths, tokens, n_rows, n_bytes)
        return {"rows": n_rows, "bytes": n_bytes}

    def _token_ids(self, pieces: list[Document | np.ndarray]) -> Iterator[np.ndarray]:
        """A text becomes `<s>` text `</s>`; a dialogue goes through the chat template, which brings its own control tokens."""
        for batch in _batches(pieces):
            texts = [piece for piece in batch if isinstance(piece, str)]
            encodings = iter(self._tokenizer.encode_batch_fast(texts, add_special_tokens=False))
            for piece in batch:
                if isinstance(piece, str):
                    # array.array takes a list at 12 ns a number, np.array at 40.
                    ids = [self.bos_token_id, *next(encodings).ids, self.eos_token_id]
                    yield np.frombuffer(array.array("I", ids), np.uint32)
                elif isinstance(piece, np.ndarray):
                    yield piece
                else:
                    yield np.array(self._encode_chat(piece), np.uint32)

    def _encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        # They import transformers, 2 s: only where there are dialogues.
        from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib
        from mateconv_jax.data.tokenizer.chat import encode_chat

        if self._chat_tokenizer is None:
            self._chat_tokenizer = tokenizer_lib.load(self._tokenizer_folder, "--tokenizer")
        return encode_chat(self._chat_tokenizer, messages, add_generation_prompt=False)


def _batches(pieces: list[Document | np.ndarray]) -> Iterator[list[Document | np.ndarray]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece) if isinstance(piece, str) else 0
        if size >= ENCODE_CHARACTERS:
            yield batch
            batch, size = [], 0
    yield batch
