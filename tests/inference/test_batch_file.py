import dataclasses
import io
import json
import sys

import jax
import pytest

from mateconv_jax import GenerationConfig
from mateconv_jax.errors import UserError
from mateconv_jax.inference import batch_file, chat

CONFIG = GenerationConfig(temperature=1.0, max_new_tokens=8, seed=3)
CONTEXT = 96  # of the generator
PROMPTS = ["小明", "今天早上，老王去公园", "法", "熊猫最爱吃竹子。", "长江", "黄河", "你好"]


@pytest.fixture
def write(generator, tmp_path):
    """Results of prompts, as the bytes of the output file."""

    def write(content, config=CONFIG, name="prompts.txt", output="results.jsonl", batch_size=2, chat=False):
        (tmp_path / name).write_text(content, encoding="utf-8", newline="")
        requests = batch_file.read_requests(str(tmp_path / name), chat)
        batch_file.run(generator, requests, config, str(tmp_path / output), batch_size, chat)
        return (tmp_path / output).read_bytes()

    return write


def parsed(content):
    return [json.loads(line) for line in content.decode().split("\n")[:-1]]


def jsonl(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


# ---- results ------------------------------------------------------------------------------------------------------


def test_each_line_gets_its_result_in_order(generator, write):
    results = parsed(write("\n".join(PROMPTS)))
    assert [result["prompt"] for result in results] == PROMPTS
    for result, prompt in zip(results, PROMPTS, strict=True):
        alone = generator.generate(prompt, CONFIG)
        assert list(result) == ["prompt", *batch_file.RESULT_KEYS]
        assert result["text"] == alone and result["token_ids"] == alone.token_ids
        assert (result["n_tokens"], result["n_prompt_tokens"]) == (len(alone.token_ids), alone.n_prompt_tokens)
        assert (result["finish_reason"], result["seed"]) == (alone.finish_reason, 3)
        assert result["settings"]["temperature"] == 1.0 and result["settings"]["stop"] == []


def test_the_batch_size_changes_only_how_many_are_written_at_once(generator, write, monkeypatch):
    sizes = []
    real = generator.batch_generate
    monkeypatch.setattr(generator, "batch_generate", lambda prompts, *rest: sizes.append(len(prompts)) or real(prompts, *rest))
    expected = write("\n".join(PROMPTS), output="2", batch_size=2)
    assert write("\n".join(PROMPTS), output="3", batch_size=3) == expected
    assert sizes == [2, 2, 2, 1, 3, 3, 1]
    with pytest.raises(UserError, match=r"--batch_size: 0 is invalid \(expected at least 1\)"):
        write("\n".join(PROMPTS), output="0", batch_size=0)


def test_a_text_file_is_a_prompt_a_line(write):
    results = parsed(write('\ufeff小明\r\n\n \u3000\n{"prompt": "法"}\u2028法 \n'))
    assert [result["prompt"] for result in results] == ["小明", '{"prompt": "法"}\u2028法 ']


def test_objects_may_be_prompts_or_dialogues_and_keep_their_other_fields(generator, write):
    dialogue = [{"role": "user", "content": "熊猫"}]
    longer = [{"role": "system", "content": "诗"}, *dialogue]
    records = [
        {"id": 2**70, "prompt": "小明", "score": 0.1, "tags": ["é", None]},
        {"messages": dialogue, "id": 2},
        {"prompt": ""},
        {"history": longer},
        {"prompt": "</s>"},
    ]
    results = parsed(write(jsonl(*records), name="prompts.jsonl", batch_size=3))
    for result, record in zip(results, records, strict=True):
        assert list(result)[: len(record)] == list(record) and {key: result[key] for key in record} == record
    texts = [result["text"] for result in results]
    assert texts[0::2] == generator.batch_generate(["小明", "", "</s>"], CONFIG)
    assert texts[1::2] == generator.batch_chat([dialogue, longer], CONFIG)
    assert parsed(write(jsonl({"prompt": "熊猫"}), name="chat.jsonl", output="chat", chat=True))[0]["text"] == texts[1]


def test_a_line_has_its_own_seed_and_number_of_samples_and_goes_on_after_any_of_them(generator, write, tmp_path):
    """Killed within a line's samples too; sample i of a seed is what generate_samples gives."""
    lines = jsonl({"prompt": "小明", "seed": 9, "num_samples": 3, "id": 1}, {"prompt": "法"})
    whole = write(lines, name="own.jsonl", batch_size=4)
    results = parsed(whole)
    expected = [*generator.generate_samples("小明", 3, dataclasses.replace(CONFIG, seed=9)), generator.generate("法", CONFIG)]
    assert [result["text"] for result in results] == expected and len(set(expected)) == 4
    assert [(result.get("sample"), result["seed"], result["settings"]["seed"]) for result in results] == [
        (0, 9, 9), (1, 9, 9), (2, 9, 9), (None, 3, 3),
    ]  # fmt: skip
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in (5, ends[0], ends[1] + 60, ends[2] - 1):
        (tmp_path / "results.jsonl").write_bytes(whole[:cut])
        assert write(lines, name="own.jsonl", batch_size=4) == whole
    with pytest.raises(UserError, match=r"results.jsonl:1 was written with {'seed': 9}, not {'seed': 8}"):
        write(lines.replace('"seed": 9', '"seed": 8'), name="own.jsonl")
    with pytest.raises(UserError, match="results.jsonl:4 was written with {'seed': 3}, not {'seed': 4}"):  # 1 to 3: their own
        write(lines, dataclasses.replace(CONFIG, seed=4), name="own.jsonl")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"seed": -1}, r"'seed' is -1 \(expected an integer from 0 to 4294967295\)"),
        ({"seed": "7"}, "'seed' is '7'"),
        ({"num_samples": 0}, r"'num_samples' is 0 \(expected an integer from 1 to 100000\)"),
        ({"num_samples": True}, "'num_samples' is True"),
        ({"num_samples": 2, "sample": 1}, "uses 'sample', a field of the results"),
    ],
)
def test_a_seed_or_number_of_samples_that_is_none_is_an_error(write, fields, problem):
    with pytest.raises(UserError, match=f"^--batch_file: .*own.jsonl:1:? {problem}"):
        write(jsonl({"prompt": "小明"} | fields), name="own.jsonl")


