"""What a prepared dataset holds."""

import gzip
import io
import json
import random
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow_datasets as tfds

from mateconv_jax.data import dataset
from mateconv_jax.data.dataset import open_dataset
from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib
from mateconv_jax.errors import UserError
from mateconv_jax.training.open_data import DataOptions, open_data
from tests.data.build.preparing import (
    TRAIN_TOKENIZER,
    documents,
    documents_of_text,
    prepare,
    rejected,
    stats,
    streams,
    write_jsonl,
)


def test_the_dataset_holds_every_document_once(tmp_path):
    texts = [f"第{i}个故事：</s>从前有一座山。" for i in range(30)]
    dialogue = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]
    path = write_jsonl(tmp_path / "raw.jsonl", [*({"text": text} for text in texts), {"messages": dialogue}])
    flags = (*TRAIN_TOKENIZER, "--learn", "everything")
    folder = prepare(path, tmp_path / "zh", *flags, "--val_fraction", "0.3", "--chunk_mb", "0.0003")

    # The literal </s> of a text stayed text: no document was cut there.
    turns = ["user\n你好</s>\n", "assistant\n你好！</s>\n"]
    assert sorted(documents(folder)) == sorted([*(f"{text}</s>" for text in texts), *turns])
    info = tfds.builder_from_directory(folder).info
    assert info.splits["train"].num_shards > 3 and info.splits["validation"].num_shards > 3
    metadata = dataset.read_metadata(folder, "")
    assert sum(split["documents"] for split in metadata["splits"].values()) == 31
    assert info.splits["train"].num_examples == metadata["splits"]["train"]["rows"]
    assert info.metadata["tokenizer_fingerprint"] == metadata["tokenizer_fingerprint"]
    assert info.metadata["options"]["cleaning"]["unicode"] == "nfc"
    assert stats(folder)["documents"] == stats(folder)["lines"] == 31
    assert not (tmp_path / "zh.partial").exists()


def test_all_shapes_of_input(tmp_path, monkeypatch):
    raw = [
        {"text": "一"}, {"prompt": "问", "response": "答"}, {"instruction": "译", "input": "春", "output": "spring"},
        {"instruction": "说", "input": "", "output": "好"}, {"messages": [{"role": "system", "content": "令"}]},
    ]  # fmt: skip
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(write_jsonl(tmp_path / "a.jsonl", raw).read_bytes()))
    (tmp_path / "b.txt").write_text("第一段\n还是第一段\n\n第二段\n")
    stdin = SimpleNamespace(buffer=io.BytesIO(b'{"text": "stdin"}\n'))
    monkeypatch.setattr(sys, "stdin", stdin)
    inputs = [tmp_path / "*.gz", tmp_path / "b.txt", "-"]
    flags = (*TRAIN_TOKENIZER, "--val_fraction", "0", "--txt_document", "blank_line", "--learn", "everything")
    assert documents(prepare(inputs, tmp_path / "zh", *flags)) == [
        "一</s>", "user\n问</s>\n", "assistant\n答</s>\n", "user\n译\n春</s>\n", "assistant\nspring</s>\n",
        "user\n说</s>\n", "assistant\n好</s>\n", "system\n令</s>\n", "第一段\n还是第一段</s>", "第二段</s>", "stdin</s>",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "flags, expected",
    [
        ([], ["Ａ<s>甲", "乙乙", "丙", "丙。丙丙丙"]),
        (["--text_key", "body", "--keep_going"], ["别的"]),
        (["--dedup", "none"], ["Ａ<s>甲", "乙乙", "丙", "丙。丙丙丙", "丙"]),
        (["--strip_control_tokens"], ["Ａ甲", "乙乙", "丙", "丙。丙丙丙"]),
        (["--unicode", "nfkc", "--min_chars", "2"], ["A<s>甲", "乙乙", "丙。丙丙丙"]),
        (["--control_characters", "reject"], ["Ａ<s>甲", "丙", "丙。丙丙丙"]),
        (["--max_chars", "3"], ["Ａ<s", ">甲", "乙乙", "丙", "丙。", "丙丙丙"]),
        (["--max_chars", "3", "--too_long", "drop"], ["乙乙", "丙"]),
        (["--min_han_ratio", "0.9"], ["乙乙", "丙"]),
    ],
)
def test_options_of_cleaning(tmp_path, flags, expected):
    raw = [{"text": "Ａ<s>甲", "body": "别的"}, {"text": "乙\x00乙"}, {"text": " 丙 "}, {"text": "丙。丙丙丙"}, {"text": "丙"}]
    path = write_jsonl(tmp_path / "raw.jsonl", raw)
    assert documents_of_text(prepare(path, tmp_path / "zh", *TRAIN_TOKENIZER, "--val_fraction", "0", *flags)) == expected


