"""Files that are whole or not there."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


def write_text(path: Path, text: str) -> None:
    """UTF-8, written aside and renamed."""
    with aside(path) as file:
        file.write(text)


@contextlib.contextmanager
def aside(path: Path) -> Iterator[TextIO]:
    """A UTF-8 text file that takes its name when the block ends without an error."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        yield file
    partial.rename(path)


def link(path: Path, target: Path) -> None:
    """The same file under another name, in place of what was there; a copy where the file system has no hard links."""
    partial = target.with_name(target.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(path, partial)
    except OSError:
        shutil.copyfile(path, partial)
    partial.rename(target)
