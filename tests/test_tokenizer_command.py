"""python -m mateconv_jax.tokenizer: every option changes something, and what is wrong is one line."""

import gzip
import io
import json
import re
import subprocess
import sys

import pytest

from mateconv_jax.data.tokenizer import bpe, tokenizer as tokenizer_lib
from mateconv_jax.errors import UserError
from mateconv_jax.tokenizer import parse_args


def run(*arguments):
    args = parse_args(list(map(str, arguments)))
    args.run(args)


def trained(output, *arguments):
    run("train", "--output", output, *arguments)
    return tokenizer_lib.load(output, "--output")


@pytest.fixture(scope="module")
def numbers_jsonl(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "numbers.jsonl"
    lines = ({"text": f"{year}年的故事", "other": "甲乙丙丁戊己庚辛"} for year in range(1900, 2100))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def folder(demo_jsonl, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers") / "mine"
    trained(folder, "--input", demo_jsonl, "--vocab_size", 400)
    return folder


# ---- train --------------------------------------------------------------------------------------------------------


def test_a_trained_folder_loads_and_is_that_of_its_texts(folder, demo_jsonl, capsys):
    texts = []
    for line in demo_jsonl.read_text().splitlines():
        document = json.loads(line)
        messages = document.get("messages", [])
        texts += [document["text"]] if not messages else [f"{m['role']}\n{m['content']}" for m in messages]
    expected = bpe.train(texts, 400)
    assert tokenizer_lib.fingerprint(tokenizer_lib.load(folder, "")) == tokenizer_lib.fingerprint(expected)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["mine"]


def test_every_option_of_train_changes_the_tokenizer(numbers_jsonl, tmp_path):
    def fingerprint(name, *options):
        tokenizer = trained(tmp_path / name, "--input", numbers_jsonl, "--vocab_size", 320, *options)
        return tokenizer_lib.fingerprint(tokenizer)

    sample = ("--sample_mb", 0.001)
    different = [
        fingerprint("plain"), fingerprint("size", "--vocab_size", 300), fingerprint("digits", "--split_digits"),
        fingerprint("special", "--special_tokens", "<think>", "</think>"), fingerprint("key", "--text_key", "other"),
        fingerprint("sample", *sample), fingerprint("seed", *sample, "--seed", 1),
        fingerprint("short", "--max_token_bytes", 3),
    ]  # fmt: skip
    assert len(set(different)) == len(different)
    assert tokenizer_lib.load(tmp_path / "special", "").convert_tokens_to_ids("</think>") == 5
    assert fingerprint("sample again", *sample) == different[5]


def test_several_inputs_standard_input_and_text_files(numbers_jsonl, demo_jsonl, tmp_path, monkeypatch):
    plain = tmp_path / "plain.txt"
    plain.write_text("".join(json.loads(line)["text"] + "\n" for line in numbers_jsonl.open()))
    both = trained(tmp_path / "both", "--input", numbers_jsonl, demo_jsonl, "--vocab_size", 600)
    same = trained(tmp_path / "same", "--input", plain, demo_jsonl, "--vocab_size", 600)
    assert tokenizer_lib.fingerprint(both) == tokenizer_lib.fingerprint(same)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(numbers_jsonl.read_bytes()), encoding="utf-8"))
    piped = trained(tmp_path / "piped", "--input", "-", "--vocab_size", 320)
    alone = trained(tmp_path / "alone", "--input", numbers_jsonl, "--vocab_size", 320)
    assert tokenizer_lib.fingerprint(piped) == tokenizer_lib.fingerprint(alone)


def test_a_folder_is_replaced_only_when_told(numbers_jsonl, tmp_path):
    output = tmp_path / "tokenizer"
    flags = ("--input", numbers_jsonl, "--vocab_size")
    trained(output, *flags, 300)
    with pytest.raises(UserError, match="--output: .*tokenizer' is there already .*--overwrite"):
        trained(output, *flags, 310)
    assert len(tokenizer_lib.load(output, "")) == 300
    assert len(trained(output, *flags, 310, "--overwrite")) == 310
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match="--output: .*photos' holds no tokenizer and is not replaced"):
        trained(tmp_path / "photos", *flags, 310, "--overwrite")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "tokenizer"]


def test_an_input_that_would_vanish_is_an_error(numbers_jsonl, tmp_path):
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(gzip.compress(numbers_jsonl.read_bytes())[:-300])
    other = tmp_path / "other.jsonl"
    other.write_text('{"content": "别的"}\n' * 20)
    for path, message in ((broken, "could not be read beyond line"), (other, "is mostly unusable: 20 of 20")):
        flags = ("--input", numbers_jsonl, path, "--vocab_size", 300)
        with pytest.raises(UserError, match=f"--input: '{path}' {message}.*--keep_going"):
            trained(tmp_path / "tokenizer", *flags)
        assert len(trained(tmp_path / path.stem, *flags, "--keep_going")) == 300
    assert not (tmp_path / "tokenizer").exists()


