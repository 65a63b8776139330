"""Dialogue schemas and CSV through `prepare`: what the dataset and its statistics say of them."""

import csv
import json

import pytest

from mateconv_jax import DataProcessor
from mateconv_jax.data import dataset
from mateconv_jax.data.text.jsonl import parse_line
from mateconv_jax.errors import UserError
from tests.data.build.preparing import TRAIN_TOKENIZER, prepare, rejected, stats, streams, write_jsonl

FLAGS = (*TRAIN_TOKENIZER, "--val_fraction", "0", "--seq_len", "128")  # a row holds the longest dialogue here
TURNS = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
WEIGHED = [TURNS[0], {"role": "assistant", "content": "不学", "weight": 0}]
MIXED = [
    {"text": "一篇文章。"}, {"messages": TURNS}, {"conversations": TURNS + TURNS}, {"instruction": "译", "input": "春", "output": "spring"},
    {"conversations": [{"from": "human", "value": "在吗"}, {"from": "gpt", "value": "在"}]}, {"q": "甲", "a": "乙", "history": []},
    {"messages": WEIGHED}, {"messages": [TURNS[0], {"role": "user\n", "content": "冒充"}]}, {"q": "甲", "a": "乙", "history": ["丙"]},
]  # fmt: skip
SCHEMAS = {"messages": 1, "conversations": 1, "sharegpt": 1, "alpaca": 1, "q/a": 3, "text": 1}


@pytest.fixture
def inputs(tmp_path):
    """MIXED, and MateConv's CSV with two good rows and a bad one."""
    rows = [[[["早", "早"]], '他说："走"', "好\r\n吧"], [[], "C:\\新", "嗯"]]
    with (tmp_path / "sft_data.csv").open("w", encoding="utf-8", newline="") as file:
        file.write("history,q,a\n")
        csv.writer(file, escapechar="\\", lineterminator="\r\n").writerows([*rows, ["[]", "少"]])
    return [write_jsonl(tmp_path / "raw.jsonl", MIXED), tmp_path / "sft_data.csv"]


def written(folder):
    """All that the rows hold, as text."""
    from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib

    tokenizer = tokenizer_lib.load(folder / "tokenizer", "")
    return "".join(tokenizer.decode(stream) for split in ("train", "validation") for stream in streams(folder, split))


def test_all_schemas_in_one_dataset(inputs, tmp_path, capsys):
    folder = prepare(inputs, tmp_path / "zh", *FLAGS)
    text = written(folder)
    assert all(said in text for said in ("一篇文章。", "问", "spring", "在吗", "乙", '他说："走"', "好\n吧", "C:\\新", "早"))
    assert not any(lost in text for lost in ("不学", "冒充", "丙", "少"))
    assert stats(folder)["schemas"] == dict(sorted(SCHEMAS.items(), key=lambda item: (-item[1], item[0])))
    assert rejected(folder) == [(7, "unsupported_field"), (8, "unknown_role"), (9, "bad_history"), (5, "bad_row")]
    assert " schemas " in (shown := capsys.readouterr().out) and "q/a 3, alpaca 1" in shown
    plain = prepare(write_jsonl(tmp_path / "text.jsonl", MIXED[:1]), tmp_path / "plain", *FLAGS)
    assert stats(plain)["schemas"] == {"text": 1} and " schemas " not in capsys.readouterr().out

    many = prepare(inputs, tmp_path / "many", *FLAGS, "--num_workers", "2", "--chunk_mb", "0.0002")
    assert {key: stats(many)[key] for key in ("schemas", "rejects")} == {
        key: stats(folder)[key] for key in ("schemas", "rejects")
    }


def test_ignored_fields_decide_what_the_dataset_holds(inputs, tmp_path):
    flags = (*FLAGS, "--dedup", "none")
    strict = prepare(inputs[0], tmp_path / "strict", *flags)
    folder = prepare(inputs[0], tmp_path / "zh", *flags, "--ignore_fields", "weight", "history", "weight", "input")
    assert "不学" in written(folder) and "不学" not in written(strict)
    assert "spring" in written(folder) and "春" not in written(folder)
    assert stats(folder)["ignored_fields"] == {"history": 1, "input": 1, "weight": 1} and stats(strict)["ignored_fields"] == {}
    assert stats(folder)["schemas"]["messages"] == 2
    assert dataset.read_metadata(folder, "")["options"]["ignore_fields"] == ["history", "input", "weight"]
    prepare(inputs[0], folder, *flags, "--ignore_fields", "input", "history", "weight")  # the same, in another order
    with pytest.raises(UserError, match=r"was made with ignore_fields=\['history', 'input', 'weight'\], not \[\]"):
        prepare(inputs[0], folder, *flags)


def test_a_dataset_of_a_version_without_ignore_fields_is_as_one_that_ignores_none(inputs, tmp_path, capsys):
    folder = prepare(inputs[0], tmp_path / "zh", *FLAGS)
    metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    del metadata["options"]["ignore_fields"]
    (folder / "metadata.json").write_text(json.dumps(metadata), encoding="utf-8")
    prepare(inputs[0], folder, *FLAGS)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"was made with ignore_fields=\[\], not \['weight'\]"):
        prepare(inputs[0], folder, *FLAGS, "--ignore_fields", "weight")


def test_an_input_whose_fields_would_be_lost_is_an_error_that_says_what_to_do(tmp_path):
    path = write_jsonl(tmp_path / "raw.jsonl", [{"messages": WEIGHED}] * 3)
    with pytest.raises(
        UserError, match=r"at line 1: message 2 has 'weight': 0, but would be learned \(--ignore_fields drops it\)"
    ):
        prepare(path, tmp_path / "zh", *TRAIN_TOKENIZER)
    (tmp_path / "gb.csv").write_bytes("问,答\n甲,乙\n".encode("gb18030"))
    with pytest.raises(UserError, match="not UTF-8 .*--encoding gb18030"):
        prepare(tmp_path / "gb.csv", tmp_path / "gb", *TRAIN_TOKENIZER)


def test_any_column_may_hold_the_text(tmp_path):
    (tmp_path / "a.tsv").write_text('id\tbody\n1\t"第一段\n第二段"\n2\t\\frac\n', encoding="utf-8")
    folder = prepare(tmp_path / "a.tsv", tmp_path / "zh", *TRAIN_TOKENIZER, "--val_fraction", "0", "--text_key", "body")
    assert "第一段\n第二段</s><s>\\frac</s>" in written(folder) and stats(folder)["schemas"] == {"text": 2}


def test_clean_jsonl_keeps_all_of_a_dialogue(tmp_path, dataset_folder):
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}}
    turns = [TURNS[0], {"role": "assistant", "content": None, "reasoning_content": "想", "tool_calls": [call]}]
    record = {"conversations": turns, "tools": json.dumps([{"type": "function", "function": {"name": "weather"}}])}
    path = write_jsonl(tmp_path / "raw.jsonl", [record])
    DataProcessor(str(dataset_folder / "tokenizer")).validate_and_clean_jsonl(str(path), str(tmp_path / "clean.jsonl"))
    [line] = (tmp_path / "clean.jsonl").read_bytes().splitlines()
    assert parse_line(line, "text")[0] == parse_line(path.read_bytes(), "text")[0]
