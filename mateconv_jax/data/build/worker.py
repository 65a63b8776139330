"""What happens to one chunk, in two halves: `read_chunk` cleans its documents, `write_chunk` tokenises and packs those that are
no duplicates of earlier ones. Local processes and Beam call the same two functions.

A finished chunk is a folder:

    train, validation    shards, where there are such documents
    statistics.npz       see data/build/statistics.py
    keys.npy             (documents, keys) uint64, what later chunks' duplicates are found by
    rejected.jsonl       {"file", "line", "rule", "reason"}
    chunk.json           {"digest": of the input, "splits": {split: {"rows", "bytes"}}, "inputs": see InputCounts}
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
from mateconv_jax.data.text.dialogue import Dialogue, texts as texts_of
from mateconv_jax.data.text.jsonl import Document, Parsed, parse_line, parse_text
from mateconv_jax.data.text.rejected import Rejected
from mateconv_jax.data.text.sources import Chunk
from mateconv_jax.errors import UserError

ENCODE_CHARACTERS = 50_000  # of text given to the tokenizer at once: 4 times as much was 10 % slower and took more memory


# Rules for records that could not be read as what they were taken for; the others are choices (cleaning, duplicates).
UNREADABLE = {
    "broken_file", "line_too_long", "invalid_utf8", "invalid_json", "lone_surrogate", "not_an_object", "no_text",
    "no_such_token", "chat_template", "bad_row", "bad_history", "unknown_role", "unsupported_field", "unsupported_part",
}  # fmt: skip
REFUSED = 255  # among the codes of duplicates: the chat template cannot write it, or a shard of it would have no target


@dataclasses.dataclass
class InputCounts:
    """What became of one input's records in one chunk.

    Attributes:
      first: "line: reason" of the first that was unreadable.
      broken: the file could not be read to its end.
      head: the first bytes of the first unreadable record, to tell what the file is, as text.
    """

    path: str
    records: int = 0
    unreadable: int = 0
    first: str = ""
    broken: bool = False
    head: str = ""

    def add(self, rule: str, line: int, reason: str, record: bytes = b"") -> None:
        """Count a rejected record."""
        if rule in UNREADABLE:
            self.unreadable += 1
            self.broken |= rule == "broken_file"
            if not self.first:
                self.first, self.head = f"{line}: {reason}", record[:16].decode("latin-1")


@dataclasses.dataclass
class CleanChunk:
    """What `read_chunk` found: n documents that passed every rule but duplicates.

    Attributes:
      documents: pieces of each; an array is token ids already.
      places: (input, line) of each.
      keys: (n, k) uint64.
      rejects: (input, line, rule, reason).
      inputs: the chunk's, in order; an input above is an index into this.
    """

    name: str
    digest: str
    documents: list[Sequence[Document | np.ndarray]]
    places: list[tuple[int, int]]
    keys: np.ndarray
    rejects: list[tuple[int, int, str, str]]
    statistics: Statistics
    inputs: list[InputCounts]


def digest(chunk: Chunk) -> str:
    """Of the chunk's input."""
    hasher = blake2b(digest_size=16)
    for part in chunk.parts:
        for line, record in part.records:
            hasher.update(b"%d:%d:" % (line, len(record)))
            hasher.update(record)
        for line, rule, _ in part.rejects:
            hasher.update(f"{line}:{rule}".encode())
    return hasher.hexdigest()


def read_chunk(chunk: Chunk, options: PrepareOptions, special_tokens: tuple[str, ...], vocab_size: int) -> CleanChunk:
    """Parse and clean a chunk's records."""
    cleaner = Cleaner(options.cleaning, control_token_pattern(special_tokens))
    result = CleanChunk(chunk.name, digest(chunk), [], [], np.zeros(0), [], Statistics(vocab_size), [])
    cleaned: Counter[str] = Counter()
    keys = []
    for i, part in enumerate(chunk.parts):
        counts = InputCounts(part.source.path, len(part.records) + len(part.rejects))
        result.inputs.append(counts)
        for line, rule, reason in part.rejects:
            result.rejects.append((i, line, rule, reason))
            counts.add(rule, line, reason)
        for line, record in part.records:
            try:
                if part.source.format == "bin":
                    pieces, key = _token_ids_of(record, vocab_size)
                else:
                    parsed = _parse(record, part.source.format, options)
                    result.statistics.schemas[parsed.schema] += 1
                    result.statistics.ignored_fields.update(parsed.dropped)
                    pieces, key, changed, text = _document_of(parsed.document, cleaner, options)
                    result.statistics.control_tokens_as_text += any(token in text for token in special_tokens)
                    cleaned.update(changed, split=len(pieces) > 1)
            except Rejected as error:
                result.rejects.append((i, line, error.rule, str(error)))
                counts.add(error.rule, line, str(error), record)
                continue
            result.documents.append(pieces)
            result.places.append((i, line))
            keys.append(key)
        result.statistics.lines += counts.records
        result.statistics.bytes_in += sum(len(record) for _, record in part.records)
    n_bands = duplicates.bands(options.near_threshold)[0] if options.dedup == "near" else 0
    result.keys = np.array(keys, np.uint64).reshape(len(keys), 1 + n_bands)
    result.statistics.cleaned.update(+cleaned)
    return result


