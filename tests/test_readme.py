"""The commands of the READMEs and of docs/ are what users type first: both languages have the same, and they run.

In the fast tests every one runs on a small corpus with a small model, most of them in this process: an interpreter that imports
jax anew takes seconds. In the slow ones the quickstart runs as it is.
"""

import contextlib
import importlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from mateconv_jax.data import demo
from mateconv_jax.evaluation import demo_score
from tests.tasks import exams

ROOT = Path(__file__).parents[1]
# In this order: the README makes what the others work on.
PAGES = [("README.md", "README.zh-CN.md")]
PAGES += [(f"docs/{page.name}", f"docs/zh/{page.name}") for page in sorted((ROOT / "docs" / "zh").glob("*.md"))]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.S | re.M)


def commands(page):
    return [line for block in blocks(page, "bash") for line in block.splitlines()]


# What the quickstart does, as it stands in the script.
QUICKSTART = re.findall(r'"\$PYTHON" -m (mateconv_jax\..*?)(?:; fi)?$', (ROOT / "launch/quickstart.sh").read_text(), re.M)
QUICKSTART = [
    f"python -m {line}"
    for line in sorted(QUICKSTART, key=lambda line: "sample" in line or "evaluate" in line)
    if "$prompt" not in line
]
FIRST_COMMANDS = list(dict.fromkeys([*QUICKSTART, *commands("README.md")]))
COMMANDS = list(dict.fromkeys([*FIRST_COMMANDS, *(command for page, _ in PAGES for command in commands(page))]))

# Appended to commands in which the part occurs, to make them short; the last mention of an option counts.
SMALL_MODEL = (
    " --config.model.dim=64 --config.model.n_layers=1 --config.model.n_heads=16 --config.model.n_kv_heads=8"
    " --config.training.max_steps=2 --config.training.batch_size=8 --config.training.eval_iters=1 --config.data.seq_len=48"
)
SHORTER = {
    "mateconv_jax.data.demo ": " --documents 300",
    "mateconv_jax.prepare ": " --seq_len 48 --val_fraction 0.1 --num_workers 1",
    "--direct_running_mode": " --direct_running_mode in_memory",
    "mateconv_jax.train ": SMALL_MODEL,
    "launch/train_node.sh": SMALL_MODEL + " --config.training.max_steps=3",
    "mateconv_jax.plan ": " --quick" + SMALL_MODEL.replace("dim=64", "dim=128"),
    "mateconv_jax.sample ": " --max_new_tokens 4",
    "--says": " --max_new_tokens 4 --num_samples 1",
    "tensorboard ": " --inspect",
}
# `bash launch/test.sh` is this very test; the quickstart is in the list command by command, and whole in the slow tests.
LEFT_OUT = ("bash launch/test.sh", "bash launch/quickstart.sh", "bash launch/demo_rl.sh")


@pytest.mark.parametrize("english, chinese", PAGES)
def test_both_languages_have_the_same_commands_and_code(english, chinese):
    for language in ("bash", "python"):
        assert blocks(english, language) == blocks(chinese, language)


def test_every_page_with_commands_has_a_translation():
    pages = {english for english, _ in PAGES}
    untranslated = {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} - pages
    assert not [page for page in untranslated if commands(page)] and len(COMMANDS) >= 30


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """What a newcomer has after cloning, with a raw.jsonl of their own."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("mateconv_jax", "configs", "launch"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "requirements.txt", folder)
    (folder / ".venv").symlink_to(Path(sys.prefix))
    with (folder / "raw.jsonl").open("w", encoding="utf-8") as file:
        for i, document in enumerate(demo.corpus(400, 0, "mixed")):
            extra = {"text": document["text"] + f"第{i}个故事。"} if "text" in document else document
            file.write(json.dumps(extra, ensure_ascii=False) + "\n")
    with (folder / "dialogues.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(document, ensure_ascii=False) + "\n" for document in demo.corpus(200, 0, "dialogues"))
    with (folder / "held_out.jsonl").open("w", encoding="utf-8") as file:
        for i, document in enumerate(demo.corpus(40, 1, "texts")):
            file.write(json.dumps(document | {"source": f"book {i % 3}"}, ensure_ascii=False) + "\n")
    with (folder / "preferences.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(document, ensure_ascii=False) + "\n" for document in demo.corpus(200, 0, "preferences"))
    exams.ceval(folder / "data" / "ceval")
    exams.cmmlu(folder / "data" / "cmmlu")
    return folder


def in_a_shell(command, folder, xla_flags):
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "XLA_FLAGS": xla_flags}
    arguments = dict(cwd=folder, env=env, capture_output=True, text=True, timeout=900, stdin=subprocess.DEVNULL)
    result = subprocess.run(["bash", "-c", command], **arguments)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def in_this_process(module, arguments, stdin, monkeypatch):
    """What `python -m module arguments < stdin` does; its exit code."""
    with (
        open(stdin or os.devnull, encoding="utf-8") as read,
        contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="utf-8")),
    ):
        monkeypatch.setattr(sys, "stdin", read)
        monkeypatch.setattr(sys, "argv", [f"{module}.py", *arguments])
        return importlib.import_module(module).command()


def test_every_command_of_the_readme_runs(checkout, monkeypatch):
    run_commands(FIRST_COMMANDS, checkout, monkeypatch)
    assert list(Path("out/tensorboard").glob("events.out.tfevents.*"))


@pytest.mark.slow  # two minutes
def test_every_command_and_all_code_of_the_documentation_run(checkout, monkeypatch):
    """On what the README's commands have made; the code opens the models that the commands write."""
    if not (checkout / "out").exists():
        run_commands(FIRST_COMMANDS, checkout, monkeypatch)
    run_commands(COMMANDS[len(FIRST_COMMANDS) :], checkout, monkeypatch)
    assert Path("out/report.html").is_file()
    for page, _ in PAGES:
        for code in blocks(page, "python"):
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(code, page, "exec"), {})
            assert printed.getvalue().strip(), code


