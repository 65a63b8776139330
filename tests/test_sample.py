"""python -m mateconv_jax.sample: every option changes something, and what is wrong is one line."""

import codecs
import copy
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time

import pytest

from mateconv_jax import GenerationConfig, TextGenerator, config as config_lib, sample, terminal as terminal_lib
from mateconv_jax.errors import UserError, exit_code
from mateconv_jax.generation_config import PRESETS
from mateconv_jax.inference import chat
from mateconv_jax.training import loop

COMMAND = [sys.executable, "-m", "mateconv_jax.sample"]
SAMPLED = ["--temperature=1.0", "--max_new_tokens=12", "--seed=3"]
CONFIG = GenerationConfig(temperature=1.0, max_new_tokens=12, seed=3)


@pytest.fixture(scope="module")
def run(base_tiny_config, tmp_path_factory):
    """A run folder with EMA weights that differ from the raw ones, and a context that takes seconds to fill."""
    config = copy.deepcopy(base_tiny_config)
    config.model.max_seq_len = 2048
    config.training.update(dict(out_dir=str(tmp_path_factory.mktemp("run") / "out"), max_steps=3, use_ema=True, ema_decay=0.5))
    loop.train(config_lib.resolve(config))
    return config.training.out_dir


@pytest.fixture(scope="module")
def generator(run):
    return TextGenerator.from_pretrained(run)


@pytest.fixture
def write(run, generator, capsys, monkeypatch):
    """What the command prints; the model is loaded once for all."""
    monkeypatch.setattr(TextGenerator, "from_pretrained", lambda *_, **__: generator)

    def write(*arguments):
        capsys.readouterr()
        sample.main(sample.parse_args([f"--model_path={run}", *map(str, arguments)]))
        return capsys.readouterr().out

    return write


@pytest.fixture
def stdin(monkeypatch):
    """Gives the command bytes to read."""

    def stdin(content, terminal=False):
        file = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8")
        file.isatty = lambda: terminal
        monkeypatch.setattr(sys, "stdin", file)

    return stdin


# ---- what is written ----------------------------------------------------------------------------------------------


def test_a_prompt_is_printed_with_its_continuation(generator, write):
    text = generator.generate("小明", CONFIG)
    assert write("--prompt=小明", *SAMPLED) == f"小明{text}\n"
    assert write("--prompt=小明", "--stream", *SAMPLED) == f"小明{text}\n"
    assert write("--prompt=", *SAMPLED) == generator.generate("", CONFIG) + "\n"


def test_a_chat_prints_the_answer(generator, write):
    answer = generator.chat([{"role": "user", "content": "小明"}], CONFIG)
    assert answer != generator.generate("小明", CONFIG)
    assert write("--prompt=小明", "--chat", *SAMPLED) == f"{answer}\n"
    assert write("--prompt=小明", "--chat", "--stream", *SAMPLED) == f"{answer}\n"
    under = generator.chat([{"role": "system", "content": "说一个故事。"}, {"role": "user", "content": "小明"}], CONFIG)
    assert write("--prompt=小明", "--chat", "--system=说一个故事。", *SAMPLED) == f"{under}\n" != f"{answer}\n"


def test_the_prompt_may_come_from_standard_input(write, stdin):
    expected = write("--prompt=小明\n你好", *SAMPLED)
    for arguments in ([], ["--prompt=-"], ["--prompt", "-"]):
        for content in ("小明\n你好", "小明\n你好\n", "\ufeff小明\n你好\r\n"):
            stdin(content.encode())
            assert write(*arguments, *SAMPLED) == expected
    stdin("小明\n你好\n".encode(), terminal=True)
    assert write("--prompt=-", *SAMPLED) == expected
    empty = write("--prompt=", *SAMPLED)
    assert write(*SAMPLED) == empty  # a terminal is not waited for
    stdin(b"")
    assert write(*SAMPLED) == empty
    stdin(b"not read")
    assert write("--prompt=", *SAMPLED) == empty
    sys.stdin = None  # closed by the caller
    assert write(*SAMPLED) == empty


def test_samples_are_numbered_and_differ(generator, write):
    samples = generator.generate_samples("小明", 3, CONFIG)
    expected = "".join(f"==== {i} of 3\n小明{text}\n" for i, text in enumerate(samples, 1))
    assert len(set(samples)) == 3 and write("--prompt=小明", "--num_samples=3", *SAMPLED) == expected
    assert write("--prompt=小明", "--num_samples=1", *SAMPLED) == write("--prompt=小明", *SAMPLED)


