"""First half of a chunk's processing: parse and clean its documents. Shared by local processes and Beam."""

import dataclasses
from collections import Counter
from collections.abc import Sequence, Set
from hashlib import blake2b

import numpy as np

from mateconv_jax.data.build.options import PrepareOptions
from mateconv_jax.data.build.statistics import Statistics
from mateconv_jax.data.dialogue import Preference
from mateconv_jax.data.text import duplicates, encodings
from mateconv_jax.data.text.cleaning import DOCUMENT_TOKENS, Cleaner, control_token_pattern, split_at_tokens
from mateconv_jax.data.text.jsonl import Document, parse_line, parse_text
from mateconv_jax.data.text.rejected import Rejected
from mateconv_jax.data.text.sources import Chunk

# Rules for records that could not be parsed as their format; the other rules are choices (cleaning, duplicates).
UNREADABLE = {
    "broken_file", "line_too_long", "invalid_utf8", "invalid_json", "lone_surrogate", "not_an_object", "no_text",
    "no_such_token", "chat_template", "bad_row", "bad_history", "unknown_role", "unsupported_field", "unsupported_part",
    "role_not_in_template", "field_not_in_template", "learned_unclear", "control_token", "nothing_to_learn",
    "learn_everything",
}  # fmt: skip
LIKELY_BYTES = 1 << 12  # of a record that is not UTF-8, to guess its encoding
REFUSED = 255  # a code beside those of duplicates.py: refused by the chat template, or a shard of one token


@dataclasses.dataclass
class InputCounts:
    """Counts of one input's records in one chunk.

    Attributes:
      documents, pairs: records that are texts or dialogues, and those that are preferences.
      first_document, first_pair: their first lines.
      first: "line: reason" of the first unreadable record.
      broken: the file could not be read to its end.
      head: the first bytes of that record as Latin-1, to recognise the file's real format.
      encoding: the likely encoding of that record if it is not UTF-8.
    """

    path: str
    records: int = 0
    unreadable: int = 0
    first: str = ""
    broken: bool = False
    head: str = ""
    encoding: str = ""
    documents: int = 0
    pairs: int = 0
    first_document: int | None = None
    first_pair: int | None = None

    def add_parsed(self, line: int, is_pair: bool) -> None:
        """Count a record that was parsed."""
        if is_pair:
            self.pairs += 1
            self.first_pair = self.first_pair or line
        else:
            self.documents += 1
            self.first_document = self.first_document or line

    def add(self, rule: str, line: int, reason: str, record: bytes = b"") -> None:
        """Count a rejected record."""
        if rule in UNREADABLE:
            self.unreadable += 1
            self.broken |= rule == "broken_file"
            if not self.first:
                self.first, self.head = f"{line}: {reason}", record[:16].decode("latin-1")
                if rule == "invalid_utf8" or b"\0" in record:
                    self.encoding = encodings.likely(record[:LIKELY_BYTES]) or ""


@dataclasses.dataclass
class CleanChunk:
    """A parsed and cleaned chunk: n documents that passed every rule except deduplication.

    Attributes:
      documents: the pieces of each; arrays are token ids.
      places: (input, line) of each.
      keys: (n, k) uint64, for deduplication.
      rejects: (input, line, rule, reason).
      inputs: in order; `input` above is an index into this list.
    """

    name: str
    digest: str
    documents: list[Sequence[Document | np.ndarray]]
    places: list[tuple[int, int]]
    keys: np.ndarray
    rejects: list[tuple[int, int, str, str]]
    statistics: Statistics
    inputs: list[InputCounts]

    def reject(self, input: int, line: int, error: Rejected, record: bytes) -> None:
        self.rejects.append((input, line, error.rule, str(error)))
        self.inputs[input].add(error.rule, line, str(error), record)


def digest(chunk: Chunk) -> str:
    """Hash of the chunk's input."""
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
    control_tokens = (*special_tokens, *DOCUMENT_TOKENS)
    result = CleanChunk(chunk.name, digest(chunk), [], [], np.zeros(0), [], Statistics(vocab_size), [])
    statistics, cleaned, keys = result.statistics, Counter[str](), []
    for i, part in enumerate(chunk.parts):
        counts = InputCounts(part.source.name, len(part.records) + len(part.rejects))
        result.inputs.append(counts)
        for line, rule, reason in part.rejects:
            result.rejects.append((i, line, rule, reason))
            counts.add(rule, line, reason)
        for line, record in part.records:
            try:
                documents = _documents(record, line, part.source.format, options, vocab_size, counts, statistics)
            except Rejected as error:
                result.reject(i, line, error, record)
                continue
            for document in documents:
                try:
                    pieces, key, changed, text = _cleaned(document, cleaner, options)
                except Rejected as error:
                    result.reject(i, line, error, record)
                    continue
                statistics.control_tokens_as_text += any(token in text for token in control_tokens)
                if changed or len(pieces) > 1:  # Counter.update would take a tenth of the time of a short text
                    cleaned.update(changed, split=len(pieces) > 1)
                result.documents.append(pieces)
                result.places.append((i, line))
                keys.append(key)
        statistics.lines += counts.records
        statistics.bytes_in += sum(len(record) for _, record in part.records)
    n_bands = duplicates.bands(options.near_threshold)[0] if options.dedup == "near" else 0
    result.keys = np.array(keys, np.uint64).reshape(len(keys), 1 + n_bands)
    statistics.cleaned.update(+cleaned)
    return result


def _documents(
    record: bytes, line: int, format: str, options: PrepareOptions, vocab_size: int, counts: InputCounts, statistics: Statistics
) -> Sequence[Document | np.ndarray]:
    """What a record holds: one document or, of a text that is split at control tokens, several; token ids of a .bin file."""
    if format == "bin":
        ids = np.frombuffer(record, np.uint16)
        if ids.max() >= vocab_size:
            raise Rejected("no_such_token", f"token id {ids.max()} (the vocabulary has {vocab_size})")
        return [ids]
    if format == "txt":
        parsed, schema, dropped = parse_text(record), "text", frozenset()
    else:
        parsed, schema, dropped = parse_line(record, options.text_key, options.ignore_fields)
    statistics.schemas[schema] += 1
    counts.add_parsed(line, isinstance(parsed, Preference))
    if dropped:
        statistics.ignored_fields.update(dropped)
    if options.split_at_tokens and isinstance(parsed, str):
        documents = split_at_tokens(parsed, options.split_at_tokens)
        statistics.cleaned.update(["split_at_tokens"] * (len(documents) > 1))
        return documents or [""]  # which is rejected as empty
    return [parsed]


def _cleaned(
    document: Document | np.ndarray, cleaner: Cleaner, options: PrepareOptions
) -> tuple[Sequence[Document | np.ndarray], list[int], Set[str], str]:
    """(pieces, keys, rules that changed the document, its text)."""
    if isinstance(document, np.ndarray):
        return [document], [int.from_bytes(blake2b(document.tobytes(), digest_size=8).digest(), "little")], frozenset(), ""
    document, changed = cleaner.clean(document)
    text = duplicates.document_text(document)
    key = [duplicates.document_key(document)]
    if options.dedup == "near":
        key.extend(duplicates.band_keys(text, options.near_threshold).tolist())
    return cleaner.pieces(document), key, changed, text


def rejects_of(chunk: CleanChunk, codes: np.ndarray) -> list[dict]:
    """{"file", "line", "rule", "reason"} of a chunk's rejects and duplicates, in order. `codes` (n,): see `write_chunk`."""
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