def serve_until_ready(command, checkout):
    """The server never ends by itself: it is ready, and ends with 0 when it is told to."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = shlex.split(command.replace("--port 8000", f"--port {port}"))
    process = subprocess.Popen(
        [sys.executable, *words[1:], "--max_batch=1", "--context=32"], cwd=checkout, stderr=subprocess.PIPE
    )
    lines = iter(process.stderr.readline, b"")
    assert any(b" ready: " in line for line in lines)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as answer:
        assert json.load(answer)["data"][0]["id"] == Path(words[3].partition("=")[2]).name
    process.terminate()
    process.stderr.read()
    assert process.wait(60) == 0


def run_commands(commands, checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    monkeypatch.setattr(demo_score, "STORIES", 1)
    has_gpu_compiler = importlib.util.find_spec("jax_plugins.xla_cuda13") is not None
    for command in commands:
        if command.startswith(LEFT_OUT) or not has_gpu_compiler and re.search(r"jax-cuda13-pjrt|mateconv_jax\.plan ", command):
            continue
        shorter = command + "".join(flags for part, flags in SHORTER.items() if part in command)
        if "mateconv_jax.serve " in command:
            serve_until_ready(command, checkout)
            continue
        match = re.fullmatch(r"(?:cat (?P<stdin>\S+) \| )?python -m (?P<module>mateconv_jax[\w.]*) (?P<arguments>.*)", shorter)
        if match is None:
            xla_flags = re.match(r"(?:XLA_FLAGS=(\S+) )?", shorter)  # beside the tests' own, which compile faster
            in_a_shell(shorter[xla_flags.end() :], checkout, f"{os.environ['XLA_FLAGS']} {xla_flags[1] or ''}")
        else:
            code = in_this_process(match["module"], shlex.split(match["arguments"]), match["stdin"], monkeypatch)
            assert code == 0, shorter


@pytest.mark.slow  # five minutes
def test_the_reward_demo_teaches_additions(checkout):
    output = in_a_shell("bash launch/demo_rl.sh", checkout, "")
    score = json.loads(output.splitlines()[-1])
    assert 0.2 < score["before"] < 0.5 and score["after"] >= 0.8
    assert (checkout / "runs/demo_rl/curves.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_quickstart_teaches_a_model_to_speak(checkout):
    shutil.rmtree(checkout / "data", ignore_errors=True)
    shutil.rmtree(checkout / "runs", ignore_errors=True)
    output = in_a_shell("bash launch/quickstart.sh", checkout, "")
    base, chat = (
        json.loads(in_a_shell(f"python -m mateconv_jax.evaluate --model_path=runs/{run} --demo --json", checkout, ""))
        for run in ("demo", "demo_chat")
    )
    assert base["sentences"] > 300 and base["grammar"] >= 0.9 and base["facts"] <= 0.05
    assert chat["questions"] == 166 and chat["facts"] >= 0.8 and chat["other_wordings"] >= 0.5
    assert "法国的首都是巴黎。" in output and "grammar: " in output and "facts: " in output
    again = in_a_shell("bash launch/quickstart.sh", checkout, "")
    assert "nothing to do" in again
