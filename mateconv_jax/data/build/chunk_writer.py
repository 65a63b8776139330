"""Second half of a chunk's processing: tokenise, pack and write the documents that are not duplicates.

A finished chunk is a folder:

    train, validation    shards; absent if the chunk has no such documents
    statistics.npz       see data/build/statistics.py
    keys.npy             (documents, keys) uint64, to find duplicates in later chunks
    rejected.jsonl       {"file", "line", "rule", "reason"}
    chunk.json           {"digest": hash of the input, "splits": {split: {"rows", "streamed_rows", "bytes", "learned"}},
                         "inputs": see InputCounts}

The rows are pairs if there are preferences in the chunk. One that has texts or dialogues as well is never used, see
build/unreadable.py.
"""

import array
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers

from mateconv_jax import files
from mateconv_jax.data.build import packing
from mateconv_jax.data.build.chunk_reader import REFUSED, CleanChunk, InputCounts, rejects_of
from mateconv_jax.data.build.dialogues import RowDialogue, RowDialogues, RowPair
from mateconv_jax.data.build.options import SPLITS, PrepareOptions
from mateconv_jax.data.dialogue import Dialogue, Preference
from mateconv_jax.data.rows import starts_after_end
from mateconv_jax.data.shards import RowFormat, token_dtype, write_shard
from mateconv_jax.data.text import duplicates
from mateconv_jax.data.text.dialogue import texts as texts_of
from mateconv_jax.data.text.jsonl import Document
from mateconv_jax.data.text.rejected import Rejected

ENCODE_CHARACTERS = 50_000  # per call of the tokenizer: 4 times as many were 10 % slower and took more memory

Piece = str | np.ndarray | RowDialogue  # of a document: text, token ids from a .bin file, or an encoded dialogue


