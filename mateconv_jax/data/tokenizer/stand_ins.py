"""Private characters that stand for the characters of a text while a template works on it, so that each can be found again."""

import functools
import re
from typing import NamedTuple

from mateconv_jax.common_prefix import common_prefix

FIRST, LAST = 0xF0000, 0x10FFFF  # the private planes: nobody's text or template holds them, and if so they are replaced as well
N_STAND_INS = LAST - FIRST + 1
STAND_INS = re.compile("[\U000f0000-\U0010ffff]+")


class TooLong(ValueError):
    """More characters than there are stand-ins."""


class NotAStandIn(ValueError):
    """A private character that stands for nothing."""


class Run(NamedTuple):
    """A stretch of a rendering whose characters stand next to each other in one text of the dialogue.

    Attributes:
      start, end: where it is in the rendering.
      first: number of the first stand-in. They are numbered in the order of the dialogue.
      owner: the text that it comes from, as given to `replace`.
    """

    start: int
    end: int
    first: int
    owner: tuple

    @property
    def after(self) -> int:
        """Number behind the last stand-in. Equal in two renderings that write the same character last."""
        return self.first + self.end - self.start


class StandIns:
    """Replaces characters of texts and, after a template has moved the texts about, restores them and says whose they are."""

    def __init__(self):
        self._sources: list[str] = []
        self._owner_of: list[tuple | None] = []  # of each number; None between two texts

    def __len__(self) -> int:
        return len(self._owner_of)

    def replace(self, pieces: list[str], which: int, owner: tuple) -> str:
        """The pieces joined, with every second one, from index `which`, replaced by as many stand-ins.

        Raises:
          TooLong: they are used up.
        """
        for i in range(which, len(pieces), 2):
            if source := pieces[i]:
                first = len(self._owner_of)
                if first + len(source) >= N_STAND_INS:
                    raise TooLong
                pieces[i] = _all_stand_ins()[first : first + len(source)]
                self._sources.append(source)
                self._owner_of += [owner] * len(source)
        self._sources.append("\0")  # a number that is not used: a run never reaches into the next text
        self._owner_of.append(None)
        return "".join(pieces)

    def restore(self, rendered: str) -> tuple[str, list[Run]]:
        """The text with the characters back, as long as `rendered`, and the runs in it, in order.

        Raises:
          NotAStandIn: it holds a private character that stands for nothing.
        """
        sources = "".join(self._sources)
        runs: list[Run] = []
        pieces, end = [], 0
        for found in STAND_INS.finditer(rendered):
            pieces.append(rendered[end : found.start()])
            end = found.end()
            for run in self._consecutive(found[0], found.start()):
                pieces.append(sources[run.first : run.after])
                runs.append(run)
        return "".join([*pieces, rendered[end:]]), runs

    def _consecutive(self, stand_ins: str, start: int) -> list[Run]:
        runs, i = [], 0
        while i < len(stand_ins):
            first = ord(stand_ins[i]) - FIRST
            if first >= len(self) or (owner := self._owner_of[first]) is None:
                raise NotAStandIn(f"U+{FIRST + first:X}")
            expected = _all_stand_ins()[first : first + len(stand_ins) - i]
            n = len(expected) if stand_ins.startswith(expected, i) else common_prefix(expected, stand_ins[i:])
            runs.append(Run(start + i, start + i + n, first, owner))
            i += n
        return runs


@functools.cache
def _all_stand_ins() -> str:
    return "".join(map(chr, range(FIRST, LAST + 1)))