def _token_ids_of(record: bytes, vocab_size: int) -> tuple[Sequence[np.ndarray], list[int]]:
    """A document of a .bin file, and its key."""
    ids = np.frombuffer(record, np.uint16)
    if ids.max() >= vocab_size:
        raise Rejected("no_such_token", f"token id {ids.max()} (the vocabulary has {vocab_size})")
    return [ids], [int.from_bytes(blake2b(record, digest_size=8).digest(), "little")]


def _parse(record: bytes, format: str, options: PrepareOptions) -> Parsed:
    return Parsed(parse_text(record)) if format == "txt" else parse_line(record, options.text_key, options.ignore_fields)


def _document_of(
    parsed: Document, cleaner: Cleaner, options: PrepareOptions
) -> tuple[Sequence[Document], list[int], set[str], str]:
    """A document's pieces, its keys, the rules that changed it, and its text."""
    document, changed = cleaner.clean(parsed)
    text = duplicates.document_text(document)
    key = [duplicates.document_key(document)]
    if options.dedup == "near":
        key.extend(duplicates.band_keys(text, options.near_threshold).tolist())
    return cleaner.pieces(document), key, changed, text


def rejects_of(chunk: CleanChunk, codes: np.ndarray) -> list[dict]:
    """{"file", "line", "rule", "reason"} of what a chunk left out, in order. `codes` (n,) as for `write_chunk`."""
    names = {duplicates.DUPLICATE: "duplicate", duplicates.NEAR_DUPLICATE: "near_duplicate"}
    copies = [
        (*place, names[code], "as an earlier document")
        for place, code in zip(chunk.places, codes.tolist(), strict=True)
        if code in names
    ]
    return [
        {"file": chunk.inputs[i].path, "line": line, "rule": rule, "reason": reason}
        for i, line, rule, reason in sorted(chunk.rejects + copies)
    ]


