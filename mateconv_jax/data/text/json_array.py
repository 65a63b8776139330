"""A file that is one JSON array, as alpaca_data.json: its elements one by one, without holding the file."""

import itertools
import re
from codecs import BOM_UTF8
from collections.abc import Iterator

from mateconv_jax.data.text.lines import Record, too_long

_LONGEST_BLANK = 1 << 16  # bytes before the first character
_NOT_BLANK = re.compile(rb"\S")
_STRUCTURE = re.compile(rb'["\[\]{},]')
_IN_STRING = re.compile(rb'["\\]')


def is_array(blocks: Iterator[bytes]) -> tuple[bool, Iterator[bytes]]:
    """Whether the first character that is no white space is `[`; and all blocks again, of an array without byte order mark."""
    head = b""
    for block in blocks:
        head += block
        if BOM_UTF8.startswith(head):  # perhaps cut in two
            continue
        if found := _NOT_BLANK.search(head, len(BOM_UTF8) if head.startswith(BOM_UTF8) else 0):
            if found[0] == b"[":
                return True, itertools.chain([head[found.start() :]], blocks)
            break
        if len(head) > _LONGEST_BLANK:
            break
    return False, itertools.chain([head], blocks)


def elements(blocks: Iterator[bytes], longest: int) -> Iterator[tuple[int, Record]]:
    """(its number from 1, element as it is written). One above `longest` bytes is rejected and never held.

    Elements are cut at commas outside of strings and brackets; whether each is JSON is for its reader to find out.
    """
    scanner = _Scanner(longest)
    for block in blocks:
        yield from scanner.scan(block)
        if scanner.broken:
            return
    if scanner.depth:
        yield scanner.number + 1, ("broken_file", "the JSON array has no end")


class _Scanner:
    """Where in the array the last block ended.

    Attributes:
      number: of the last complete element.
      depth: brackets that are open: 0 outside of the array, 1 between its elements.
      broken: something follows the array.
    """

    def __init__(self, longest: int):
        self.number = 0
        self.depth = 0
        self.broken = False
        self._longest = longest
        self._in_string = False
        self._escaped = False  # the last block ended with a backslash
        self._parts: list[bytes] = []  # of the element
        self._size = 0

    def scan(self, block: bytes) -> Iterator[tuple[int, Record]]:
        position = start = 0  # start: of the element, or of its part in this block
        while position < len(block):
            if self._in_string:
                position = self._end_of_string(block, position)
                continue
            if not self.depth:
                if not (found := _NOT_BLANK.search(block, position)):
                    return
                if found[0] != b"[":
                    self.broken = True
                    yield self.number + 1, ("broken_file", "something follows the JSON array")
                    return
            elif not (found := _STRUCTURE.search(block, position)):
                break
            position, character = found.end(), found[0]
            if character == b'"':
                self._in_string = True
            elif character in b"[{":
                self.depth += 1
                start = position if self.depth == 1 else start
            elif character == b"," and self.depth == 1:
                self._add(block[start : position - 1])
                yield self._element()
                start = position
            elif character in b"]}":
                self.depth -= 1
                if not self.depth:
                    self._add(block[start : position - 1])
                    if self._size > self._longest or b"".join(self._parts).strip():  # not an empty array, or a comma before ]
                        yield self._element()
                    self._parts, self._size = [], 0
        if self.depth:
            self._add(block[start:])

    def _end_of_string(self, block: bytes, position: int) -> int:
        """Where the string ends, or the block."""
        if self._escaped:
            self._escaped = False
            position += 1
        while found := _IN_STRING.search(block, position):
            if found[0] == b'"':
                self._in_string = False
                return found.end()
            position = found.end() + 1
            if position > len(block):
                self._escaped = True
                break
        return len(block)

    def _add(self, part: bytes) -> None:
        self._size += len(part)
        self._parts.append(part)
        if self._size > self._longest:
            self._parts.clear()

    def _element(self) -> tuple[int, Record]:
        self.number += 1
        size, element = self._size, b"".join(self._parts).strip()
        self._parts, self._size = [], 0
        return self.number, too_long(size, self._longest) if size > self._longest else element
