"""Training a dataset's tokenizer on a sample of its input."""

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
from mateconv_jax.data.dialogue import Dialogue
from mateconv_jax.data.text.dialogue import other_texts
from mateconv_jax.data.text.sources import Chunk, Part, Source
from mateconv_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class TokenizerTraining:
    """A tokenizer to train on a sample of the input; see tokenizer.train."""

    vocab_size: int = 6400
    split_digits: bool = False
    sample_mb: float = 32.0  # of text; twice as much gained 0.03 % compression


def train(training: TokenizerTraining, options: PrepareOptions, folder: Path, chunks: Iterator[Chunk], read_again):
    """The tokenizer, and the chunks that are still to be read. `read_again` is None where the input can be read only once.

    Raises:
      UserError: a tokenizer is there that was trained on other text.
    """
    from mateconv_jax.data.tokenizer import bpe, tokenizer as tokenizer_lib

    described = json.loads((folder / "options.json").read_text(encoding="utf-8"))
    record = folder / "sample.json"  # what the tokenizer was trained on
    before = json.loads(record.read_text(encoding="utf-8")) if (folder / "tokenizer").exists() else None
    if before and identity.same_input(before, described):
        return tokenizer_lib.load(folder / "tokenizer", "--output"), chunks
    max_bytes = int(training.sample_mb * 1e6)
    if read_again is None:  # the sample is the input's beginning
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
            raise UserError("--input: the content has changed since a tokenizer was trained on it (--overwrite begins again)")
        return tokenizer_lib.load(folder / "tokenizer", "--output"), chunks
    trained = bpe.train(clean_texts(sampled, options), training.vocab_size, split_digits=training.split_digits)
    files.write_text(record, json.dumps(now))
    save(trained, folder / "tokenizer")
    return trained, chunks


def sample(chunks: Iterable[Chunk], max_bytes: int, seed: int = 0) -> Iterator[Chunk]:
    """Records that are together at most max_bytes, drawn uniformly from a stream of unknown length that is not held; all of
    them where they are no more. They come in their order.

    Each record draws a number, and those with the smallest are kept (a reservoir; Vitter, 1985, with a bound in bytes).
    """
    rng = random.Random(seed)
    kept: list[tuple[float, int, Source, tuple[int, bytes]]] = []  # a heap, the largest number first
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
    """Texts for a tokenizer to learn from; of a dialogue, each turn as the chat template writes it.

    Raises:
      UserError: an input is mostly unusable, if `unreadable` is to notice.
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
                    yield from (f"{message['role']}\n{message['content']}" for message in piece.messages)
                    yield from other_texts(piece)
    if unreadable:
        unreadable.finish()


def save(tokenizer, folder: Path) -> None:
    with files.aside(folder, folder=True) as written:
        tokenizer.save_pretrained(written)
