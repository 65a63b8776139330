"""Atomic writes of files and folders: complete or not there at all."""

import contextlib
import errno
import os
import shutil
from collections.abc import Generator
from pathlib import Path

from mateconv_jax import disk


@contextlib.contextmanager
def aside(path: Path, folder: bool = False, replace_folder: bool = False) -> Generator[Path]:
    """Write `path` atomically: the block writes to the yielded path, PATH.partial/NAME, which is renamed to `path` if the block
    succeeds. The next attempt removes what a killed process left in PATH.partial, but nothing else that may be there.

    Args:
      folder: create the yielded path as an empty folder.
      replace_folder: replace a non-empty folder at `path`, which otherwise is an error. A file is always replaced.

    Raises:
      OSError: the parent folder does not exist, a file cannot be written (by a library, too, see `disk.os_errors`), `path` is a
        non-empty folder and replace_folder is False, or PATH.partial was not left by this function.
    """
    partial = path.with_name(path.name + ".partial")
    written, replaced = partial / path.name, partial / "replaced"
    _check_ours(partial, {written.name, replaced.name})
    if replaced.exists() and not path.exists():  # killed between the two renames below
        replaced.rename(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        if folder:
            written.mkdir()
        with disk.os_errors(path):
            yield written
        if replace_folder and path.is_dir():
            path.rename(replaced)
        written.replace(path)
    finally:
        disk.remove(partial)


def _check_ours(partial: Path, names: set[str]) -> None:
    """Raises FileExistsError if `partial` exists and was not left by `aside`."""
    if partial.exists() and not (partial.is_dir() and names.issuperset(os.listdir(partial))):
        raise FileExistsError(errno.EEXIST, "In the way, and not left by an interrupted write; move it", os.fspath(partial))


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
