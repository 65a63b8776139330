"""Atomic writes of files and folders: complete or not there at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def aside(path: Path, folder: bool = False, replace_folder: bool = False) -> Iterator[Path]:
    """Where to write what will be at `path`: PATH.partial/NAME, which takes its place when the block ends without an error.

    What a killed process left in PATH.partial is removed at the next try.

    Args:
      folder: an empty folder is made there; otherwise nothing is.
      replace_folder: a folder at `path` is replaced; otherwise it is an error. A file is always replaced.

    Raises:
      OSError: there is no folder for it, a file cannot be written, or `path` is a folder with something in it.
    """
    partial = path.with_name(path.name + ".partial")
    written, replaced = partial / path.name, partial / "replaced"
    if replaced.exists() and not path.exists():  # killed between the two renames below
        replaced.rename(path)
    _remove(partial)
    partial.mkdir()
    try:
        if folder:
            written.mkdir()
        yield written
        if replace_folder and path.is_dir():
            path.rename(replaced)
        written.replace(path)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    """A folder, or the file that earlier versions wrote aside."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with aside(path) as written:
        written.write_text(text, encoding="utf-8")


def link(path: Path, target: Path) -> None:
    """Hard-link `path` as `target`, replacing it; copy if the file system has no hard links."""
    with aside(target) as written:
        try:
            os.link(path, written)
        except OSError:
            shutil.copyfile(path, written)
