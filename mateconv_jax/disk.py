"""A full or read-only disk, as libraries report it: without the system's error number, or many times over."""

import contextlib
import errno
import functools
import logging
import os
import shutil
import sys
import time
from collections.abc import Generator
from pathlib import Path

from mateconv_jax.errors import UserError

CODES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)  # what only writing gives: they blame no file that is read
REMOVE_TRIES = 20
FULL_BYTES = 1 << 16  # with less left, a write that failed without a reason failed for lack of space


@contextlib.contextmanager
def os_errors(path: str | os.PathLike) -> Generator[None]:
    """Within the block, an error of such a disk leaves as an OSError with its number, the system's words and `path`.

    safetensors, tokenizers, torch, TensorStore and ArrayRecord have errors of their own, with the system's words in the text;
    torch and numpy sometimes say only how many bytes they could not write. An OSError that names a file stays as it is.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None or (code := code_of(error, path)) is None:
            raise
        raise OSError(code, os.strerror(code), os.fspath(path)) from error


def code_of(error: BaseException | None, path: str | os.PathLike) -> int | None:
    """The system's error number behind an error of writing to `path`; None if it is of another kind."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and (found.errno in CODES or found is error and found.errno is not None):
            return found.errno
        text = str(found)
        if code := next((code for code in CODES if os.strerror(code) in text), None):
            return code
        found = found.__cause__ or found.__context__
    gives_no_reason = isinstance(error, OSError) or type(error) is RuntimeError  # numpy and torch
    return errno.ENOSPC if gives_no_reason and _free_bytes(Path(path)) < FULL_BYTES else None


def _free_bytes(path: Path) -> float:
    """On the disk of `path`, which need not exist."""
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return float("inf")


def remove(folder: Path) -> None:
    """Delete a folder, if it can be, into which threads of a library may still write for a moment after they failed."""
    for _ in range(REMOVE_TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


@functools.cache
def quiet_orbax() -> None:
    """From now on Orbax says nothing of its own about a save that failed: the error that it raises is enough.

    It logs each failure from up to four threads with tracebacks, 950 lines for one full disk, and TensorStore then calls back
    into event loops that are gone.
    """
    logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())
    from absl import logging as absl_logging

    absl_logging.get_absl_logger().addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))
    shown = sys.unraisablehook

    def hook(unraisable) -> None:
        orphan = "orbax" in _file_of(unraisable.object) or "Event loop is closed" in str(unraisable.exc_value)
        if not orphan:
            shown(unraisable)

    sys.unraisablehook = hook


def _file_of(coroutine) -> str:
    code = getattr(coroutine, "cr_code", None)
    return code.co_filename if code else ""
