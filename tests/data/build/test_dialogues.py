"""Dialogues in a prepared dataset: whole in their rows, and which of their tokens are learned."""

import filecmp
import json
import random

import numpy as np
import pytest
from hypothesis import given, strategies as st

from mateconv_jax.data.build import packing
from mateconv_jax.data.build.dialogues import split_turns
from mateconv_jax.data.dataset import open_dataset
from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib
from tests.data.build.preparing import prepare, rejected, stats, write_jsonl


def dialogue(*contents, system=None):
    """Questions and answers in turn."""
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return {"messages": [*([{"role": "system", "content": system}] if system else []), *messages]}


def rows_of(folder, split="train"):
    rows = open_dataset(folder, "", 0).rows(split, (1, 2))
    return rows.read(np.arange(len(rows)))


def documents_of(folder, split="train"):
    """(text, text of what is learned) of each document, in the order of rows."""
    tokenizer = tokenizer_lib.load(folder / "tokenizer", "")
    rows, found = rows_of(folder, split), []
    for tokens, length, starts, learned in zip(
        *(rows[k] for k in ("tokens", "length", "document_starts", "learned")), strict=True
    ):
        assert not learned[length:].any() and not tokens[length:].any()
        bounds = [0, *np.flatnonzero(starts[1:length]) + 1, length]
        for a, b in zip(bounds, bounds[1:], strict=False):
            found.append((tokenizer.decode(tokens[a:b]), tokenizer.decode(tokens[a:b][learned[a:b]])))
    return found


def flags(dataset_folder, *more, seq_len=60):
    return ("--tokenizer", dataset_folder / "tokenizer", "--val_fraction", "0", "--seq_len", seq_len, *more)


# ---- what is learned ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learn, expected", [("assistant", "好。</s>很好。</s>"), ("last", "很好。</s>"), ("everything", None)])
def test_what_is_learned_of_a_dialogue(tmp_path, dataset_folder, learn, expected):
    path = write_jsonl(tmp_path / "raw.jsonl", [dialogue("吃了吗？", "好。", "真的？", "很好。", system="少说。")])
    folder = prepare(path, tmp_path / "zh", *flags(dataset_folder, "--learn", learn, seq_len=100))
    text = (
        "<s>system\n少说。</s>\n<s>user\n吃了吗？</s>\n<s>assistant\n好。</s>\n<s>user\n真的？</s>\n<s>assistant\n很好。</s>\n"
    )
    if learn == "everything":
        assert "learned" not in rows_of(folder)
        assert stats(folder)["targets"] == stats(folder)["tokens"] - 1
    else:
        assert documents_of(folder) == [(text, expected)]
        n_learned = len(tokenizer_lib.encode(tokenizer_lib.load(folder / "tokenizer", ""), [expected.replace("</s>", "")])[0])
        assert stats(folder)["targets"] == n_learned + expected.count("</s>")


def test_texts_and_dialogues_in_one_dataset(tmp_path, dataset_folder):
    """Shards without dialogues say, too, what is learned: everything."""
    texts = [{"text": f"第{i}个故事：从前有一座山。"} for i in range(6)]
    path = write_jsonl(tmp_path / "raw.jsonl", [*texts, dialogue("甲", "乙"), *({"text": f"又{i}"} for i in range(3))])
    folder = prepare(path, tmp_path / "zh", *flags(dataset_folder, "--chunk_mb", "0.0002", seq_len=200))
    found = documents_of(folder)
    assert ("<s>user\n甲</s>\n<s>assistant\n乙</s>\n", "乙</s>") in found and len(found) == 10
    assert all(text == learned for text, learned in found if "user" not in text)
    assert stats(folder)["splits"]["train"]["documents"] == 10 and stats(folder)["filled_share"] < 1


def test_a_dialogue_without_an_answer_is_a_reject(tmp_path, dataset_folder):
    path = write_jsonl(tmp_path / "raw.jsonl", [dialogue("甲", "乙"), dialogue("丙"), dialogue("丁", "戊")])
    folder = prepare(path, tmp_path / "zh", *flags(dataset_folder))
    assert rejected(folder) == [(2, "nothing_to_learn")]


# ---- too long for a row ---------------------------------------------------------------------------------------------


