"""Progress through the input, on a terminal or in a log."""

import sys
import time

from tqdm import tqdm

from mateconv_jax.data.text.sources import Chunk, Source


class InputProgress:
    """A progress bar on a terminal, a line every ten seconds in a log."""

    def __init__(self, sources: list[Source]):
        sizes = [source.size for source in sources if source.size is not None]
        self._total = sum(sizes) if len(sizes) == len(sources) else None  # bytes
        self._positions: dict[str, int] = {}
        self._last_line = time.monotonic()

    def __enter__(self):
        self._bar = tqdm(
            total=self._total,
            unit="B",
            unit_scale=True,
            desc="tokenising",
            dynamic_ncols=True,
            mininterval=0.5,
            disable=not sys.stderr.isatty(),
        )
        return self

    def __exit__(self, *_):
        self._bar.close()

    def done(self, chunk: Chunk) -> None:
        """Count a finished chunk. Chunks may finish out of order."""
        advance = 0
        for part in chunk.parts:
            before = self._positions.get(part.source.path, 0)
            self._positions[part.source.path] = max(before, part.position)
            advance += self._positions[part.source.path] - before
        self._bar.update(advance)
        if self._bar.disable and time.monotonic() - self._last_line > 10:
            self._last_line = time.monotonic()
            total = "" if self._total is None else f" of {self._total / 1e6:,.0f}"
            print(
                f"tokenising: {sum(self._positions.values()) / 1e6:,.0f}{total} MB of input done", file=sys.stderr, flush=True
            )
