import os
import resource
import subprocess
import sys

import pytest

from mateconv_jax import cores
from tests.training.runs import flags_of


def test_the_cores_are_those_left_to_the_process():
    assert cores.usable() == len(os.sched_getaffinity(0))


def test_where_that_cannot_be_asked_they_are_all_of_the_machine(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores.usable() == os.cpu_count()


def test_a_limit_on_files_that_the_system_does_not_raise_is_kept(monkeypatch):
    """macOS has a limit of its own, and says that the hard one is infinity."""

    def refuse(which, limits):
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert cores.allow_open_files(10_000) == 256
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert cores.allow_open_files(10_000) == float("inf")


AS_ON_MACOS = """
import os, runpy, sys
del os.sched_getaffinity
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_commands_run_where_linuxs_calls_are_missing(dataset_folder, demo_jsonl, base_tiny_config, tmp_path):
    def run(*arguments):
        command = [sys.executable, "-c", AS_ON_MACOS, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "--num_workers" in run("mateconv_jax.prepare", "--help")
    run("mateconv_jax.data.demo", "--output", tmp_path / "demo.jsonl", "--documents", 20)
    flags = ("--tokenizer", dataset_folder / "tokenizer", "--seq_len", 32)
    run("mateconv_jax.prepare", "--input", demo_jsonl, "--output", tmp_path / "data", "--num_workers", 2, *flags)
    run("mateconv_jax.train", *flags_of(base_tiny_config, str(tmp_path / "out")))
    run("mateconv_jax.sample", "--model_path", tmp_path / "out", "--prompt", "春天", "--max_new_tokens", 2)
    run("mateconv_jax.evaluate", "--model_path", tmp_path / "out", "--data", demo_jsonl, "--max_batches", 1)