def test_json_is_an_object_a_line_and_nothing_else(generator, write):
    output = write("--prompt=小明", "--json", "--num_samples=2", *SAMPLED)
    assert "小明" in output
    for line, text in zip(output.splitlines(), generator.generate_samples("小明", 2, CONFIG), strict=True):
        assert json.loads(line) == {
            "prompt": "小明", "text": text, "finish_reason": text.finish_reason, "n_prompt_tokens": text.n_prompt_tokens,
            "n_tokens": len(text.token_ids), "token_ids": text.token_ids, "seed": 3,
        }  # fmt: skip
    answer = generator.chat([{"role": "user", "content": "小明"}], CONFIG)
    assert json.loads(write("--prompt=小明", "--chat", "--json", *SAMPLED))["text"] == answer


def test_a_batch_file_and_its_output(write, tmp_path):
    (tmp_path / "prompts.txt").write_text("小明\n你好\n长江\n", encoding="utf-8")
    batch = f"--batch_file={tmp_path / 'prompts.txt'}"
    results = [json.loads(line) for line in write(batch, *SAMPLED).splitlines()]
    assert [result["prompt"] for result in results] == ["小明", "你好", "长江"]
    for result in results:
        assert result["prompt"] + result["text"] + "\n" == write(f"--prompt={result['prompt']}", *SAMPLED)
    assert write(batch, f"--output={tmp_path / 'results.jsonl'}", "--batch_size=2", *SAMPLED) == ""
    assert [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()] == results
    answers = [json.loads(line)["text"] for line in write(batch, "--chat", *SAMPLED).splitlines()]
    assert answers[0] + "\n" == write("--prompt=小明", "--chat", *SAMPLED)


def test_a_batch_files_size_and_lines(write, tmp_path, monkeypatch):
    from mateconv_jax.inference import batch_file

    (tmp_path / "prompts.txt").write_text("小明\n")
    sizes = []
    monkeypatch.setattr(batch_file, "run", lambda generator, requests, config, output, size, chat: sizes.append(size))
    for arguments in ([], ["--batch_size=3"]):
        write(f"--batch_file={tmp_path / 'prompts.txt'}", *arguments)
    assert sizes == [16, 3]


def test_an_interactive_dialogue_reads_lines_where_there_is_no_terminal(generator, write, stdin):
    answer = generator.chat([{"role": "user", "content": "小明"}], CONFIG)
    stdin("小明\r\nexit\n你好\n".encode())
    output = write("--interactive", *SAMPLED)
    assert f"\n\n助手：{answer}\n" in output and output.count("助手") == 1
    assert "temperature=1.0" in output and "seed=3" in output
    stdin("你好\n".encode()[:5] + "\n小明\nexit\n".encode())  # a Backspace over half a character
    output = write("--interactive", *SAMPLED)
    assert "（第 1 行不是 UTF-8，已跳过" in output and f"助手：{answer}\n" in output and output.count("助手") == 1


# ---- how it is written --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, changes",
    [
        ([], {}),
        (["--greedy"], dict(do_sample=False)),
        (["--temperature=2"], dict(temperature=2.0)),
        (["--top_k=0"], dict(top_k=0)),
        (["--top_p=1"], dict(top_p=1.0)),
        (["--min_p=0.1"], dict(min_p=0.1)),
        (["--repetition_penalty=1.2"], dict(repetition_penalty=1.2)),
        (["--no_repeat_ngram_size=3"], dict(no_repeat_ngram_size=3)),
        (["--max_new_tokens=0"], dict(max_new_tokens=0)),
        (["--min_new_tokens=5"], dict(min_new_tokens=5)),
        (["--stop=。"], dict(stop=("。",))),
        (["--stop", r"\n\n", "--stop", r"a\\n\tb"], dict(stop=("\n\n", "a\\n\tb"))),
        (["--seed=7"], dict(seed=7)),
        (["--no_cache"], dict(use_cache=False)),
        (["--truncate"], dict(truncate_prompt=True)),
        (["--greedy", "--max_new_tokens=5", "--min_new_tokens=5"], dict(do_sample=False, max_new_tokens=5, min_new_tokens=5)),
    ],
)
def test_options_make_a_generation_config(arguments, changes):
    args = sample.parse_args(["--model_path=out", *arguments])
    assert sample.generation_config(args) == GenerationConfig(**changes)


@pytest.mark.parametrize("name", PRESETS)
def test_explicit_options_go_over_a_preset(name):
    def config(*arguments):
        return sample.generation_config(sample.parse_args(["--model_path=out", f"--preset={name}", *arguments]))

    preset = PRESETS[name]
    assert config() == preset
    values = dict(temperature=0.8, top_k=50, top_p=0.9, max_new_tokens=7)  # the defaults, too, where they are asked for
    expected = GenerationConfig(**values)
    assert config("--temperature=0.8", "--top_k=50", "--top_p=0.9", "--max_new_tokens=7") == expected