def test_a_dialogue_too_long_for_a_row_loses_its_oldest_turns(tmp_path, dataset_folder):
    contents = [text for i in range(8) for text in (f"问{i}", f"答{i}")]
    path = write_jsonl(tmp_path / "raw.jsonl", [dialogue(*contents, system="令"), dialogue("甲", "乙")])
    tokenizer = tokenizer_lib.load(dataset_folder / "tokenizer", "")
    [(text, learned), _] = documents_of(prepare(path, tmp_path / "zh", *flags(dataset_folder, seq_len=80)))
    n = learned.count("</s>")
    assert 1 < n < 8 and learned == "".join(f"答{i}</s>" for i in range(8 - n, 8))
    assert text.startswith("<s>system\n令</s>\n") and text.endswith("答7</s>\n") and text.count("<s>user") == n
    assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= 81
    one_more = text.replace("</s>\n", f"</s>\n<s>user\n问{7 - n}</s>\n<s>assistant\n答{7 - n}</s>\n", 1)
    assert len(tokenizer(one_more, add_special_tokens=False)["input_ids"]) > 81
    assert stats(tmp_path / "zh")["cleaned"] == {"oldest_turns": 1}

    folder = prepare(path, tmp_path / "drop", *flags(dataset_folder, "--too_long_dialogue", "drop", seq_len=80))
    assert rejected(folder) == [(1, "too_long_dialogue")] and len(documents_of(folder)) == 1


def test_a_last_turn_that_does_not_fit_is_a_reject(tmp_path, dataset_folder):
    path = write_jsonl(tmp_path / "raw.jsonl", [dialogue("甲", "乙", "丙" * 100, "丁"), dialogue("甲", "乙")])
    folder = prepare(path, tmp_path / "zh", *flags(dataset_folder))
    [reject] = map(json.loads, (folder / "rejected.jsonl").read_text().splitlines())
    assert reject["rule"] == "too_long_dialogue" and "in the last turn alone (a row holds 61)" in reject["reason"]


def test_turns_begin_with_a_question():
    roles = "system developer assistant user user assistant tool assistant user assistant".split()
    head, turns = split_turns([{"role": role} for role in roles])
    assert [m["role"] for m in head] == ["system", "developer"]
    assert [[m["role"] for m in turn] for turn in turns] == [
        ["assistant"], ["user", "user", "assistant", "tool", "assistant"], ["user", "assistant"],
    ]  # fmt: skip


# ---- packing --------------------------------------------------------------------------------------------------------


@given(st.integers(2, 60).flatmap(lambda room: st.tuples(st.just(room), st.lists(st.integers(1, room), max_size=60))))
def test_best_fit_loses_nothing_and_no_two_bins_could_be_one(case):
    room, sizes = case
    bins = packing.best_fit(sizes, room)
    assert sorted(item for items in bins for item in items) == list(range(len(sizes)))
    filled = sorted(sum(sizes[item] for item in items) for items in bins)
    assert all(items == sorted(items) for items in bins) and bins == sorted(bins)
    assert filled == [] or filled[-1] <= room and (len(filled) < 2 or filled[0] + filled[1] > room)


def test_rows_are_filled_to_95_percent(tmp_path, dataset_folder):
    """With ordinary dialogues, of up to half a row."""
    rng = random.Random(0)
    lines = [dialogue("问" * rng.randint(1, 40), "答" * rng.randint(1, 60)) for _ in range(800)]
    folder = prepare(write_jsonl(tmp_path / "raw.jsonl", lines), tmp_path / "zh", *flags(dataset_folder, seq_len=512))
    assert stats(folder)["filled_share"] >= 0.95
    assert rows_of(folder)["length"].sum() == stats(folder)["tokens"]


def test_bytes_do_not_depend_on_workers(tmp_path, dataset_folder):
    rng = random.Random(1)
    lines = [dialogue(f"问{i}" * rng.randint(1, 9), f"答{i}") if i % 3 else {"text": f"文{i}" * 9} for i in range(300)]
    path = write_jsonl(tmp_path / "raw.jsonl", lines)
    common = flags(dataset_folder, "--chunk_mb", "0.003", "--val_fraction", "0.2")
    one, two = prepare(path, tmp_path / "one", *common), prepare(path, tmp_path / "two", *common, "--num_workers", "2")
    names = sorted(file.name for file in one.glob("mateconv-*"))
    assert len(names) > 6 and names == sorted(file.name for file in two.glob("mateconv-*"))
    assert filecmp.cmpfiles(one, two, names, shallow=False)[0] == names
    assert filecmp.cmp(one / "rejected.jsonl", two / "rejected.jsonl", shallow=False)