def test_without_an_output_results_go_to_standard_output(generator, write, capfdbinary, tmp_path):
    expected = write("\n".join(PROMPTS))
    capfdbinary.readouterr()
    batch_file.run(generator, batch_file.read_requests(str(tmp_path / "prompts.txt")), CONFIG)
    assert capfdbinary.readouterr().out == expected


def test_a_log_shows_progress_in_lines_and_a_terminal_a_bar(write, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    write("\n".join(PROMPTS), output="1")
    assert log.getvalue() == "7 of 7 results\n"
    monkeypatch.setattr(batch_file, "LOG_SECONDS", 0)
    write("\n".join(PROMPTS), output="2", batch_size=4)
    assert log.getvalue() == "7 of 7 results\n4 of 7 results\n7 of 7 results\n"
    monkeypatch.setattr(sys, "stderr", log := Terminal())
    write("\n".join(PROMPTS), output="3")
    assert "100%" in log.getvalue() and "7/7" in log.getvalue() and "results" not in log.getvalue()
    write("\n".join(PROMPTS), output="3")
    assert "already holds 7 of 7 results" in log.getvalue()


def test_no_bar_is_drawn_between_results_on_a_terminal(generator, monkeypatch, tmp_path):
    (tmp_path / "prompts.txt").write_text("小明\n", encoding="utf-8")
    requests = batch_file.read_requests(str(tmp_path / "prompts.txt"))
    for name in ("stdout", "stderr"):
        file = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        file.isatty = lambda: True
        monkeypatch.setattr(sys, name, file)
    batch_file.run(generator, requests, CONFIG)
    assert json.loads(sys.stdout.buffer.getvalue())["prompt"] == "小明" and sys.stderr.buffer.getvalue() == b""


# ---- going on -----------------------------------------------------------------------------------------------------


def test_a_run_goes_on_after_any_byte_at_which_it_was_killed(generator, write, tmp_path, monkeypatch):
    content = "\n".join(PROMPTS)
    whole = write(content)
    made = []
    real = generator.batch_generate
    monkeypatch.setattr(generator, "batch_generate", lambda prompts, *rest: made.extend(prompts) or real(prompts, *rest))
    ends = [0] + [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    cuts = {0, 1, 13, 14, *(end + d for end in ends[1:-1] for d in (-1, 0, 1)), len(whole) - 1, len(whole)}
    for cut in sorted(cuts):  # 13 and 14 are inside of a character
        (tmp_path / "results.jsonl").write_bytes(whole[:cut])
        made.clear()
        assert write(content) == whole
        assert made == PROMPTS[sum(end <= cut for end in ends[1:]) :]


def test_ctrl_c_leaves_what_is_done(generator, write, tmp_path, monkeypatch, capsys):
    whole = write("\n".join(PROMPTS), output="whole")
    real, calls, written = generator.batch_generate, [], []

    def interrupted(*arguments):
        calls.append(1)
        written.append((tmp_path / "results.jsonl").read_bytes().count(b"\n"))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(generator, "batch_generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write("\n".join(PROMPTS))
    assert parsed((tmp_path / "results.jsonl").read_bytes()) == parsed(whole)[:4]
    assert written == [0, 2, 4]  # a batch is in the file before the next one begins
    assert "holds 4 of 7 results; run the same command again" in capsys.readouterr().err
    assert write("\n".join(PROMPTS)) == whole


@pytest.fixture
def refused(write, tmp_path):
    """The message of a run that leaves the output file as it is."""

    def refused(before, content="\n".join(PROMPTS), config=CONFIG, **arguments):
        (tmp_path / "results.jsonl").write_bytes(before)
        with pytest.raises(UserError) as error:
            write(content, config, **arguments)
        assert (tmp_path / "results.jsonl").read_bytes() == before
        return str(error.value)

    return refused


def test_results_of_other_prompts_are_an_error_and_stay(write, refused):
    whole = write("\n".join(PROMPTS))
    for other in (["小红", *PROMPTS[1:]], PROMPTS[::-1], PROMPTS[:3] + PROMPTS[4:]):
        message = refused(whole, "\n".join(other))
        wrong = next(i for i, (a, b) in enumerate(zip(PROMPTS, other, strict=False), 1) if a != b)
        assert f"results.jsonl:{wrong} is not the result of" in message and f"prompts.txt:{wrong} " in message
    assert "has more lines than there are prompts (6;" in refused(whole, "\n".join(PROMPTS[:6]))
    assert "has more lines than there are prompts (7;" in refused(whole + b"{")
    records = [{"prompt": prompt, "id": i} for i, prompt in enumerate(PROMPTS)]
    assert "results.jsonl:1 is not the result of" in refused(whole, jsonl(*records), name="prompts.jsonl")


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(GenerationConfig)])
def test_results_with_another_setting_are_an_error_and_stay(write, refused, field):
    values = dict(
        do_sample=False,
        use_cache=False,
        truncate_prompt=True,
        stop="。",
        presence_penalty=1.5,
        frequency_penalty=-1.5,
        logit_bias=((3, 1.5),),
        top_p=0.5,
        min_p=0.5,
        top_k=3,
    )
    value = values.get(field, 7)
    first = write("小明\n法").splitlines(keepends=True)[0]
    message = refused(first, "小明\n法", dataclasses.replace(CONFIG, **{field: value}))
    shown = json.loads(json.dumps([value] if isinstance(value, str) else value))
    assert f"results.jsonl:1 was written with {{'{field}': " in message and f"not {{'{field}': {shown!r}" in message


def test_results_of_another_model_or_as_a_chat_are_an_error(generator, write, refused, monkeypatch):
    first = write("小明\n法").splitlines(keepends=True)[0]
    assert "was written with {'chat': False}, not {'chat': True}" in refused(first, "小明\n法", chat=True)
    params = jax.tree.map(lambda p: p.astype("bfloat16"), generator.params)
    monkeypatch.setattr(generator, "params", params)
    assert "results.jsonl:1 was written by another model or in another dtype" in refused(first, "小明\n法")


def test_the_fingerprint_is_of_weights_and_tokenizer(generator, monkeypatch):
    before = batch_file.fingerprint(generator)
    assert batch_file.fingerprint(generator) == before and len(before) == 16
    seen = {before}
    with monkeypatch.context() as patch:
        patch.setattr(generator.tokenizer, "chat_template", "{{ messages }}")
        seen.add(batch_file.fingerprint(generator))
    leaves, tree = jax.tree.flatten(generator.params)
    with monkeypatch.context() as patch:
        changed = leaves[-1].reshape(-1).at[-1].add(1e-3).reshape(leaves[-1].shape)
        patch.setattr(generator, "params", jax.tree.unflatten(tree, [*leaves[:-1], changed]))
        seen.add(batch_file.fingerprint(generator))
    assert len(seen) == 3 and batch_file.fingerprint(generator) == before


@pytest.mark.parametrize(
    "before, line",
    [
        (b"my notes", 1), (b"my notes\n", 1), (b"{}\n", 1), (b"[]\n", 1), (b"\xff\n", 1), (b"\n", 1), (b'{"prompt": "\xe5', 1),
        (b'{"prompt": "\xe5\xb0\x8f\xe6\x98\x8e", "text": 1}\n', 1),
    ],
)  # fmt: skip
def test_a_file_of_something_else_is_an_error_and_stays(refused, before, line):
    content = "法\n小明"
    assert f"results.jsonl:{line} is not a result line (choose another file)" in refused(before, content)


def test_a_torn_line_of_something_else_after_results_is_an_error(write, refused):
    lines = write("小明\n法").splitlines(keepends=True)
    assert "results.jsonl:2 is not a result line" in refused(lines[0] + b'{"prompt": "x', "小明\n法")


def test_outputs_that_cannot_be_written(write, tmp_path):
    assert parsed(write("小明", output="new/folder/results.jsonl"))
    (tmp_path / "folder").mkdir()
    for output in ("folder", "prompts.txt/results.jsonl"):
        with pytest.raises(UserError, match="--output: cannot write"):
            write("小明", output=output)
    with pytest.raises(UserError, match="prompts.txt:1 is not a result line"):  # not its own prompts
        write("小明", output="prompts.txt")
    assert (tmp_path / "prompts.txt").read_text() == "小明"


# ---- the context --------------------------------------------------------------------------------------------------


def test_a_prompt_that_does_not_fit_is_named_before_anything_is_written(generator, write, tmp_path):
    content = "小明\n\n" + "熊" * 200 + "\n法"
    with pytest.raises(
        UserError, match=r"^--batch_file: .*prompts\.txt:3: \d+ tokens leave no room in the model's context of 96"
    ):
        write(content, batch_size=1)
    assert not (tmp_path / "results.jsonl").exists()
    truncating = dataclasses.replace(CONFIG, truncate_prompt=True)
    results = parsed(write(content, truncating, batch_size=1))
    assert results[1]["prompt"] == "熊" * 200 and results[1]["n_prompt_tokens"] == 88
    assert results[1]["text"] == generator.generate("熊" * 200, truncating)


def test_a_dialogue_that_does_not_fit_loses_its_oldest_turns_when_told(generator, write):
    turn = [{"role": "user", "content": "熊猫最爱吃什么？"}, {"role": "assistant", "content": "熊猫最爱吃竹子。"}]
    dialogue = turn * 12 + turn[:1]
    content = jsonl({"prompt": "小明"}, {"messages": dialogue})
    with pytest.raises(
        UserError, match=r"prompts\.jsonl:2: \d+ tokens leave no room .* \(shorten the dialogue, or pass --truncate\)"
    ):
        write(content, name="prompts.jsonl")
    truncating = dataclasses.replace(CONFIG, truncate_prompt=True)
    result = parsed(write(content, truncating, name="prompts.jsonl"))[1]
    read = chat.fit(generator, dialogue, truncating)
    assert 1 < len(read) < len(dialogue) and result["messages"] == dialogue
    assert result["text"] == generator.chat(read, truncating)
    with pytest.raises(UserError, match=r"prompts\.jsonl:1: the last turn alone is too long: \d+ tokens, and at most 88 fit"):
        write(jsonl({"messages": [{"role": "user", "content": "熊" * 200}]}), truncating, name="prompts.jsonl")


# ---- wrong lines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, message",
    [
        (b"{", "is not valid JSON"),
        (b'{"prompt": "\\ud800"}', "is not valid JSON"),
        (b'{"prompt": "x", "score": NaN}', "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"prompt": "\xff"}', "is not UTF-8"),
        (b"3", "holds no prompt"),
        (b'{"id": 3}', "holds no prompt (expected an object with exactly one of ('prompt', 'history', 'messages')"),
        (b'{"prompt": "x", "messages": []}', "holds ['prompt', 'messages']"),
        (b'{"prompt": 3}', "'prompt' is 3 (expected a string)"),
        (b'{"messages": []}', "'messages' is not a dialogue"),
        (b'{"history": [{"role": "user"}]}', "'history' is not a dialogue"),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}', "ends with an assistant turn"),
        (b'{"prompt": "x", "token_ids": 3}', "uses 'token_ids', a field of the results"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "x"}\n' + line + b"\n")
    with pytest.raises(UserError) as error:
        batch_file.read_requests(str(path))
    assert str(error.value).startswith(f"--batch_file: {path}:2") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_wrong_files(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    for name, message in [
        ("empty.txt", "no prompt in"), ("none.txt", "cannot read"), ("", "cannot read"), ("prompts.json", "expected a text file"),
        ("latin.txt", "latin.txt:1 is not UTF-8"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=f"^--batch_file: .*{message}"):
            batch_file.read_requests(str(tmp_path / name))