def test_how_options_change_the_text(generator, write):
    text = write("--prompt=小明", *SAMPLED)
    stop = generator.generate("小明", CONFIG)[3]
    for arguments in (["--seed=4"], [f"--stop={stop}"], ["--temperature=0.1"]):
        assert write("--prompt=小明", *SAMPLED, *arguments) != text
    assert write("--prompt=小明", *SAMPLED, "--no_cache") == text


def test_a_long_prompt_is_an_error_or_truncated(write):
    long = "熊" * 3000
    with pytest.raises(UserError, match="prompt: .* leave no room in the model's context of 2048"):
        write(f"--prompt={long}", *SAMPLED)
    output = write(f"--prompt={long}", "--truncate", "--json", *SAMPLED)
    assert json.loads(output)["n_prompt_tokens"] == 2048 - 12


def test_dtype_and_ema_choose_the_weights(run, monkeypatch):
    loaded = []
    real = TextGenerator.from_pretrained
    monkeypatch.setattr(TextGenerator, "from_pretrained", lambda *a, **k: loaded.append(real(*a, **k)) or loaded[-1])
    texts = []
    monkeypatch.setattr(sample, "write_samples", lambda generator, prompt, config, args: texts.append(prompt))
    for arguments in ([], ["--no-use_ema"], ["--use_ema", "--dtype=float32"], ["--dtype=float16"]):
        sample.main(sample.parse_args([f"--model_path={run}", "--prompt=小明", *arguments]))
    default, raw, ema, half = (generator.params["norm"]["scale_D"][...] for generator in loaded)
    assert (default == ema).all() and not (default == raw).all()
    assert half.dtype == "float16" and default.dtype == "float32" and texts == ["小明"] * 4
    assert loaded[-1].generate("小明", GenerationConfig(max_new_tokens=2, min_new_tokens=2))
    assert sample.parse_args(["--model_path=x", "--dtype=bfloat16"]).dtype == "bfloat16"


# ---- what is wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--temperature=0"], "--temperature: 0.0 is invalid (expected a number from 1e-6"),
        (["--top_k=-1"], "--top_k: -1 is invalid (expected"),
        (
            ["--min_new_tokens=9", "--max_new_tokens=8"],
            "--min_new_tokens: 9 is invalid (expected at most max_new_tokens, 8)",
        ),
        (["--seed=-1"], "--seed: -1 is invalid"),
        (["--stop="], "--stop: ('',) is invalid"),
        (["--stop", r"\d"], r"--stop: '\\d' is invalid (expected n, t or a backslash after each backslash)"),
        (["--stop", "a\\"], r"--stop: 'a\\' is invalid"),
        (["--greedy", "--temperature=0.8"], "--temperature: not allowed with --greedy (expected one of the two)"),
        (["--greedy", "--top_k=0"], "--top_k: not allowed with --greedy"),
        (["--greedy", "--top_p=1"], "--top_p: not allowed with --greedy"),
        (["--greedy", "--min_p=0"], "--min_p: not allowed with --greedy"),
        (["--greedy", "--preset=chat"], "--preset: not allowed with --greedy"),
        (["--greedy", "--num_samples=2"], "--num_samples: not allowed with --greedy"),
        (["--stream", "--json"], "--json: not allowed with --stream"),
        (["--stream", "--num_samples=2"], "--num_samples: not allowed with --stream"),
        (["--chat", "--num_samples=2"], "--chat: not allowed with --num_samples"),
        (["--system=x"], "--system: requires --chat"),
        (["--chat", "--truncate"], "--truncate: not allowed with --chat"),
        (["--batch_file=x", "--prompt="], "--prompt: not allowed with --batch_file"),
        (["--batch_file=x", "--stream"], "--stream: not allowed with --batch_file"),
        (["--batch_file=x", "--json"], "--json: not allowed with --batch_file"),
        (["--batch_file=x", "--num_samples=1"], "--num_samples: not allowed with --batch_file"),
        (["--interactive", "--batch_file=x"], "--batch_file: not allowed with --interactive"),
        (["--interactive", "--prompt=x"], "--prompt: not allowed with --interactive"),
        (["--interactive", "--chat"], "--chat: not allowed with --interactive"),
        (["--interactive", "--stream"], "--stream: not allowed with --interactive"),
        (["--interactive", "--json"], "--json: not allowed with --interactive"),
        (["--interactive", "--num_samples=2"], "--num_samples: not allowed with --interactive"),
        (["--interactive", "--truncate"], "--truncate: not allowed with --interactive"),
        (["--output=x"], "--output: requires --batch_file"),
        (["--interactive", "--batch_size=3"], "--batch_size: requires --batch_file"),
        (["--batch_file=none.txt"], "--batch_file: cannot read 'none.txt' (No such file or directory)"),
        (["--prompt", "\udcff"], "--prompt: not UTF-8 (invalid start byte at byte 0)"),
        (["--prompt=x"], "--model_path: no model at 'none'"),
    ],
)
def test_what_is_not_possible_is_said_in_one_line(arguments, message, capsys):
    assert exit_code(sample.main, sample.parse_args(["--model_path=none", *arguments])) == 2
    output = capsys.readouterr()
    assert output.err.startswith(f"error: {message}") and output.err.count("\n") == 1 and output.out == ""


