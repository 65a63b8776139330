"""The folder that `prepare` works in, OUTPUT.partial: one run at a time, one set of options, no foreign files.

options.json    what the chunks are made from, see build/identity.py
lock, workers   locked by the run, and by each of its workers
tokenizer, sample.json, chunks, beam, dataset, replaced
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import BinaryIO

from mateconv_jax import files
from mateconv_jax.data import dataset
from mateconv_jax.data.build import identity
from mateconv_jax.data.text.sources import Source
from mateconv_jax.errors import UserError, check_name

NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
LOCK_SECONDS = 10.0  # a killed run keeps its lock until the system has freed its memory: seconds for some GB
_OURS = {"options.json", "lock", "workers", "tokenizer", "sample.json", "chunks", "beam", "dataset", "replaced"}
_OURS |= {f"{name}.partial" for name in _OURS}


def path_for(output: Path) -> Path:
    """Where the dataset at `output` is made.

    Raises:
      UserError: `output` has no name, such as `.`, or one that is not UTF-8.
    """
    check_name(output, "--output")
    if output.name in ("", ".."):
        raise UserError(f"--output: {str(output)!r} does not name a folder (expected a name, as data/zh)")
    return output.with_name(output.name + ".partial")


def check_replaceable(output: Path, sources: list[Source]) -> None:
    """Raises UserError unless `output` does not exist, is empty, or is a dataset without foreign files or inputs in it."""
    if not output.exists() or output.is_dir() and not any(output.iterdir()):
        return
    if not (output / "metadata.json").is_file() or not (output / "dataset_info.json").is_file():
        raise UserError(f"--output: {str(output)!r} is not a dataset and is not replaced (choose another folder)")
    if foreign := dataset.foreign_files(output):
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise UserError(
            f"--output: {str(output)!r} holds {foreign[0]!r}{more}, not part of a dataset, and is not replaced "
            "(move it, or choose another folder)"
        )
    check_outside(sources, output)


def check_outside(sources: list[Source], folder: Path) -> None:
    """Raises UserError if an input lies in a folder that will be replaced or removed."""
    real = folder.resolve()
    for source in sources:
        if source.size is not None and real in Path(source.path).resolve().parents:
            raise UserError(
                f"--input: {source.path!r} is in {str(folder)!r}, which would be replaced (move it, or choose another --output)"
            )


@contextlib.contextmanager
def opened(folder: Path, options: dict, overwrite: bool) -> Generator[Path]:
    """Create and lock the work folder, and check that its content was made with the same options.

    Raises:
      UserError: another run is writing there; its content was made with other options and overwrite is False; it holds foreign
        files.
    """
    _check_ours(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("wb") as lock:
        _wait_for(lock, folder)
        there = folder / "options.json"
        if there.exists():
            theirs = json.loads(there.read_text(encoding="utf-8"))
            if overwrite and not identity.same_input(theirs, options):
                _clear(folder, but={"lock", "workers"})
            try:
                identity.check_options(theirs, options, f"{str(folder)!r} was begun")
            except UserError:
                if not overwrite:
                    raise
                _clear(folder, but={"lock", "workers"})
        files.write_text(there, json.dumps(options, ensure_ascii=False))
        (folder / "chunks").mkdir(exist_ok=True)
        yield folder


def remove(folder: Path) -> None:
    """Delete a work folder, if it exists.

    Raises:
      UserError: another run is writing there, or it holds foreign files.
    """
    if not folder.exists():
        return
    _check_ours(folder)
    with (folder / "lock").open("wb") as lock:
        _wait_for(lock, folder)
        _clear(folder, but=set())
    with contextlib.suppress(OSError):  # a foreign file was put there meanwhile
        folder.rmdir()


def restore_replaced(output: Path) -> None:
    """Restore the dataset that a killed run had moved away but not yet replaced."""
    replaced = path_for(output) / "replaced"
    if replaced.is_dir() and not output.exists():
        replaced.rename(output)


def hold_for_worker(folder: Path) -> BinaryIO:
    """A lock that a worker holds until it dies, so that no later run starts while it still writes."""
    file = (folder / "workers").open("wb")
    _lock(file, fcntl.LOCK_SH)
    return file


def _lock(file: BinaryIO, how: int) -> bool:
    """Lock an open file, unless another process holds it. Returns whether the disk has locks, as some network disks have not.

    Raises:
      BlockingIOError: another process holds it.
    """
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def _wait_for(lock: BinaryIO, folder: Path) -> None:
    """Take the lock, and wait for the workers of an earlier run to end."""
    with (folder / "workers").open("wb") as workers:
        deadline = time.monotonic() + LOCK_SECONDS
        for file in (lock, workers):
            while True:
                try:
                    if not _lock(file, fcntl.LOCK_EX) and file is lock:
                        print(f"--output: no file locks on the disk of {str(folder)!r}: start no second run", file=sys.stderr)
                    break
                except BlockingIOError as error:
                    if time.monotonic() > deadline:
                        raise UserError(
                            f"--output: another run is writing {str(folder)!r} (wait for it, or choose another folder)"
                        ) from error
                    time.sleep(0.1)


def _check_ours(folder: Path) -> None:
    if folder.exists() and (foreign := sorted(set(os.listdir(folder)) - _OURS if folder.is_dir() else [folder.name])):
        raise UserError(
            f"--output: the work folder {str(folder)!r} holds a foreign file, {foreign[0]!r} (move it, or choose another "
            "--output)"
        )


def _clear(folder: Path, but: set[str]) -> None:
    for name in _OURS - but:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
