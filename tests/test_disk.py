"""A disk that is full, really: a tmpfs of the size that a test asks for."""

import errno
import os
import subprocess

import numpy as np
import pytest
import safetensors.numpy

from mateconv_jax import config as config_lib, convert, disk, files, prepare, report, sample, tokenizer
from mateconv_jax.data import demo
from mateconv_jax.errors import UserError, exit_code
from mateconv_jax.training import loop

FULL = os.strerror(errno.ENOSPC)


@pytest.fixture
def small_disk(tmp_path):
    """A function of KiB: it gives the folder at which a disk of that size is mounted, or remounts it with another size."""
    folder = tmp_path / "small"
    folder.mkdir()

    def mount(kib):
        options = f"size={kib}k" + (",remount" if os.path.ismount(folder) else "")
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
        return folder

    try:
        yield mount
    finally:
        if os.path.ismount(folder):
            subprocess.run(["umount", "-l", folder], check=True)


def save_numpy(path):
    with path.open("wb") as file:
        np.save(file, np.ones(100_000))


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(bytes(800_000)),
        lambda path: safetensors.numpy.save_file({"x": np.ones(100_000)}, path),
        save_numpy,
    ],
)
def test_a_librarys_error_is_the_systems(small_disk, write):
    """What is written is gone, so that there is room again."""
    folder = small_disk(64)
    with pytest.raises(OSError) as raised, files.aside(folder / "a") as written:
        write(written)
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(folder / "a"))
    assert not list(folder.iterdir())


def test_other_errors_stay_what_they_are(tmp_path):
    for error in (UserError(FULL), ValueError("invalid"), FileNotFoundError(errno.ENOENT, "none", "elsewhere")):
        with pytest.raises(type(error)) as raised, disk.os_errors(tmp_path):
            raise error
        assert raised.value is error


def test_a_full_standard_output_is_one_line(monkeypatch, capsys):
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert exit_code(print, "text") == 2
    assert capsys.readouterr().err == f"error: standard output: {FULL}\n"


# ---- every command, at sizes that stop it in different places -----------------------------------------------------------


def _convert(to):
    return lambda f, folder: exit_code(convert.main, convert.parse_args(["--from", str(f["run"]), "--to", str(folder / to)]))


def _import(f, folder):
    return exit_code(convert.main, convert.parse_args(["--from", str(f["hf"]), "--to", str(folder / "run")]))


def _prepare(f, folder):
    flags = ["--train_tokenizer", "--vocab_size", "400", "--seq_len", "32", "--num_workers", "2", "--chunk_mb", "0.02"]
    args = ["--input", str(f["jsonl"]), "--output", str(folder / "data"), "--also_bin", *flags]
    return exit_code(prepare.main, prepare.parse_args(args))


def _train(f, folder):
    config = f["config"].copy_and_resolve_references()
    config.training.out_dir = str(folder / "out")
    return exit_code(loop.train, config_lib.resolve(config))


def _tokenizer(f, folder):
    args = tokenizer.parse_args(["train", "--input", str(f["jsonl"]), "--output", str(folder / "tok"), "--vocab_size", "400"])
    return exit_code(args.run, args)


def _batch(f, folder):
    flags = ["--batch_file", str(f["prompts"]), "--output", str(folder / "results.jsonl"), "--max_new_tokens", "4"]
    return exit_code(sample.main, sample.parse_args(["--model_path", str(f["run"]), *flags]))


def _report(f, folder):
    return exit_code(report.main, report.parse_args([str(f["run"]), "--output", str(folder / "report.html")]))


def _demo(f, folder):
    return exit_code(demo.main, demo.parse_args(["--output", str(folder / "demo.jsonl"), "--documents", "1000"]))


COMMANDS = {
    "hf": (_convert("hf"), [8, 48, 120]),
    "pth": (_convert("model.pth"), [8, 48]),
    "gguf": (_convert("model.gguf"), [8, 48]),
    "run": (_import, [16, 48, 80]),
    "prepare": (_prepare, [8, 40, 80, 300, 600]),
    "train": (_train, [8, 20, 60, 120, 400, 700]),
    "tokenizer": (_tokenizer, [8, 16]),
    "batch": (_batch, [4]),
    "report": (_report, [8, 40]),
    "demo": (_demo, [40]),
}


@pytest.fixture(scope="module")
def made(base_tiny_config, demo_jsonl, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    config = base_tiny_config.copy_and_resolve_references()
    config.training.out_dir = str(folder / "run")
    assert loop.train(config_lib.resolve(config)) == 0
    (folder / "prompts.txt").write_text("长江\n" * 12, encoding="utf-8")
    there = {"run": folder / "run", "hf": folder / "hf", "jsonl": demo_jsonl, "prompts": folder / "prompts.txt"}
    assert _convert("hf")(there, folder) == 0
    return there | {"config": base_tiny_config}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_on_a_full_disk(small_disk, made, capfd, name):
    """One line with the path, exit code 2, no half result; and it works once there is room, continuing what was begun."""
    command, sizes = COMMANDS[name]
    for kib in sizes:
        folder = small_disk(kib)
        assert command(made, folder) == 2, f"{kib} KiB are enough"
        said = capfd.readouterr().err
        assert "Traceback" not in said and "rror:" not in said.replace("error: ", "", 1), said
        last = said.splitlines()[-1]
        assert last.startswith("error: ") and FULL in last and str(folder) in last, said
        results = {path.name for path in folder.iterdir()}
        assert results <= {"data.partial", "out", "results.jsonl"}  # those that are continued
        assert not list(folder.rglob("*.orbax-checkpoint-tmp"))
    folder = small_disk(100_000)
    assert command(made, folder) == 0
    assert not list(folder.glob("*.partial"))
