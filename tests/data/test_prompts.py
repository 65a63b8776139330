"""A file of prompts."""

import json

import pytest

from mateconv_jax.data import prompts as prompts_lib
from mateconv_jax.data.prompts import read_prompts
from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib
from mateconv_jax.data.tokenizer.chat import encode_chat
from mateconv_jax.errors import UserError

QUESTION = {"role": "user", "content": "熊猫最爱吃什么？"}


@pytest.fixture(scope="module")
def tokenizer(dataset_folder):
    return tokenizer_lib.load(dataset_folder / "tokenizer", "")


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_texts_and_dialogues_are_prompts(tmp_path, tokenizer):
    dialogue = {"messages": [QUESTION, {"role": "assistant", "content": "竹子。"}]}
    path = write(tmp_path / "a.jsonl", {"prompt": "春天", "n": 1}, {"prompt": [QUESTION], "answer": "竹子"}, "", dialogue)
    prompts = read_prompts(path, "key", tokenizer, 64, rows_per_prompt=8)
    chat = encode_chat(tokenizer, [QUESTION], add_generation_prompt=True)
    assert prompts.ids == [[tokenizer.bos_token_id, *tokenizer_lib.encode(tokenizer, ["春天"])[0]], chat, chat]
    assert prompts.prompts == ["春天", [QUESTION], [QUESTION]] and prompts.records[2] == dialogue
    assert (prompts.n_prompts, len(prompts), prompts.longest) == (3, 24, len(chat))
    batch = prompts.read([0, 7, 8, 23])
    assert batch["length"].tolist() == [len(prompts.ids[0])] * 2 + [len(chat)] * 2


def test_lines_that_cannot_be_used_are_counted(tmp_path, tokenizer, monkeypatch):
    said = []
    monkeypatch.setattr(prompts_lib.logging, "warning", lambda text, *args: said.append(text % args))
    bad = ["{", "[1]", {"text": "x"}, {"prompt": 3}, {"prompt": []}, {"messages": [{"role": "assistant", "content": "x"}]}]
    path = write(tmp_path / "a.jsonl", {"prompt": "春天"}, *bad, {"prompt": "很长" * 40})
    assert read_prompts(path, "key", tokenizer, 20).n_prompts == 1
    assert [line.partition("a.jsonl: ")[2] for line in said] == [
        "skipped 1 lines: not JSON (line 2)",
        'skipped 2 lines: no "prompt" and no "messages" (line 3, 4)',
        "skipped 1 lines: neither a text nor messages (line 5)",
        "skipped 2 lines: no message to answer (line 6, 7)",
        "skipped 1 lines: longer than 20 tokens (line 8)",
    ]


def test_a_file_without_prompts(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"data\.train_data_path: no prompt in .*b\.jsonl' \(not JSON; expected JSONL"):
        read_prompts(write(tmp_path / "b.jsonl", "{"), "data.train_data_path", tokenizer, 20)
    with pytest.raises(UserError, match="key: cannot read .*none.jsonl' .No such file"):
        read_prompts(tmp_path / "none.jsonl", "key", tokenizer, 20)


def test_a_changed_answer_changes_the_fingerprint(tmp_path, tokenizer):
    from mateconv_jax.data.dataset import fingerprint

    prompts = [
        read_prompts(write(tmp_path / "a.jsonl", {"prompt": "春天", "answer": answer}), "key", tokenizer, 20)
        for answer in (1, 2, 1)
    ]
    first, second, third = (fingerprint(p, len(p)) for p in prompts)
    assert first == third != second
