"""The commands of the READMEs and of docs/ are what users type first: they run. (That both languages have the same: test_docs.py.)"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mateconv_jax.data import demo

ROOT = Path(__file__).parents[1]


# In this order: the README makes what the others work on.
PAGES = ["README.md", *(f"docs/{name}.md" for name in ("configuration", "data", "interop", "planning", "sampling", "training"))]


def blocks(language):
    pages = ((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    return [block for page in pages for block in re.findall(rf"^```{language}\n(.*?)^```$", page, re.S | re.M)]


COMMANDS = list(dict.fromkeys(line for block in blocks("bash") for line in block.splitlines()))


# The long ones are made short where only their length is.
TWO_STEPS = " --config.training.max_steps=2 --config.training.batch_size=2 --config.training.eval_iters=1"
SHORTER = {
    "train --config=configs/base.py": TWO_STEPS,
    "train --config=configs/moe.py": TWO_STEPS,
    "launch/train_node.sh": TWO_STEPS,
    "runs/demo8": " --config.training.max_steps=2",
    "mateconv_jax.plan": " --quick",
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """What a newcomer has after cloning, with a raw.jsonl of their own."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("mateconv_jax", "configs", "launch"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "requirements.txt", folder)
    with (folder / "raw.jsonl").open("w", encoding="utf-8") as file:
        for i, document in enumerate(demo.corpus(9_000, 0)):  # enough text for a few rows of 512 in each split
            extra = {"text": document["text"] + f"第{i}个故事。"} if "text" in document else document
            file.write(json.dumps(extra, ensure_ascii=False) + "\n")
    return folder


def run(command, folder):
    venv = Path(sys.executable).parent
    env = os.environ | {"PATH": f"{venv}{os.pathsep}{os.environ['PATH']}"}
    del env["XLA_FLAGS"]  # the other tests'
    arguments = dict(cwd=folder, env=env, capture_output=True, text=True, timeout=900, stdin=subprocess.DEVNULL)
    result = subprocess.run(["bash", "-c", command], **arguments)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.mark.slow
def test_the_quickstart_teaches_a_model_to_speak(checkout):
    (checkout / ".venv").symlink_to(Path(sys.prefix))
    output = run("bash launch/quickstart.sh", checkout)
    score = json.loads(run("python -m mateconv_jax.evaluate --model_path=runs/demo --demo --json", checkout))
    assert score["sentences"] > 300 and score["grammar"] >= 0.9
    assert score["questions"] == 36 and score["facts"] >= 0.8
    assert "法国的首都是巴黎。" in output and "grammar: " in output and "facts: " in output
    again = run("bash launch/quickstart.sh", checkout)
    assert "nothing to do" in again


@pytest.mark.slow
def test_every_command_runs(checkout):
    for command in COMMANDS:
        if command.startswith("bash launch/test.sh"):
            continue  # this very test
        if command.startswith("bash launch/quickstart.sh"):
            continue  # above
        if command.startswith("tensorboard"):
            events = run("python -c 'import tensorboard.main' && ls out/tensorboard", checkout)
            assert "events.out.tfevents" in events
            continue
        shorter = "".join(flags for part, flags in SHORTER.items() if part in command)
        run(command + shorter, checkout)
    for code in blocks("python"):
        (checkout / "readme.py").write_text(code, encoding="utf-8")
        assert run("python readme.py", checkout).strip()