class ChunkWriter:
    """Tokenises, packs and writes chunks. Each worker has one, because it holds the tokenizer."""

    def __init__(
        self, folder: Path, options: PrepareOptions, tokenizer_folder: Path, bos_eos: tuple[int | None, int], vocab_size: int
    ):
        self.folder = folder
        self.options = options
        self.bos_token_id, self.eos_token_id = bos_eos
        self._begin = [] if self.bos_token_id is None else [self.bos_token_id]
        self._vocab_size = vocab_size
        self._tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
        self._tokenizer.encode_special_tokens = True  # a literal `</s>` in a text is encoded as ordinary characters
        self._dialogues = RowDialogues(tokenizer_folder, options)

    def write_chunk(self, chunk: CleanChunk, codes: np.ndarray) -> list[InputCounts]:
        """Write the chunk's folder aside and rename it, so that a killed worker leaves no half-written chunk.

        Args:
          codes: (n,) KEPT, DUPLICATE or NEAR_DUPLICATE for each document.

        Returns:
          The counts of the chunk's inputs, now including records that failed in tokenisation.
        """
        with files.aside(self.folder / chunk.name, folder=True) as written:
            self._write_files(written, chunk, codes.copy())
            for path in written.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        return chunk.inputs

    def _write_files(self, folder: Path, chunk: CleanChunk, codes: np.ndarray) -> None:
        dialogues = self._encode_dialogues(chunk, codes)
        # The split depends on the key alone: all pieces of a document, and its copies in any input, go to the same split.
        is_validation = chunk.keys[:, 0] < int(self.options.val_fraction * 2**64)
        splits = {}
        for split in SPLITS:
            chosen = np.flatnonzero((codes == duplicates.KEPT) & (is_validation == (split == "validation"))).tolist()
            if counts := self._write_split(folder / split, split, chunk, codes, chosen, dialogues):
                splits[split] = counts
        rejects = rejects_of(chunk, codes)
        chunk.statistics.rejects.update(reject["rule"] for reject in rejects)
        chunk.statistics.save(folder / "statistics.npz")
        np.save(folder / "keys.npy", chunk.keys)
        (folder / "rejected.jsonl").write_text(
            "".join(json.dumps(reject, ensure_ascii=False) + "\n" for reject in rejects),
            encoding="utf-8",
            errors="backslashreplace",  # a file name may not be valid UTF-8
        )
        inputs = [dataclasses.asdict(counts) for counts in chunk.inputs]
        files.write_text(folder / "chunk.json", json.dumps({"digest": chunk.digest, "splits": splits, "inputs": inputs}))

    def _encode_dialogues(self, chunk: CleanChunk, codes: np.ndarray) -> dict[int, RowDialogue | RowPair]:
        """{document: tokens} of the dialogues and preferences to keep. Those that cannot be encoded become rejects."""
        found: dict[int, RowDialogue | RowPair] = {}
        for i in np.flatnonzero(codes == duplicates.KEPT).tolist():
            try:
                if isinstance(document := chunk.documents[i][0], Dialogue):
                    found[i] = encoded = self._dialogues.encode(document)
                    chunk.statistics.cleaned.update(oldest_turns=encoded.n_dropped > 0)
                elif isinstance(document, Preference):
                    found[i] = self._dialogues.encode_pair(document)
            except Rejected as error:
                self._refuse(chunk, codes, i, error.rule, str(error))
        chunk.statistics.cleaned = +chunk.statistics.cleaned
        return found

    def _refuse(self, chunk: CleanChunk, codes: np.ndarray, document: int, rule: str, reason: str) -> None:
        number, line = chunk.places[document]
        codes[document] = REFUSED
        chunk.rejects.append((number, line, rule, reason))
        chunk.inputs[number].add(rule, line, reason)

    def _write_split(
        self, path: Path, split: str, chunk: CleanChunk, codes: np.ndarray, chosen: list[int], encoded: dict
    ) -> dict | None:
        """Write the chosen documents' rows: pairs, or first texts, cut at row ends, then whole dialogues. None if there are
        none.
        """
        if pairs := [i for i in chosen if isinstance(encoded.get(i), RowPair)]:
            return self._write_pairs(path, split, chunk, pairs, encoded)
        whole = [i for i in chosen if i in encoded] if self.options.learn != "everything" else []
        streamed = [i for i in chosen if i not in encoded or self.options.learn == "everything"]
        pieces: list[Piece] = []
        for i in streamed:
            pieces += [encoded[i]] if i in encoded else chunk.documents[i]  # pyrefly: ignore[unsupported-operation]
        ids = list(self._token_ids(pieces))
        if sum(map(len, ids)) == 1:
            for i in streamed:
                self._refuse(chunk, codes, i, "one_token", "one token alone has no next token to learn")
            streamed, ids = [], []
        if not ids and not whole:
            return None
        dtype = token_dtype(self._vocab_size)
        parts = [packing.pack(self._stream(pieces, ids, dtype), self.options.seq_len)] if ids else []
        streamed_rows = sum(len(rows["length"]) for rows in parts)
        if whole:
            parts.append(packing.pack_whole([encoded[i][:2] for i in whole], self.options.seq_len, dtype))
        rows = packing.join(parts)
        format = RowFormat(self.options.seq_len, self._vocab_size, learned=bool(whole))
        write_shard(path, rows, format)
        counts = {"rows": len(rows["length"]), "streamed_rows": streamed_rows, "bytes": path.stat().st_size}
        ids += [encoded[i].ids for i in whole]
        texts = [text for i in streamed + whole for piece in chunk.documents[i] for text in _texts_of(piece)]
        chunk.statistics.add_documents(split, texts, list(map(len, ids)), np.concatenate(ids), rows, counts["bytes"])
        return counts | {"learned": format.learned}

    def _write_pairs(self, path: Path, split: str, chunk: CleanChunk, chosen: list[int], encoded: dict[int, RowPair]) -> dict:
        pairs = [encoded[i] for i in chosen]
        rows = packing.pair_rows(pairs, self.options.seq_len, token_dtype(self._vocab_size))
        write_shard(path, rows, RowFormat.of_pairs(self.options.seq_len, self._vocab_size))
        counts = {"rows": len(pairs), "streamed_rows": 0, "bytes": path.stat().st_size, "learned": True}
        texts = [text for i in chosen for text in _texts_of(chunk.documents[i][0])]
        lengths = rows["length"].max(axis=1).tolist()
        tokens = np.concatenate([answer.ids for pair in pairs for answer in pair])
        chunk.statistics.add_documents(split, texts, lengths, tokens, rows, counts["bytes"])
        return counts

    def _stream(self, pieces: list[Piece], ids: list[np.ndarray], dtype: np.dtype) -> dict[str, np.ndarray]:
        tokens = np.concatenate(ids).astype(dtype, copy=False)
        if any(isinstance(piece, np.ndarray) for piece in pieces):  # from a .bin file, where a piece may be a single turn
            bos_token_id = self.bos_token_id if self.bos_token_id in tokens else None
            starts = starts_after_end(tokens[None], bos_token_id, self.eos_token_id)[0]
            starts[0] = True
        else:
            starts = np.zeros(len(tokens), bool)
            starts[np.cumsum([0, *map(len, ids[:-1])])] = True
        return {"tokens": tokens, "document_starts": starts}

    def _token_ids(self, pieces: list[Piece]) -> Iterator[np.ndarray]:
        """Token ids of each piece. Texts get `<s>`, if the tokenizer has one, and `</s>`; dialogues have their control tokens
        from the chat template.
        """
        for batch in _batches(pieces):
            texts = [piece for piece in batch if isinstance(piece, str)]
            encodings = iter(self._tokenizer.encode_batch_fast(texts, add_special_tokens=False))
            for piece in batch:
                if isinstance(piece, str):
                    # array.array converts a list at 12 ns per number, np.array at 40.
                    ids = [*self._begin, *next(encodings).ids, self.eos_token_id]
                    yield np.frombuffer(array.array("I", ids), np.uint32)
                else:
                    yield piece if isinstance(piece, np.ndarray) else piece.ids


def _texts_of(piece: Document | np.ndarray) -> Sequence[str]:
    if isinstance(piece, Preference):
        return texts_of(piece.chosen) + texts_of(piece.rejected)
    return [piece] if isinstance(piece, str) else texts_of(piece) if isinstance(piece, Dialogue) else []


def _batches(pieces: list[Piece]) -> Iterator[list[Piece]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece) if isinstance(piece, str) else 0
        if size >= ENCODE_CHARACTERS:
            yield batch
            batch, size = [], 0
    yield batch
