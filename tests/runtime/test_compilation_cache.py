import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from mateconv_jax import train
from mateconv_jax.errors import UserError
from mateconv_jax.runtime import compilation_cache

CODE = """
import jax
FOLDER = __import__("sys").argv[1:]
from mateconv_jax.runtime import compilation_cache
compilation_cache.enable(*FOLDER)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
jax.jit(lambda x: x @ x)(jax.numpy.ones((64, 64)))
print(sum(event == "/jax/compilation_cache/cache_hits" for event in events))
"""


@pytest.mark.parametrize("folder", [None, "elsewhere", ""])
def test_a_second_start_finds_what_the_first_compiled(tmp_path, folder):
    env = {key: value for key, value in os.environ.items() if "CACHE" not in key} | {"HOME": str(tmp_path)}
    if folder is not None:
        env["JAX_COMPILATION_CACHE_DIR"] = folder and str(tmp_path / folder)
    runs = [subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True) for _ in range(2)]
    hits = [int(run.stdout.splitlines()[-1]) for run in runs]
    assert hits[0] == 0 and (hits[1] > 0) == (folder != "")
    assert not any(run.stderr for run in runs), runs[1].stderr
    where = tmp_path / ".cache" / "mateconv_jax" / "xla" if folder is None else tmp_path / "elsewhere"
    assert (where.is_dir() and any(where.iterdir())) == (folder != "")


@pytest.mark.slow
def test_the_configurations_folder_goes_before_the_environments(tmp_path, monkeypatch):
    """Of the command, up to the error that there are no data."""
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "environment")}
    for folder in (str(tmp_path / "config"), ""):
        subprocess.run([sys.executable, "-c", CODE, folder], env=env, check=True, capture_output=True)
    assert any((tmp_path / "config").iterdir()) and not (tmp_path / "environment").exists()

    folders = []
    monkeypatch.setattr(compilation_cache, "enable", folders.append)
    monkeypatch.setattr(sys, "argv", ["train", "--config=configs/base.py", "--config.training.compilation_cache_dir=here"])
    with pytest.raises(UserError, match="train_data_path"):
        train.main(sys.argv)
    assert folders == ["here"]


def test_an_entry_cut_off_in_writing_spoils_nothing(tmp_path):
    env = {key: value for key, value in os.environ.items() if "CACHE" not in key} | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}

    def run():
        result = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True)
        assert not result.stderr
        return int(result.stdout.splitlines()[-1])

    assert run() == 0
    entry = max(tmp_path.glob("*-cache"), key=lambda path: path.stat().st_size)
    entry.write_bytes(entry.read_bytes()[:100])
    entry.with_name(entry.name.removesuffix("-cache") + "-atime").unlink()
    run()
    assert entry.stat().st_size > 100
    hits = run()
    assert hits == len(list(tmp_path.glob("*-cache")))


def test_without_a_home_or_a_folder_that_can_be_written_there_is_no_cache(monkeypatch, tmp_path):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    updates = {}
    monkeypatch.setattr(jax.config, "update", updates.__setitem__)
    compilation_cache.enable()
    assert updates["jax_compilation_cache_dir"] is None

    def read_only(path):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(compilation_cache.filelock, "FileLock", read_only)
    compilation_cache.enable(str(tmp_path))
    assert updates["jax_compilation_cache_dir"] == str(tmp_path)  # what is there can be read