def test_near_duplicates_are_dropped_on_request(tmp_path):
    rng = random.Random(0)
    original = "".join(chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(300))
    texts = [original, original[:150] + "，" + original[151:], "另一篇文章", original]
    path = write_jsonl(tmp_path / "raw.jsonl", [{"text": text} for text in texts])
    flags = (*TRAIN_TOKENIZER, "--val_fraction", "0")
    exact = prepare(path, tmp_path / "exact", *flags)
    assert rejected(exact) == [(4, "duplicate")] and stats(exact)["duplicates"] == {"exact": 1, "near": 0}
    near = prepare(path, tmp_path / "near", *flags, "--dedup", "near")
    assert rejected(near) == [(2, "near_duplicate"), (4, "duplicate")] and stats(near)["documents"] == 2
    strict = prepare(path, tmp_path / "strict", *flags, "--dedup", "near", "--near_threshold", "0.995")
    assert rejected(strict) == [(4, "duplicate")]


def test_pieces_of_a_document_stay_in_one_split(tmp_path):
    raw = [{"text": f"{i}一二三四。" * 4} for i in range(10, 50)]
    flags = (*TRAIN_TOKENIZER, "--val_fraction", "0.4", "--max_chars", "7")
    folder = prepare(write_jsonl(tmp_path / "raw.jsonl", raw), tmp_path / "zh", *flags)
    of_split = {split: {document[:-9] for document in documents(folder, [split])} for split in ("train", "validation")}
    assert of_split["train"] and of_split["validation"] and not of_split["train"] & of_split["validation"]
    assert stats(folder)["cleaned"]["split"] == 40 and stats(folder)["documents"] == 160


def test_a_bin_file_is_wrapped_as_it_is_and_comes_out_again(tmp_path, dataset_folder):
    tokenizer = dataset_folder / "tokenizer"
    rng = np.random.default_rng(0)
    docs = [np.array([1, *rng.integers(4, 400, rng.integers(1, 60)), 2], np.uint16) for _ in range(50)]
    np.concatenate(docs).tofile(tmp_path / "pretrain_data.bin")
    flags = ("--tokenizer", tokenizer, "--also_bin", "--chunk_mb", "0.001", "--dedup", "none")
    folder = prepare(tmp_path / "pretrain_data.bin", tmp_path / "zh", *flags, "--val_fraction", "0.3")
    found = [np.fromfile(folder / f"{split}.bin", np.uint16) for split in ("train", "validation")]
    assert [len(stream) > 0 for stream in found] == [True, True]
    ours = [tuple(d) for stream in found for d in np.split(stream, np.flatnonzero(stream == 2)[:-1] + 1)]
    assert sorted(ours) == sorted(map(tuple, docs))
    whole = prepare(tmp_path / "pretrain_data.bin", tmp_path / "whole", *flags, "--val_fraction", "0")
    assert (whole / "train.bin").read_bytes() == (tmp_path / "pretrain_data.bin").read_bytes()
    assert stats(whole)["characters_per_token"] is None

    np.array([1, 4, 2, 1, 400, 2], np.uint16).tofile(tmp_path / "pretrain_data.bin")
    folder = prepare(tmp_path / "pretrain_data.bin", tmp_path / "bad", "--tokenizer", tokenizer, "--val_fraction", "0")
    assert rejected(folder) == [(4, "no_such_token")]
    with pytest.raises(UserError, match=r"--train_tokenizer: a \.bin file holds token ids"):
        prepare(tmp_path / "pretrain_data.bin", tmp_path / "no", "--train_tokenizer")


DIALOGUES = [
    [{"role": "user", "content": f"问{i}"}, {"role": "assistant", "content": "答"}, {"role": "user", "content": f"再问{i}"}]
    for i in range(8)
]


def starts_of(folder, tokenizer):
    """The text of each document that rows mark, in order."""
    rows = open_dataset(folder, "", 500).rows("train", (tokenizer.bos_token_id, tokenizer.eos_token_id))
    [tokens], [length], [starts] = map(rows.read(np.arange(1)).get, ("tokens", "length", "document_starts"))
    starts[0] = True  # whatever begins a row
    return [tokenizer.decode(part) for part in np.split(tokens[:length], np.flatnonzero(starts[:length])[1:])]


def test_documents_start_where_they_were_packed_and_not_at_each_turn(tmp_path):
    lines = [*({"messages": messages} for messages in DIALOGUES), {"text": "一"}, {"text": "二"}]
    flags = (*TRAIN_TOKENIZER, "--val_fraction", "0", "--seq_len", "500", "--learn", "everything", "--also_bin")
    folder = prepare(write_jsonl(tmp_path / "raw.jsonl", lines), tmp_path / "zh", *flags)
    tokenizer = tokenizer_lib.load(folder / "tokenizer", "")
    dialogues = [f"<s>user\n问{i}</s>\n<s>assistant\n答</s>\n<s>user\n再问{i}</s>\n" for i in range(8)]
    assert starts_of(folder, tokenizer) == [*dialogues, "<s>一</s>", "<s>二</s>"]
    # A flat file does not say where a dialogue ends; none is ever cut.
    expected = ["".join(dialogues) + "<s>一</s>", "<s>二</s>"]
    assert starts_of(folder / "train.bin", tokenizer) == expected
    wrapped = prepare(folder / "train.bin", tmp_path / "wrapped", "--tokenizer", folder / "tokenizer", *flags[3:-1])
    assert starts_of(wrapped, tokenizer) == expected