def test_a_tokenizer_folder_with_a_model_in_it_is_not_replaced(numbers_jsonl, tmp_path):
    trained(tmp_path / "model", "--input", numbers_jsonl, "--vocab_size", 300)
    (tmp_path / "model" / "model.safetensors").write_text("weights")
    with pytest.raises(UserError, match="--output: .*model' holds 'model.safetensors' too and is not replaced"):
        trained(tmp_path / "model", "--input", numbers_jsonl, "--vocab_size", 310, "--overwrite")
    assert (tmp_path / "model" / "model.safetensors").read_text() == "weights"


def test_what_is_there_survives_a_training_that_fails(numbers_jsonl, tmp_path):
    trained(tmp_path / "tokenizer", "--input", numbers_jsonl, "--vocab_size", 300)
    with pytest.raises(UserError, match="--vocab_size"):
        trained(tmp_path / "tokenizer", "--input", numbers_jsonl, "--vocab_size", 10, "--overwrite")
    assert len(tokenizer_lib.load(tmp_path / "tokenizer", "")) == 300
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_inputs_that_hold_no_text(tmp_path, numbers_jsonl):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "ids.bin").write_bytes(b"\1\0")
    with pytest.raises(UserError, match="--input: no text in .*empty.jsonl"):
        trained(tmp_path / "out", "--input", tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match="--input: .* is mostly unusable: .* no key 'body'"):
        trained(tmp_path / "out", "--input", numbers_jsonl, "--text_key", "body")
    with pytest.raises(UserError, match="--input: .*ids.bin' holds token ids"):
        trained(tmp_path / "out", "--input", tmp_path / "ids.bin")
    with pytest.raises(UserError, match="--input: no file at"):
        trained(tmp_path / "out", "--input", tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="cannot read or write .*ids.bin"):
        trained(tmp_path / "ids.bin" / "out", "--input", numbers_jsonl)


# ---- inspect ------------------------------------------------------------------------------------------------------


def test_every_option_of_inspect_shows_something_else(folder, numbers_jsonl, tmp_path, capsys):
    def shown(*options):
        capsys.readouterr()
        run("inspect", folder, *options)
        return capsys.readouterr().out

    trained(tmp_path / "other", "--input", numbers_jsonl, "--vocab_size", 300)
    plain = shown()
    assert str(folder) in plain and "400 tokens" in plain and "difference" not in plain
    compared = shown("--compare", tmp_path / "other")
    assert "300 tokens" in compared and "difference" in compared
    assert "numbers.jsonl" in shown("--input", numbers_jsonl)
    assert shown("--input", numbers_jsonl) != shown("--input", numbers_jsonl, "--text_key", "other")
    assert len(shown("--vocab").splitlines()) == 400
    assert len(shown("--vocab", "--compare", tmp_path / "other").splitlines()[0].split("\t")) == 3
    text = max((line.split("\t")[1] for line in shown("--vocab").splitlines()), key=len)
    found = shown("--grep", text)
    assert found and all(text in line for line in found.splitlines())
    assert shown("--vocab", "--grep", text) == found
    assert shown("--grep", "没有这样的词") == ""
    assert shown("--encode", "中国的首都").startswith(f"{folder}: 5 characters in ")
    assert f"\n{tmp_path / 'other'}: 5 characters in " in shown("--encode", "中国的首都", "--compare", tmp_path / "other")
    made = json.loads(shown("--json", "--compare", tmp_path / "other", "--input", numbers_jsonl))
    assert made["vocab_size"] == 400 and made["compare"]["vocab_size"] == 300
    assert made["compression"][str(numbers_jsonl)]["characters"] == 200 * 8


DIALOGUES = [
    {"messages": [{"role": role, "content": text} for role, text in [("user", "你好"), ("assistant", "好。\n你呢？")] * 2]},
    {"text": "没有人说话"},
    {"messages": [{"role": "user", "content": "长江"}, {"role": "assistant", "content": "长", "reasoning_content": "想"}]},
    {"q": "</s>北京", "a": "在"},
]


