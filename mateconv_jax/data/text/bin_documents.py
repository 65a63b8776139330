"""The documents of MateConv's flat `.bin` files of token ids."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mateconv_jax.errors import UserError


def documents(
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
