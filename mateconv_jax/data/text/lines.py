"""Lines and text documents out of blocks of bytes, however the blocks are cut."""

from collections.abc import Iterator

TXT_DOCUMENTS = ("line", "blank_line", "file")  # what ends a document of a .txt file

Record = bytes | tuple[str, str]  # what was read, or (rule, reason) of its reject


def too_long(size: int, longest: int) -> tuple[str, str]:
    return "line_too_long", f"a record of {size:,} bytes (at most {longest:,})"


def lines(blocks: Iterator[bytes], longest: int) -> Iterator[tuple[bytes, int]]:
    """(line, its bytes). A line above `longest` comes empty with its true size: it is never held."""
    parts, size = [], 0
    for block in blocks:
        for i, part in enumerate(block.split(b"\n")):
            if i:  # a line ended before this part
                yield b"".join(parts), size
                parts, size = [], 0
            size += len(part)
            parts.append(part)
            if size > longest:
                parts.clear()
    if size:
        yield b"".join(parts), size


def line_records(blocks: Iterator[bytes], longest: int) -> Iterator[tuple[int, Record]]:
    """(number from 1, line) of the lines that are not blank."""
    for number, (line, size) in enumerate(lines(blocks, longest), 1):
        if size > longest:
            yield number, too_long(size, longest)
        elif line.strip():
            yield number, line


def text_records(blocks: Iterator[bytes], document: str, longest: int) -> Iterator[tuple[int, Record]]:
    """(number of its first line, document): a block between blank lines or the whole file, as `document` says."""
    start, held, size = 0, [], 0

    def record():
        return start, too_long(size, longest) if size > longest else b"\n".join(held)

    for number, (line, line_size) in enumerate(lines(blocks, longest), 1):
        blank = line_size <= longest and not line.strip()
        if start and blank and document == "blank_line":
            yield record()
            start, held, size = 0, [], 0
        elif start or not blank:
            start = start or number
            held.append(line)
            size += line_size
            if size > longest:
                held.clear()  # will be rejected: only its size is counted on
    if start:
        yield record()