@pytest.fixture
def dialogues_jsonl(tmp_path):
    path = tmp_path / "dialogues.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in DIALOGUES) + "[\n")
    return path


def inspected(capsys, folder, path, *options):
    """(exit code, lines of standard output and of standard error)"""
    args = parse_args(["inspect", str(folder), "--dialogue", str(path), *options])
    capsys.readouterr()
    code = args.run(args)
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err.splitlines()


def test_what_is_learned_of_a_dialogue_is_shown(folder, dialogues_jsonl, capsys):
    """Not on a terminal: brackets, a tab, ids. What cannot be shown is an error with its line, and the rest is shown."""
    code, shown, errors = inspected(capsys, folder, dialogues_jsonl)
    tokenizer = tokenizer_lib.load(folder, "")
    assert code == 2
    assert [error.partition(": ")[2] for error in errors] == [
        f"{dialogues_jsonl}:3: the chat template does not write 'reasoning_content' of message 2 (assistant)",
        f"{dialogues_jsonl}:5: not JSON (unexpected end of data: line 1 column 2 (char 1))",
        "plain text, which is learned whole, is not shown (lines: 1)",
    ]
    texts = [line.split("\t")[0] for line in shown]
    turn = ["<s>user\\n", "你好</s>\\n", "<s>assistant\\n", "⟦好。\\n⟧", "⟦你呢？</s>⟧\\n"]
    assert texts[1:11] == turn * 2
    assert texts[12:] == ["<s>user\\n", "</s>北京</s>\\n", "<s>assistant\\n", "⟦在</s>⟧\\n"]
    n_learned = len(tokenizer("好。\n你呢？</s>")["input_ids"]) * 2
    assert texts[0].startswith(f"{dialogues_jsonl}:1: ") and texts[0].endswith(f" tokens, {n_learned} learned")
    ids = [int(token) for line in shown[1:11] for token in line.split("\t")[1].translate(str.maketrans("⟦⟧", "  ")).split()]
    assert ids == tokenizer.apply_chat_template(DIALOGUES[0]["messages"], return_dict=False)


def test_what_is_learned_as_json(folder, dialogues_jsonl, tmp_path, capsys, monkeypatch):
    tokenizer = tokenizer_lib.load(folder, "")
    good = tmp_path / "good.jsonl"
    good.write_text(json.dumps(DIALOGUES[0]) + "\n")
    code, (line,), errors = inspected(capsys, folder, good, "--json")
    assert (code, errors) == (0, [])
    both = json.loads(line)
    assert both.keys() == {"ids", "learned"} and set(both["learned"]) == {0, 1}
    assert both["ids"] == tokenizer.apply_chat_template(DIALOGUES[0]["messages"], return_dict=False)
    assert (
        tokenizer.decode([token for token, one in zip(both["ids"], both["learned"], strict=True) if one])
        == "好。\n你呢？</s>" * 2
    )
    last = json.loads(inspected(capsys, folder, good, "--json", "--learn", "last")[1][0])
    assert last["ids"] == both["ids"] and 0 < sum(last["learned"]) == sum(both["learned"]) / 2
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(dialogues_jsonl.read_bytes()), encoding="utf-8"))
    code, lines, errors = inspected(capsys, folder, "-", "--json")
    assert (code, len(lines), len(errors)) == (2, 2, 3) and json.loads(lines[0]) == both


def test_what_is_learned_is_green_on_a_terminal(folder, dialogues_jsonl, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = "\n".join(inspected(capsys, folder, dialogues_jsonl)[1])
    assert re.findall("\x1b\\[1;32m([^0-9]*?)\x1b", shown) == ["好。\\n", "你呢？</s>"] * 2 + ["在</s>"]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "⟦在</s>⟧" in "\n".join(inspected(capsys, folder, dialogues_jsonl)[1])


@pytest.mark.parametrize("view", [[], ["--vocab"], ["--json"], ["--encode", "中国" * 10_000]])
def test_a_reader_that_has_seen_enough_is_no_error(folder, view):
    command = [sys.executable, "-m", "mateconv_jax.tokenizer", "inspect", str(folder), *view]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dialogue", "x", "--compare", "y"], "--dialogue: alone, or with --json"),
        (["--dialogue", "x", "--grep", "y"], "--dialogue: alone, or with --json"),
        (["--learn", "last"], "--learn: only with --dialogue"),
    ],
)
def test_what_does_not_go_with_dialogues(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_args(["inspect", ".", *arguments])
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "file, message", [("none.jsonl", "--dialogue: no file at 'none.jsonl'"), ("x.jsonl", None), ("x.bin", "holds no dialogues")]
)
def test_a_file_without_dialogues(folder, tmp_path, capsys, monkeypatch, file, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.bin").write_bytes(b"12")
    (tmp_path / "x.jsonl").write_text("no JSON\nnor this\n")
    if message is None:  # each of its lines is an error
        code, shown, errors = inspected(capsys, folder, file)
        assert code == 2 and shown == [] and errors[0].startswith(f"error: {file}:1: not JSON")
    else:
        with pytest.raises(UserError, match=message):
            inspected(capsys, folder, file)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "--input", "none", "--output", "x", "--sample_mb", "0"], "--sample_mb: 0.0 is invalid"),
        (["train", "--input", "none", "--output", "x"], "--input: no file at 'none'"),
        (["inspect", "none"], "inspect: no tokenizer at 'none'"),
        (["inspect", ".", "--vocab", "--input", "x"], "--input: only for the overview"),
        (["inspect", ".", "--encode", "x", "--grep", "x"], "--grep: only with --vocab"),
        (["inspect", ".", "--vocab", "--json"], "not allowed with argument --vocab"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments, message):
    result = subprocess.run([sys.executable, "-m", "mateconv_jax.tokenizer", *arguments], capture_output=True, text=True)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr and message in result.stderr.splitlines()[-1]