class ChunkWriter:
    """Tokenises, packs and writes chunks. One in each worker: it holds the tokenizer."""

    def __init__(
        self, folder: Path, options: PrepareOptions, tokenizer_folder: Path, bos_eos: tuple[int, int], vocab_size: int
    ):
        self.folder = folder
        self.options = options
        self.bos_token_id, self.eos_token_id = bos_eos
        self._format = RowFormat(options.seq_len, vocab_size)
        self._tokenizer_folder = tokenizer_folder
        self._tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
        self._tokenizer.encode_special_tokens = True  # a literal `</s>` in a text is five ordinary characters
        self._chat_tokenizer = None

    def write_chunk(self, chunk: CleanChunk, codes: np.ndarray) -> list[InputCounts]:
        """Write the chunk's folder aside and rename it. A worker that was killed leaves nothing but what lies aside.

        Args:
          codes: (n,) KEPT, DUPLICATE or NEAR_DUPLICATE for each document.

        Returns:
          The chunk's inputs, with those counted that only tokenising finds out to be unusable.
        """
        with files.aside(self.folder / chunk.name, folder=True) as written:
            self._write_files(written, chunk, codes.copy())
            for path in written.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        return chunk.inputs

    def _write_files(self, folder: Path, chunk: CleanChunk, codes: np.ndarray) -> None:
        dialogues = self._encode_dialogues(chunk, codes)
        # The same key decides for every piece of a document, and for every copy of it in any input.
        is_validation = chunk.keys[:, 0] < int(self.options.val_fraction * 2**64)
        splits = {}
        for split in SPLITS:
            chosen = np.flatnonzero((codes == duplicates.KEPT) & (is_validation == (split == "validation"))).tolist()
            pieces = [piece for i in chosen for piece in chunk.documents[i]]
            ids = list(self._token_ids(pieces, [ids for i in chosen if (ids := dialogues.get(i)) is not None]))
            if sum(map(len, ids)) > 1:
                splits[split] = self._write_split(folder / split, split, pieces, ids, chunk.statistics)
            else:
                for i in map(int, chosen):
                    self._refuse(chunk, codes, i, "one_token", "one token alone has no next token to learn")
        rejects = rejects_of(chunk, codes)
        chunk.statistics.rejects.update(reject["rule"] for reject in rejects)
        chunk.statistics.save(folder / "statistics.npz")
        np.save(folder / "keys.npy", chunk.keys)
        (folder / "rejected.jsonl").write_text(
            "".join(json.dumps(reject, ensure_ascii=False) + "\n" for reject in rejects),
            encoding="utf-8",
            errors="backslashreplace",  # a file's name may be no text
        )
        inputs = [dataclasses.asdict(counts) for counts in chunk.inputs]
        (folder / "chunk.json").write_text(json.dumps({"digest": chunk.digest, "splits": splits, "inputs": inputs}))

    def _encode_dialogues(self, chunk: CleanChunk, codes: np.ndarray) -> dict[int, np.ndarray]:
        """{document: token ids} of the dialogues that are kept. What the chat template refuses becomes a reject."""
        found = {}
        for i in np.flatnonzero(codes == duplicates.KEPT).tolist():
            if isinstance(dialogue := chunk.documents[i][0], Dialogue):
                try:
                    ids, reason = self._encode_chat(dialogue), "the chat template writes nothing for these messages"
                except UserError as error:
                    ids, reason = [], str(error).removeprefix("chat: ")
                if ids:
                    found[i] = np.array(ids, np.uint32)
                else:
                    self._refuse(chunk, codes, i, "chat_template", reason)
        return found

    def _refuse(self, chunk: CleanChunk, codes: np.ndarray, document: int, rule: str, reason: str) -> None:
        number, line = chunk.places[document]
        codes[document] = REFUSED
        chunk.rejects.append((number, line, rule, reason))
        chunk.inputs[number].add(rule, line, reason)

    def _write_split(
        self,
        path: Path,
        split: str,
        pieces: list[Document | np.ndarray],
        ids: list[np.ndarray],
        statistics: Statistics,
    ) -> dict[str, int]:
        lengths = np.array([len(piece) for piece in ids])
        tokens = np.concatenate(ids).astype(token_dtype(self._format.vocab_size), copy=False)
        if any(isinstance(piece, np.ndarray) for piece in pieces):  # parts of a .bin file's stream, which may be turns
            starts = starts_after_end(tokens[None], self.bos_token_id, self.eos_token_id)[0]
            starts[0] = True
        else:
            starts = np.zeros(len(tokens), bool)
            starts[np.cumsum(lengths) - lengths] = True
        rows = packing.pack({"tokens": tokens, "document_starts": starts}, self.options.seq_len)
        write_shard(path, rows, self._format)
        n_bytes = path.stat().st_size
        texts = [piece for piece in pieces if isinstance(piece, str)]
        texts += [text for piece in pieces if isinstance(piece, Dialogue) for text in texts_of(piece)]
        n_rows = len(rows["length"])
        statistics.add_documents(split, texts, lengths, tokens, n_rows, n_bytes)
        return {"rows": n_rows, "bytes": n_bytes}

    def _token_ids(self, pieces: list[Document | np.ndarray], dialogues: list[np.ndarray]) -> Iterator[np.ndarray]:
        """A text becomes `<s>` text `</s>`; a dialogue went through the chat template, which brings its own control tokens."""
        encoded = iter(dialogues)
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
                    yield next(encoded)

    def _encode_chat(self, dialogue: Dialogue) -> list[int]:
        # They import transformers, 2 s: only where there are dialogues.
        from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib
        from mateconv_jax.data.tokenizer.chat import encode_chat

        if self._chat_tokenizer is None:
            self._chat_tokenizer = tokenizer_lib.load(self._tokenizer_folder, "--tokenizer")
        return encode_chat(self._chat_tokenizer, dialogue.messages, add_generation_prompt=False)


def _batches(pieces: list[Document | np.ndarray]) -> Iterator[list[Document | np.ndarray]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece) if isinstance(piece, str) else 0
        if size >= ENCODE_CHARACTERS:
            yield batch
            batch, size = [], 0
    yield batch
