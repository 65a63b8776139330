"""The lock of a run folder."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mateconv_jax.errors import UserError
from mateconv_jax.training import run_lock

HOLD = """
import sys, time
from pathlib import Path
from mateconv_jax.training import run_lock
with run_lock.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def without_locks(monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_the_second_says_who_writes_there_and_the_kill_of_the_first_frees_the_folder(tmp_path, holder):
    folder = tmp_path / "run"
    owner = json.loads((folder / ".lock").read_text())
    assert owner["pid"] == holder.pid
    begin = time.monotonic()
    message = (
        rf"training.out_dir: process {holder.pid} on {socket.gethostname()} has been writing to .*/run' since {owner['since']}"
    )
    with pytest.raises(UserError, match=message), run_lock.held(folder):
        pass
    assert time.monotonic() - begin < 5 and os.listdir(folder) == [".lock"]
    holder.send_signal(signal.SIGKILL)  # not waited for
    with run_lock.held(folder):
        assert json.loads((folder / ".lock").read_text())["pid"] == os.getpid()
    assert os.listdir(folder) == []


def test_a_lock_whose_holder_is_unknown_is_waited_for_and_then_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "DYING_SECONDS", 0.3)
    with run_lock.held(tmp_path):
        (tmp_path / ".lock").write_text("")
        with pytest.raises(UserError, match="a process writes to"), run_lock.held(tmp_path):
            pass


def test_a_new_folder_that_stays_empty_is_removed(tmp_path):
    with pytest.raises(ZeroDivisionError), run_lock.held(tmp_path / "runs" / "a"):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []
    with run_lock.held(tmp_path / "runs" / "a"):
        (tmp_path / "runs" / "a" / "train.log").touch()
    assert os.listdir(tmp_path / "runs" / "a") == ["train.log"]


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="training.out_dir: cannot write to"), run_lock.held(tmp_path / "file"):
        pass


def test_a_heartbeat_stands_in_for_locks(tmp_path, without_locks, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.05)
    lock, long_ago = tmp_path / ".lock", time.time() - 1000
    with run_lock.held(tmp_path):
        lock.write_text('{"host": "elsewhere", "pid": 1, "since": "today"}')
        os.utime(lock, (long_ago, long_ago))
        deadline = time.monotonic() + 60
        while lock.stat().st_mtime < long_ago + 500:
            assert time.monotonic() < deadline, "no heartbeat"
            time.sleep(0.01)
        with (
            pytest.raises(UserError, match=r"process 1 on elsewhere .* since today .*possible in \d\d s"),
            run_lock.held(tmp_path),
        ):
            pass
    lock.write_text('{"host": "elsewhere", "pid": 1, "since": "today"}')  # killed: it beats no more
    os.utime(lock, (long_ago, long_ago))
    with run_lock.held(tmp_path):
        pass
    lock.write_text(json.dumps({"host": socket.gethostname(), "pid": 2**22 + 1, "since": "now"}))
    with run_lock.held(tmp_path):  # known to be dead
        pass
    assert os.listdir(tmp_path) == []


def test_only_the_first_process_of_a_run_holds_it(tmp_path, monkeypatch):
    with run_lock.held(tmp_path):
        monkeypatch.setattr(run_lock.distributed, "is_first", lambda: False)
        with run_lock.held(tmp_path):
            assert os.listdir(tmp_path) == [".lock"]


def test_without_proc_a_signal_tells_whether_a_process_lives(monkeypatch):
    """As on macOS."""
    monkeypatch.setattr(run_lock, "Path", lambda path: Path("/nowhere"))
    alive = {"host": socket.gethostname(), "pid": os.getpid()}
    assert run_lock._is_alive(alive) and not run_lock._is_alive(alive | {"pid": 2**22 + 1}) and not run_lock._is_alive({})
