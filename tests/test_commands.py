"""Wrong input on the command line: one line, exit code 2, no traceback."""

import io
import os
import subprocess
import sys

import pytest

from mateconv_jax import config as config_lib, prepare
from mateconv_jax.errors import exit_code


def run(*arguments):
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["mateconv_jax.train", "--config=configs/base.py", "--config.training.batchsize=3"], "training.batchsize: unknown key"),
        (["mateconv_jax.train", "--config=configs/base.py", "--config.data.train_data_path=none"], "no dataset at 'none'"),
        (["mateconv_jax.prepare", "--input", "none.jsonl", "--output", "x", "--train_tokenizer"], "--input: no file at"),
        (["mateconv_jax.prepare", "--input", "a", "--output", "x"], "--tokenizer --train_tokenizer is required"),
        (["mateconv_jax.sample", "--model_path=none"], "--model_path: no model at 'none'"),
        (["mateconv_jax.sample", "--model_path=none", "--temperature=0"], "temperature: 0.0 is invalid"),
        (["mateconv_jax.evaluate", "--model_path=none", "--demo"], "--model_path: no model at 'none'"),
        (["mateconv_jax.evaluate", "--model_path=none", "--data=x"], "--model_path: no model at 'none'"),
        (["mateconv_jax.train", "--config=configs/yaml.py:none.yaml"], "none.yaml"),
        (["mateconv_jax.plan", "--config=configs/base.py", "--gpu=none"], "--gpu: 'none' is unknown"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line_and_exit_code_2(arguments, message):
    result = run(*arguments)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert message in result.stderr.splitlines()[-1]


def test_what_the_encoding_of_the_output_lacks_is_escaped(monkeypatch):
    """Of a locale that is not UTF-8. The last one is --help's "…"."""
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert exit_code(print, "长江…") == 0
    assert stdout.buffer.getvalue() == b"\\u957f\\u6c5f\\u2026\n"


def test_a_home_in_a_path_is_expanded(monkeypatch, capsys, tmp_path):
    """A shell leaves it as it is behind `--flag=`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    args = prepare.parse_args(["--input=~/a.jsonl", "--output=~/data", "--tokenizer=~/tok"])
    assert (args.input, args.output, args.tokenizer) == ([f"{tmp_path}/a.jsonl"], f"{tmp_path}/data", f"{tmp_path}/tok")
    config = config_lib.default_config()
    config.training.out_dir = "~/runs/a"
    assert config_lib.resolve(config).training.out_dir == f"{tmp_path}/runs/a"


def test_the_demo_corpus_command(tmp_path):
    result = run("mateconv_jax.data.demo", "--output", str(tmp_path / "new" / "demo.jsonl"), "--documents", "10")
    assert result.returncode == 0 and "10 documents" in result.stdout
    assert len((tmp_path / "new" / "demo.jsonl").read_text().splitlines()) == 10


@pytest.mark.parametrize("arguments", [["mateconv_jax.train", "--help"], ["mateconv_jax.plan", "--help"]])
def test_a_reader_that_closes_the_pipe_ends_the_command(arguments):
    """As `| head` does."""
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run([sys.executable, "-m", *arguments], stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(write)
    assert (result.returncode, result.stderr) == (0, "")
