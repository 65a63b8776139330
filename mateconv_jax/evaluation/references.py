"""What unigrams, compressors and n-grams make of a text: reference points for a model's bits per byte.

All are bits per byte of the held-out text in UTF-8. A document costs the bits of its content and its end, as it does a model:
the end is one more symbol, U+0000, which no document holds.
"""

import concurrent.futures
import lzma
import zlib
from collections.abc import Sequence

import numpy as np

from mateconv_jax import cores
from mateconv_jax.evaluation.comparison import EVERYTHING
from mateconv_jax.evaluation.documents import Document, grouped, read, texts_of
from mateconv_jax.evaluation.ngram import END, CharacterNgrams

ORDER = 5
MAX_BYTES = 32_000_000  # of training text: of so much the n-gram model takes about 40 s of one core and 2 GB
XZ_BYTES = 6_000_000  # of that: xz looks back 8 MB, and reads 2 MB/s


def bits_per_byte(paths: list[str], documents: Sequence[Document], reading: dict) -> dict:
    """The reference points of held-out documents.

    Args:
      paths: training text, see `documents.read`.
      documents: texts, in which a group is a name other than EVERYTHING.
      reading: how raw files are read, as in `documents.read`.

    Returns:
      {"data": paths, "documents", "bytes": how much of the training text was used, "known": how many of the held-out documents
      are among it, "bits_per_byte": {name: {group: value}}}, with EVERYTHING among the groups; a value may be None.

    Raises:
      UserError: no such training text, or dialogues.
    """
    texts = texts_of(documents, "--reference: the data hold dialogues (expected texts: of a dialogue only answers are scored)")
    training, _ = read(paths, "--reference", "train", reading, max_bytes=MAX_BYTES)
    training_texts = texts_of(training, f"--reference: {' '.join(paths)!r} holds dialogues (expected texts)")
    known = set(training_texts)
    groups = grouped(documents)
    n_bytes = {name: sum(len(texts[i].encode()) for i in members) for name, members in groups.items()}
    by_document = {
        "byte unigram": _byte_unigram(training_texts, texts),
        "char unigram": CharacterNgrams(training_texts, 1).bits(texts),
        f"char {ORDER}-gram": CharacterNgrams(training_texts, ORDER).bits(texts),
    }
    bits = {name: {group: bits[members].sum() for group, members in groups.items()} for name, bits in by_document.items()}
    bits |= _compressed(training_texts, texts, groups)
    return {
        "data": paths,
        "documents": len(training),
        "bytes": sum(len(text.encode()) for text in training_texts),
        "known": sum(text in known for text in texts),
        "bits_per_byte": {name: {g: float(x) / n_bytes[g] for g, x in found.items()} for name, found in bits.items()},
    }


def _byte_unigram(training: Sequence[str], texts: Sequence[str]) -> np.ndarray:
    """(texts,) bits under the frequencies of the 256 bytes, each counted once more than it occurs."""
    counts = 1 + np.bincount(np.frombuffer(_joined(training), np.uint8), minlength=256)
    bits = -np.log2(counts / counts.sum())
    stream = np.frombuffer(_joined(texts), np.uint8)
    ends = np.flatnonzero(stream == 0)
    return np.diff(np.cumsum(bits[stream])[ends], prepend=0.0)


def _compressed(training: Sequence[str], texts: Sequence[str], groups: dict[str, np.ndarray]) -> dict[str, dict[str, int]]:
    """{name: {group: bits}} of each group as one file: by gzip -9, by xz, and what it adds to xz of training text before it.

    Compressors learn from the file itself, so a group's documents help each other.
    """
    step = max(1, sum(map(len, training)) * 3 // XZ_BYTES)
    before = _joined(training[::step])
    parts = {name: _joined([texts[i] for i in members]) for name, members in groups.items()}
    with concurrent.futures.ThreadPoolExecutor(cores.usable()) as pool:
        primed = pool.submit(_xz, before + parts[EVERYTHING]), pool.submit(_xz, before)
        xz = dict(zip(parts, pool.map(_xz, parts.values()), strict=True))
        gzip = dict(zip(parts, pool.map(_gzip, parts.values()), strict=True))
        added = primed[0].result() - primed[1].result()
    return {"gzip": gzip, "xz": xz, "xz after training text": {EVERYTHING: added}}


def _joined(texts: Sequence[str]) -> bytes:
    return "".join(text + END for text in texts).encode()


def _gzip(data: bytes) -> int:
    return 8 * len(zlib.compress(data, 9, wbits=31))


def _xz(data: bytes) -> int:
    return 8 * len(lzma.compress(data))
