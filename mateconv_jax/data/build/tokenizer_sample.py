"""Train a dataset's tokenizer on a sample of its input."""

import dataclasses
import heapq
import itertools
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from mateconv_jax import files
from mateconv_jax.data.build import chunk_reader, identity
from mateconv_jax.data.build.options import PrepareOptions
from mateconv_jax.data.build.unreadable import UnreadableInputs
from mateconv_jax.data.dialogue import Dialogue, Preference
from mateconv_jax.data.text.dialogue import other_texts
from mateconv_jax.data.text.sources import Chunk, Part, Source
from mateconv_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class TokenizerTraining:
    """How to train a tokenizer on a sample of the input; see data/tokenizer/bpe.py."""

    vocab_size: int = 6400
    split_digits: bool = False
    sample_mb: float = 32.0  # of text; doubling it improved compression by only 0.03 %


def train(training: TokenizerTraining, options: PrepareOptions, folder: Path, chunks: Iterator[Chunk], read_again):
    """Train a tokenizer, or load the one an earlier run trained on the same input.

    Args:
      folder: the work folder.
      chunks: of the input, from the start.
      read_again: yields the chunks from the start once more; None if the input can be read only once (standard input).

    Returns:
      The tokenizer, and an iterator over all chunks.

    Raises:
      UserError: the earlier run trained its tokenizer on other text.
    """
    from mateconv_jax.data.tokenizer import bpe, tokenizer as tokenizer_lib

    described = json.loads((folder / "options.json").read_text(encoding="utf-8"))
    record = folder / "sample.json"  # what the tokenizer was trained on
    before = json.loads(record.read_text(encoding="utf-8")) if (folder / "tokenizer").exists() else None
    if before and identity.same_input(before, described):
        return tokenizer_lib.load(folder / "tokenizer", "--output"), chunks
    max_bytes = int(training.sample_mb * 1e6)
    if read_again is None:  # sample the beginning
        head, size = [], 0
        for chunk in chunks:
            head.append(chunk)
            size += sum(len(record) for part in chunk.parts for _, record in part.records)
            if size >= max_bytes:
                break
        sampled, chunks = head, itertools.chain(head, chunks)
    else:
        sampled, chunks = list(sample(chunks, max_bytes)), read_again()
    now = {"input": described["input"], "digest": identity.input_digest(map(chunk_reader.digest, sampled))}
    if before:
        if before["digest"] != now["digest"]:
            raise UserError("--input: the content has changed since a tokenizer was trained on it (--overwrite starts over)")
        return tokenizer_lib.load(folder / "tokenizer", "--output"), chunks
    trained = bpe.train(clean_texts(sampled, options), training.vocab_size, split_digits=training.split_digits)
    files.write_text(record, json.dumps(now))
    save(trained, folder / "tokenizer")
    return trained, chunks


def sample(chunks: Iterable[Chunk], max_bytes: int, seed: int = 0) -> Iterator[Chunk]:
    """Draw records uniformly from a stream of unknown length, at most max_bytes in total, in their original order. A stream
    that is no larger is returned whole. Only the sample is held in memory.

    Reservoir sampling with a bound in bytes (after Vitter, 1985): each record draws a random number; the smallest are kept.
    """
    rng = random.Random(seed)
    kept: list[tuple[float, int, Source, tuple[int, bytes]]] = []  # a heap with the largest number on top
    size, limit, position = 0, 1.0, 0
    for part in itertools.chain.from_iterable(chunk.parts for chunk in chunks):
        for record in part.records:
            position += 1
            if (number := rng.random()) >= limit or len(record[1]) > max_bytes:
                continue
            heapq.heappush(kept, (-number, position, part.source, record))
            size += len(record[1])
            while size > max_bytes:
                negative, _, _, dropped = heapq.heappop(kept)
                size -= len(dropped[1])
                limit = -negative
    kept.sort(key=lambda entry: entry[1])
    for start in range(0, len(kept), 1000):
        by_source = itertools.groupby(kept[start : start + 1000], key=lambda entry: entry[2])
        yield Chunk("", [Part(source, [record for *_, record in entries]) for source, entries in by_source])


def clean_texts(chunks: Iterable[Chunk], options: PrepareOptions, unreadable: UnreadableInputs | None = None) -> Iterator[str]:
    """Yield the texts to train a tokenizer on. Each turn of a dialogue is a text, written as in the chat template.

    Raises:
      UserError: an input is mostly unusable. Only checked if `unreadable` is given.
    """
    from mateconv_jax.data.tokenizer.tokenizer import SPECIAL_TOKENS

    for chunk in chunks:
        cleaned = chunk_reader.read_chunk(chunk, options, tuple(SPECIAL_TOKENS.values()), 0)
        if unreadable:
            unreadable.begin(counts.path for counts in cleaned.inputs)
            unreadable.done(cleaned.inputs)
        for document in cleaned.documents:
            for piece in document:
                if isinstance(piece, str):
                    yield piece
                elif isinstance(piece, Dialogue):
                    yield from _turns(piece)
                elif isinstance(piece, Preference):
                    yield from _turns(piece.chosen)
                    yield from _turns(dataclasses.replace(piece.rejected, messages=piece.rejected.messages[piece.n_prompt :]))
    if unreadable:
        unreadable.finish()


def _turns(dialogue: Dialogue) -> Iterator[str]:
    yield from (f"{message['role']}\n{message['content']}" for message in dialogue.messages)
    yield from other_texts(dialogue)


def save(tokenizer, folder: Path) -> None:
    with files.aside(folder, folder=True) as written:
        tokenizer.save_pretrained(written)
