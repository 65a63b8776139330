"""What each command imports, and what it must not: PyTorch costs 3 s, transformers and Orbax 1 each."""

import os
import subprocess
import sys

import pytest

from tests import llama

HEAVY = (
    "apache_beam clu datasets flax grain jax matplotlib orbax pandas prompt_toolkit scipy sklearn tensorflow tensorflow_datasets "
    "torch transformers wandb "
    "fastapi pydantic uvicorn prometheus_client"
).split()
RUN = """
import atexit, os, runpy, sys
names, own_stdout = {names}, os.dup(1)
atexit.register(lambda: os.write(own_stdout, " ".join(["\\nimported:", *(n for n in names if n in sys.modules)]).encode()))
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""

MODEL = "flax jax orbax transformers"  # what a command needs that reads a model
PREPARE = "matplotlib tensorflow_datasets transformers"  # for its figures, the metadata, the tokenizer
# Arguments of a command; what it may import of HEAVY; how it ends.
BUDGETS = [
    ("train --help", "", 0),
    ("train --config=configs/base.py --config.training.batchsize=3", "", 2),
    ("prepare --help", "", 0),
    ("prepare --input none.jsonl --output x --train_tokenizer", "", 2),
    ("prepare --input {jsonl} --output {tmp}/data --train_tokenizer --vocab_size 400 --num_workers 1", PREPARE, 0),
    ("tokenizer --help", "transformers", 0),
    ("sample --help", "", 0),
    ("sample --model_path={model} --temperature=0", "", 2),
    ("sample --model_path={model} --prompt=x --max_new_tokens=2 --dtype=float32", MODEL, 0),
    ("serve --help", "", 0),
    ("serve --model_path={model} --host=0.0.0.0", "", 2),
    ("evaluate --help", "", 0),
    ("convert --help", "", 0),
    ("convert --from {model} --to {tmp}/run", MODEL, 0),
    ("plan --help", "", 0),
    ("plan --config=configs/base.py --gpu=none", "flax jax scipy", 2),
    ("recipe --help", "", 0),
    ("recipe --data=none --gpu=l4", "", 2),
    ("report --help", "", 0),
    ("data.demo --help", "", 0),
]  # fmt: skip


@pytest.fixture(scope="module")
def model(dataset_folder, tmp_path_factory):
    """A Hugging Face folder."""
    return llama.hugging_face_folder(tmp_path_factory.mktemp("model") / "hf", dataset_folder, 64)


@pytest.mark.parametrize("command, allowed, code", BUDGETS)
def test_a_command_imports_no_more_than_it_needs(command, allowed, code, model, demo_jsonl, tmp_path):
    name, *arguments = command.format(model=model, jsonl=demo_jsonl, tmp=tmp_path).split()
    result = subprocess.run(
        [sys.executable, "-c", RUN.format(names=HEAVY), f"mateconv_jax.{name}", *arguments], capture_output=True, text=True,
        env=os.environ, timeout=120,
    )  # fmt: skip
    assert result.returncode == code, result.stderr
    imported = result.stdout.rpartition("imported:")[2].split()
    assert set(imported) <= set(allowed.split()), f"imported {imported}"


def test_training_without_data_says_so_and_imported_nothing_superfluous():
    """It looks for the data when everything is imported. TensorFlow is installed for other packages at most."""
    result = subprocess.run(
        [sys.executable, "-c", RUN.format(names=HEAVY), "mateconv_jax.train", "--config=configs/base.py"], capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 2 and "data.train_data_path: missing" in result.stderr.splitlines()[-1]
    imported = set(result.stdout.rpartition("imported:")[2].split())
    assert "jax" in imported
    assert not {"tensorflow", "torch", "wandb", "apache_beam", "datasets", "prompt_toolkit"} & imported, imported
