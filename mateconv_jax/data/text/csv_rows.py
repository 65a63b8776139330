"""CSV and TSV files as lines of JSON, one a row: {column: text}.

A quote in a quoted field is doubled, and a backslash is a backslash (RFC 4180). In some files a backslash escapes: those that
write \\" for a quote, and MateConv's sft_data*.csv, where pandas' `escapechar` doubled every backslash. The header and the row
tell which it is, so that text with backslashes, such as LaTeX, stays as it is everywhere else.
"""

import csv
import re
from codecs import BOM_UTF8
from collections.abc import Iterator

import orjson

MATECONV_COLUMNS = {"history", "q", "a"}
Line = tuple[bytes, int]  # without its line feed, and its bytes; empty where it is longer than a row may be


class _TooLong(Exception):
    pass


class _Lines:
    """A file's lines for csv.reader, which takes as many as a row has. They can be taken again, until `forget`.

    Attributes:
      first: number of the row's first line, from 1.
      taken: lines of the row so far.
    """

    def __init__(self, lines: Iterator[Line], longest: int):
        self.first = 1
        self.taken = 0
        self._lines = lines
        self._longest = longest
        self._held: list[tuple[str, int]] = []  # (line, bytes) from `first` on
        self._bytes = 0  # of the lines taken

    def __iter__(self):
        return self

    def __next__(self) -> str:
        if self.taken == len(self._held):
            line, size = next(self._lines)
            if self.first == 1 and not self._held:
                line = line.removeprefix(BOM_UTF8)  # Excel writes one
            self._held.append((line.decode(errors="surrogateescape") + "\n", size + 1))
        line, size = self._held[self.taken]
        self.taken += 1
        self._bytes += size
        if self._bytes > self._longest:
            raise _TooLong
        return line

    def text(self) -> str:
        """The row, as far as it was taken."""
        return "".join(line for line, _ in self._held[: self.taken])

    def rewind(self, taken: int = 0) -> None:
        self.taken = taken
        self._bytes = sum(size for _, size in self._held[:taken])

    def forget(self) -> None:
        """The next row begins behind the lines that were taken."""
        self.first += self.taken
        del self._held[: self.taken]
        self.rewind()


class _Reader:
    """Rows of a file, each read in one of two ways: backslashes are text, or they escape.

    Raises:
      csv.Error: a row is malformed.
    """

    def __init__(self, lines: _Lines, delimiter: str):
        self._lines = lines
        # Group 1: what a backslash escapes. One that escapes nothing is text too, though pandas and csv.reader drop it.
        self._backslash = re.compile(rf'(\\[\\"{delimiter}])|\\')
        self._as_text = csv.reader(lines, delimiter=delimiter, strict=True)
        self._as_escape = csv.reader(map(self._double_lone, lines), delimiter=delimiter, escapechar="\\", strict=True)

    def header(self) -> list[str]:
        return next(self._as_text)

    def row(self, n_columns: int, doubled: bool) -> list[str]:
        """The next row. `doubled`: the file's writer doubled every backslash; a row with a lone one is not by it."""
        first, other = (self._as_escape, self._as_text) if doubled else (self._as_text, self._as_escape)
        error, row = None, []
        try:
            row = next(first)
        except csv.Error as caught:
            error = caught
        if "\\" not in (text := self._lines.text()):
            other = None  # both ways are one
        fits = not error and len(row) == n_columns
        if other and not (fits and not (doubled and self._has_lone(text))):
            taken = self._lines.taken
            self._lines.rewind()
            try:
                if len(second := next(other)) == n_columns:
                    return second
            except (csv.Error, _TooLong):
                pass
            self._lines.rewind(taken)
        if error:
            raise error
        return row

    def _has_lone(self, text: str) -> bool:
        return any(not found[1] for found in self._backslash.finditer(text))

    def _double_lone(self, line: str) -> str:
        return self._backslash.sub(lambda found: found[0] if found[1] else r"\\", line) if "\\" in line else line


def rows(lines: Iterator[Line], delimiter: str, longest: int) -> Iterator[tuple[int, bytes | tuple[str, str]]]:
    """(number of its first line, row as JSON) or (number, (rule, reason)). Blank lines between rows are nothing.

    Args:
      longest: bytes of a row.
    """
    csv.field_size_limit(2**31 - 1)  # process-wide; `longest` is below it
    source = _Lines(lines, longest)
    reader = _Reader(source, delimiter)
    header: list[str] = []
    while True:
        source.forget()
        try:
            row = reader.row(len(header), set(header) == MATECONV_COLUMNS) if header else reader.header()
        except StopIteration:
            return
        except (csv.Error, _TooLong) as error:
            rule, reason = _reject(error, source, longest)
            if header:
                yield source.first, (rule, reason)
                continue
            yield source.first, ("broken_file", f"the row of column names is {reason}")
            return
        if not source.text().strip():
            continue
        elif not header:
            header = row
            if twice := {name for name in header if name and header.count(name) > 1}:
                yield source.first, ("broken_file", f"two columns are named {min(twice)!r}")
                return
        elif len(row) != len(header):
            names = ", ".join(header)
            yield source.first, ("bad_row", f"{len(row)} columns (expected {len(header)}: {names:.80})")
        else:
            try:
                yield source.first, orjson.dumps(dict(zip(header, row, strict=True)))
            except orjson.JSONEncodeError:  # what surrogateescape made of other bytes
                yield source.first, ("invalid_utf8", "not UTF-8")


def _reject(error: csv.Error | _TooLong, source: _Lines, longest: int) -> tuple[str, str]:
    if isinstance(error, _TooLong):
        hint = f" (is the quote in line {source.first:,} ever closed?)" if source.taken > 1 else ""
        return "line_too_long", f"a row of more than {longest:,} bytes{hint}"
    if "unexpected end" in str(error):
        return "broken_file", "a quoted field has no end"
    reason = "a carriage return outside quotes" if "new-line" in str(error) else error
    return "bad_row", f"not CSV ({reason})"