def test_a_flat_files_turns_are_no_documents(tmp_path):
    """Equal turns are no duplicates, and none is held out without the others."""
    lines = [{"messages": messages} for messages in DIALOGUES for _ in range(2)]
    flags = ("--val_fraction", "0", "--seq_len", "500", "--learn", "everything")
    folder = prepare(
        write_jsonl(tmp_path / "raw.jsonl", lines), tmp_path / "zh", *TRAIN_TOKENIZER, *flags, "--dedup", "none", "--also_bin"
    )
    wrapped = prepare(folder / "train.bin", tmp_path / "wrapped", "--tokenizer", folder / "tokenizer", *flags, "--also_bin")
    assert (wrapped / "train.bin").read_bytes() == (folder / "train.bin").read_bytes()


def test_control_tokens_in_texts_are_counted(tmp_path, dataset_folder, capsys):
    texts = [{"text": "甲</s>乙<s>"}, {"text": "丙"}, {"prompt": "<s>user", "response": "答"}]
    path = write_jsonl(tmp_path / "raw.jsonl", texts)
    flags = ("--tokenizer", dataset_folder / "tokenizer", "--val_fraction", "0")
    assert stats(prepare(path, tmp_path / "zh", *flags))["control_tokens_as_text"] == 2
    assert "control tokens   spelt out in 2 documents" in capsys.readouterr().out
    assert stats(prepare(path, tmp_path / "stripped", *flags, "--strip_control_tokens"))["control_tokens_as_text"] == 0
    assert "spelt out" not in capsys.readouterr().out


def test_control_tokens_in_texts_may_end_documents(tmp_path, dataset_folder):
    """As in MiniMind's pretrain_hq.jsonl. Each document is one of its own: duplicates among them are dropped."""
    texts = [
        "<|im_start|>甲。<|im_end|> <|im_start|>user\n乙<|im_end|>",
        "丙<|im_end|>\n<|im_start|>甲。</s>",
        "<|im_end|>",
        "没有",
    ]
    path = write_jsonl(tmp_path / "raw.jsonl", [{"text": text} for text in texts])
    flags = ("--tokenizer", dataset_folder / "tokenizer", "--val_fraction", "0")
    folder = prepare(path, tmp_path / "split", *flags, "--split_at_tokens")
    assert documents_of_text(folder) == ["甲。", "乙", "丙", "没有"]
    figures = stats(folder)
    assert figures["control_tokens_as_text"] == 0 and figures["cleaned"]["split_at_tokens"] == 2
    assert figures["rejects"] == {"duplicate": 1, "empty": 1}
    with pytest.raises(UserError, match="split_at_tokens"):
        prepare(path, tmp_path / "split", *flags)


@pytest.mark.slow
def test_they_may_when_the_tokenizer_is_trained(tmp_path):
    path = write_jsonl(tmp_path / "raw.jsonl", [{"text": "<|im_start|>甲<|im_end|> <|im_start|>乙有丙<|im_end|>"}])
    flags = (*TRAIN_TOKENIZER, "--val_fraction", "0")
    assert stats(prepare(path, tmp_path / "plain", *flags))["control_tokens_as_text"] == 1
    assert documents_of_text(prepare(path, tmp_path / "default", *flags, "--split_at_tokens")) == ["甲", "乙有丙"]
    own = ("--split_at_tokens", "有", "<|im_start|>", "<|im_end|>")
    assert documents_of_text(prepare(path, tmp_path / "own", *flags, *own)) == ["甲", "乙", "丙"]


def test_a_vocabulary_may_leave_out_ids(tmp_path, dataset_folder):
    """Its embedding has largest id + 1 rows; `len(tokenizer)` is less."""
    shutil.copytree(dataset_folder / "tokenizer", tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["model"]["vocab"] |= {piece: 420 for piece, token in content["model"]["vocab"].items() if token == 67}
    file.write_text(json.dumps(content), encoding="utf-8")
    tokenizer = tokenizer_lib.load(tmp_path / "tokenizer", "")
    assert len(tokenizer) < tokenizer_lib.vocab_size(tokenizer) == 421
    path = write_jsonl(tmp_path / "raw.jsonl", [{"text": tokenizer.decode([420]) + f"第{i}篇"} for i in range(50)])
    folder = prepare(path, tmp_path / "zh", "--tokenizer", tmp_path / "tokenizer", "--val_fraction", "0")
    assert dataset.read_metadata(folder, "")["vocab_size"] == 421
    assert any(420 in stream for stream in streams(folder, "train"))
    with pytest.raises(UserError, match="model.vocab_size: .*expected at least 421"):
        open_data(DataOptions(str(folder), None, None, 16), len(tokenizer), document_mask=False)