def test_bytes_on_standard_input_that_are_no_utf8_are_an_error(stdin, capsys):
    stdin("中".encode("gbk"))
    assert exit_code(sample.main, sample.parse_args(["--model_path=none"])) == 2
    assert capsys.readouterr().err.startswith("error: standard input: not UTF-8 (")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--num_samples=0"], "argument --num_samples: '0' is invalid (expected an integer, at least 1)"),
        (["--batch_size=x"], "argument --batch_size: 'x' is invalid (expected an integer, at least 1)"),
        (["--top_k=x"], "argument --top_k: invalid int value: 'x'"),
        (["--preset=wild"], "argument --preset: invalid choice: 'wild'"),
        (["--dtype=int8"], "argument --dtype: invalid choice: 'int8'"),
        (["小明"], "unrecognized arguments: 小明"),
    ],
)
def test_values_of_another_kind(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        sample.parse_args(["--model_path=none", *arguments])
    assert error.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_long_imports_come_after_the_command_line_is_right(tmp_path):
    (tmp_path / "prompts.jsonl").write_text("{")
    code = (
        "import sys; from mateconv_jax import sample, errors;"
        f"code = errors.exit_code(sample.main, sample.parse_args(['--model_path=x', '--batch_file={tmp_path}/prompts.jsonl']));"
        "print(code, 'jax' in sys.modules, 'transformers' in sys.modules, 'prompt_toolkit' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "2 False False False\n", result.stderr


# ---- the real thing -----------------------------------------------------------------------------------------------


def test_a_reader_that_has_seen_enough_is_no_error(run, tmp_path):
    command = [*COMMAND, f"--model_path={run}", "--num_samples=3", "--max_new_tokens=12"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}  # it fails at the end only
    env["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path)  # in the common one, a test that kills may leave what jax warns of
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdin.close()
        process.stdout.close()
        assert process.stderr.read() == b""


def test_a_dialogue_on_a_terminal(run, tmp_path, monkeypatch):
    """Ctrl-C while it answers, Ctrl-C and Ctrl-D at the prompt, and nothing on the terminal that is not ours."""
    terminal, program = pty.openpty()
    termios.tcsetwinsize(program, (40, 100))
    env = os.environ | {"HOME": str(tmp_path), "TERM": "xterm"}
    arguments = [f"--model_path={run}", "--interactive", "--max_new_tokens=2000", "--min_new_tokens=2000"]
    on_terminal = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", on_terminal, *COMMAND, *arguments]
    process = subprocess.Popen(command, stdin=program, stdout=program, stderr=program, env=env, start_new_session=True)
    os.close(program)
    shown = ""
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode  # a character may come in two reads

    def wait_for(text, after=0):
        nonlocal shown
        deadline = time.monotonic() + 60
        while text not in shown[after:]:
            assert select.select([terminal], [], [], deadline - time.monotonic())[0], shown
            shown += decode(os.read(terminal, 65536))
        return shown.index(text, after) + len(text)

    try:
        at = wait_for("/help 查看全部命令")
        at = wait_for("你：", at)
        assert "Warning" not in shown and "WARNING" not in shown and "\x1b[6n" not in shown and shown.count("\n") <= 5
        os.write(terminal, "小明\r".encode())
        begin = at = wait_for("助手：", at)
        while len(shown) < at + 20:  # it answers; what is not read yet when Ctrl-C comes, the terminal discards
            shown += decode(os.read(terminal, 65536))
        os.write(terminal, b"\x03")
        at = wait_for("（已停止）", at)
        at = wait_for("你：", at)
        os.write(terminal, f"/save {tmp_path}/dialogue.json\r".encode())
        at = wait_for("已保存 2 条消息", at)
        at = wait_for("你：", at)
        os.write(terminal, b"\x03")
        at = wait_for(chat.HOW_TO_LEAVE, at)
        at = wait_for("你：", at)
        os.write(terminal, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        os.close(terminal)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _, answer = json.loads((tmp_path / "dialogue.json").read_text())
    on_screen = terminal_lib.visible(answer["content"]).replace("\n", "\r\n")  # as a terminal writes it
    assert answer["role"] == "assistant" and on_screen[:20] == shown[begin : begin + 20]
