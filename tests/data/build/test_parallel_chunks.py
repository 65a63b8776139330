import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mateconv_jax.data.build import parallel_chunks
from mateconv_jax.errors import UserError
from mateconv_jax.prepare import main, parse_args
from tests.data.build.preparing import assert_equal_datasets, command, prepare, write_jsonl


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """1,500 documents with duplicates over all of it and bad lines; and the dataset that one process makes of them."""
    folder = tmp_path_factory.mktemp("kill")
    rng = random.Random(0)
    raw = []
    for i in range(1500):
        text = f"{rng.randrange(600)}：" + "山里有一座庙，庙里有一个老和尚。" * rng.randrange(1, 12)
        raw.append("{broken" if i % 100 == 7 else {"text": text})
    path = write_jsonl(folder / "raw.jsonl", raw)
    flags = ("--train_tokenizer", "--vocab_size", "400", "--chunk_mb", "0.02", "--val_fraction", "0.1", "--dedup", "near")
    return path, flags, prepare(path, folder / "straight", *flags)


@pytest.mark.parametrize("workers", [2, 3])
def test_the_bytes_do_not_depend_on_the_number_of_workers(corpus, tmp_path, workers):
    path, flags, straight = corpus
    main(parse_args(command(path, tmp_path / "zh", *flags, "--num_workers", workers)))
    assert_equal_datasets(tmp_path / "zh", straight)


def test_killed_at_any_moment_it_goes_on_and_the_bytes_are_the_same(corpus, tmp_path):
    path, flags, straight = corpus
    arguments = [sys.executable, "-m", "mateconv_jax.prepare", *command(path, tmp_path / "zh", *flags, "--num_workers", "2")]
    rng, kills, chunks_seen = random.Random(1), 0, set()
    while True:
        process = subprocess.Popen(
            arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        chunks = tmp_path / "zh.partial" / "chunks"
        deadline = time.monotonic() + 120
        if kills < 3:  # somewhere in the work: when some chunks more are there
            goal = len(list(chunks.glob("*"))) + rng.randrange(1, 6)
            while process.poll() is None and len(list(chunks.glob("*"))) < goal and time.monotonic() < deadline:
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)  # the parent alone: its workers must not stay behind
            process.wait()
            kills += process.returncode == -signal.SIGKILL
            chunks_seen.add(len(list(chunks.glob("*[0-9]"))))
        else:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
            break
    assert len(chunks_seen) > 1
    assert_equal_datasets(tmp_path / "zh", straight)


def test_workers_end_with_their_parent(corpus, tmp_path):
    path, flags, _ = corpus
    arguments = [sys.executable, "-m", "mateconv_jax.prepare", *command(path, tmp_path / "zh", *flags, "--num_workers", "2")]
    process = subprocess.Popen(arguments, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "zh.partial" / "chunks").glob("*")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)  # is anyone of its group left?
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    pytest.fail("workers live on")


def die(chunk):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_a_clear_error(corpus, tmp_path, monkeypatch):
    path, flags, straight = corpus
    monkeypatch.setattr(parallel_chunks, "_read", die)
    with pytest.raises(UserError, match="--num_workers: a worker process was killed.*run the same command again"):
        main(parse_args(command(path, tmp_path / "zh", *flags, "--num_workers", "2")))
    monkeypatch.undo()
    assert_equal_datasets(prepare(path, tmp_path / "zh", *flags), straight)


def test_more_chunks_than_files_may_be_open(tmp_path, dataset_folder):
    """All of them are put together, into a flat file too, where 300 files may be open."""
    path = write_jsonl(tmp_path / "raw.jsonl", [{"text": f"第{i:03d}篇"} for i in range(60)])
    flags = ("--tokenizer", dataset_folder / "tokenizer", "--also_bin", "--val_fraction", "0", "--num_workers", "1")
    arguments = command(path, tmp_path / "zh", *flags, "--chunk_mb", "0.000001")
    script = "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300)); from mateconv_jax import prepare; "
    script += "sys.exit(prepare.main(prepare.parse_args(sys.argv[1:])))"
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, stdout=subprocess.DEVNULL)
    assert len(list((tmp_path / "zh").glob("*array_record*"))) == 60
    assert (np.fromfile(tmp_path / "zh" / "train.bin", np.uint16) == 1).sum() == 60
