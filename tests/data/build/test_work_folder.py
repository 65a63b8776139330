import errno
import fcntl
import os
import subprocess
import sys

import pytest

from mateconv_jax.data.build import work_folder
from mateconv_jax.errors import UserError
from tests.data.build.preparing import TRAIN_TOKENIZER, prepare, write_jsonl


def test_two_runs_in_one_folder_do_not_mix(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "raw.jsonl", [{"text": "一"}])
    monkeypatch.setattr(work_folder, "LOCK_SECONDS", 0.2)
    with (
        work_folder.opened(tmp_path / "zh.partial", {}, False),
        pytest.raises(UserError, match="another run is writing"),
    ):
        prepare(path, tmp_path / "zh", *TRAIN_TOKENIZER)
    workers = work_folder.hold_for_worker(tmp_path / "zh.partial")  # its parent was killed, and it still writes
    with pytest.raises(UserError, match="another run is writing"):
        prepare(path, tmp_path / "zh", *TRAIN_TOKENIZER, "--overwrite")
    workers.close()
    prepare(path, tmp_path / "zh", *TRAIN_TOKENIZER, "--overwrite")


def test_a_run_waits_for_the_lock_of_one_that_is_dying(tmp_path):
    path = write_jsonl(tmp_path / "raw.jsonl", [{"text": "一"}])
    script = """
import sys, time
from mateconv_jax.data.build import work_folder
with work_folder.opened(__import__("pathlib").Path(sys.argv[1]), {"input": []}, False):
    print("locked", flush=True)
    time.sleep(1.5)
"""
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "zh.partial")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n" and process.poll() is None
    prepare(path, tmp_path / "zh", *TRAIN_TOKENIZER, "--overwrite")
    process.wait()


def test_a_disk_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, capsys):
    def no_locks(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with work_folder.opened(tmp_path / "zh.partial", {}, False) as folder:
        work_folder.hold_for_worker(folder).close()
    assert capsys.readouterr().err.count("no file locks on the disk") == 1
    work_folder.remove(tmp_path / "zh.partial")
    assert not (tmp_path / "zh.partial").exists()
