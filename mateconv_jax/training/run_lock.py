"""One training process at a time writes to a run folder: RUN/.lock, which the system unlocks when its holder dies.

Where a disk has no locks, as some network disks, the holder writes to the file every few seconds instead.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Generator
from pathlib import Path

import jax
from absl import logging

from mateconv_jax.errors import UserError, check_name
from mateconv_jax.runtime import agreement, distributed

NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
DYING_SECONDS = 30.0  # a killed process holds its lock until the system has taken its memory back
BEAT_SECONDS = 10.0
DEAD_SECONDS = 60.0  # without a heartbeat


@contextlib.contextmanager
def held(folder: Path) -> Generator[None]:
    """Make a run folder and hold its lock. A folder that is new and that the block leaves empty is removed again.

    In a run of several processes the first holds the lock; all of them see whether they can write there.

    Raises:
      UserError: another process writes there, and the message says which, and since when; or the folder cannot be written to.
    """
    check_name(folder, "training.out_dir")
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{jax.process_index()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        full = " (free some space)" if error.errno == errno.ENOSPC else ""
        raise UserError(f"training.out_dir: cannot write to {str(folder)!r}: {error.strerror}{full}") from error
    try:
        with _locked(folder / ".lock") if distributed.is_first() else contextlib.nullcontext():
            agreement.gather("run folder held")  # nobody touches it before
            yield
    finally:
        with contextlib.suppress(OSError):  # not empty
            for path in missing:
                path.rmdir()


@contextlib.contextmanager
def _locked(path: Path) -> Generator[None]:
    file = _open(path)
    try:
        stop = _hold(file, path)
        try:
            yield
        finally:
            stop.set()
            path.unlink(missing_ok=True)  # still locked: whoever waits for this file notices that it is gone
    finally:
        os.close(file)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _hold(file: int, path: Path) -> threading.Event:
    """Take the lock of an open file; the event ends the heartbeat, if there is one."""
    stop = threading.Event()
    deadline = time.monotonic() + DYING_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            owner = _owner(path)
            if _is_alive(owner) or time.monotonic() > deadline:
                raise _refused(path, owner) from error
            time.sleep(0.2)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            _check_heartbeat(path)
            logging.warning("%s: this disk has no file locks; a heartbeat every %d s stands in", path, BEAT_SECONDS)
            threading.Thread(target=_beat, args=(path, stop), daemon=True).start()
            break
    if not path.exists() or os.fstat(file).st_ino != path.stat().st_ino:  # its last holder has removed it meanwhile
        os.dup2(replacement := _open(path), file, inheritable=False)
        os.close(replacement)
        return _hold(file, path)
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(owner).encode(), 0)
    return stop


def _owner(path: Path) -> dict:
    """What the holder wrote; nothing if it had no time to."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        return owner if isinstance(owner, dict) else {}
    except (OSError, ValueError):
        return {}


def _is_alive(owner: dict) -> bool:
    """Whether the holder is known to be running. A killed one has SIGKILL pending, or no command line."""
    if owner.get("host") != socket.gethostname():
        return False
    if not Path("/proc/self").exists():  # macOS, where a killed process is gone once its parent has noticed
        return _takes_signals(owner.get("pid"))
    try:
        process = Path(f"/proc/{owner.get('pid')}")
        pending = re.findall(r"^(?:SigPnd|ShdPnd):\s*(\w+)", (process / "status").read_text(encoding="utf-8"), re.M)
        is_killed = any(int(signals, 16) >> signal.SIGKILL - 1 & 1 for signals in pending)
        return bool((process / "cmdline").read_bytes()) and not is_killed
    except OSError:
        return False


def _takes_signals(pid) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:  # another user's
        return True
    except (OSError, TypeError):
        return False
    return True


def _refused(path: Path, owner: dict, hint: str = "") -> UserError:
    who = (
        f"process {owner['pid']} on {owner['host']} has been writing" if {"pid", "host"} <= owner.keys() else "a process writes"
    )
    since = f" since {owner['since']}" if "since" in owner else ""
    return UserError(
        f"training.out_dir: {who} to {str(path.parent)!r}{since} (wait for it or stop it, or choose another folder{hint})"
    )


def _check_heartbeat(path: Path) -> None:
    """Raises UserError where another process wrote a moment ago and is not known to be dead."""
    owner = _owner(path)
    if not owner or owner.get("host") == socket.gethostname() and not _is_alive(owner):
        return
    now = path.with_name(f".now-{os.getpid()}")  # by the disk's clock
    now.touch()
    age = now.stat().st_mtime - path.stat().st_mtime
    now.unlink()
    if age < DEAD_SECONDS:
        raise _refused(path, owner, f"; if it was killed, this is possible in {DEAD_SECONDS - age:.0f} s")


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(path)
