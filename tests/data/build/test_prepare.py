import filecmp
import gzip
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow_datasets as tfds

from mateconv_jax.data import dataset
from mateconv_jax.data.build import chunk_writer, pipeline, work_folder
from mateconv_jax.data.dataset import open_dataset
from mateconv_jax.data.text import jsonl
from mateconv_jax.data.text.sources import Chunk, Part
from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib
from mateconv_jax.errors import UserError
from mateconv_jax.prepare import main, parse_args
from mateconv_jax.training.open_data import DataOptions, open_data

TRAIN_TOKENIZER = ("--train_tokenizer", "--vocab_size", "300")


def command(path, output, *flags):
    return [
        "--input",
        *map(str, path if isinstance(path, list) else [path]),
        "--output",
        str(output),
        "--seq_len",
        "16",
        *map(str, flags),
    ]


def prepare(path, output, *flags):
    main(parse_args(command(path, output, "--num_workers", "1", *flags)))
    return output


def write_jsonl(path, records):
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def streams(folder, split):
    """What the rows of a split hold, without their overlap: one stream a shard."""
    builder = tfds.builder_from_directory(folder)
    if split not in builder.info.splits:
        return
    rows = iter(builder.as_data_source(split))
    for length in builder.info.splits[split].shard_lengths:
        shard = [next(rows) for _ in range(length)]
        parts = [row["tokens"][1 : row["length"]] for row in shard]
        yield np.concatenate([shard[0]["tokens"][:1], *parts]).tolist()


def documents(folder, splits=("train", "validation")):
    """The texts of a dataset, in order, split at <s>."""
    tokenizer = tokenizer_lib.load(folder / "tokenizer", "")
    found = []
    for split in splits:
        for stream in streams(folder, split):
            starts = [i for i, token in enumerate(stream) if token == tokenizer.bos_token_id]
            assert starts[0] == 0
            for a, b in zip(starts, [*starts[1:], len(stream)], strict=True):
                found.append(tokenizer.decode(stream[a:b]).removeprefix("<s>"))
    return found


def stats(folder):
    return json.loads((folder / "stats.json").read_text(encoding="utf-8"))


def rejected(folder):
    return [(r["line"], r["rule"]) for r in map(json.loads, (folder / "rejected.jsonl").read_text().splitlines())]


# ---- what the dataset holds -----------------------------------------------------------------------------------------


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


def documents_of_text(folder):
    return [document.removesuffix("</s>") for document in documents(folder)]


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


def test_tokenizer_options(tmp_path, dataset_folder):
    path = write_jsonl(tmp_path / "raw.jsonl", [{"text": f"一共有{i}只熊猫。"} for i in range(100, 400)])
    prepare(path, tmp_path / "given", "--tokenizer", dataset_folder / "tokenizer")
    fingerprints = [dataset.read_metadata(f, "")["tokenizer_fingerprint"] for f in (tmp_path / "given", dataset_folder)]
    assert fingerprints[0] == fingerprints[1]

    def vocabulary(name, *flags):
        return tokenizer_lib.load(prepare(path, tmp_path / name, "--train_tokenizer", *flags) / "tokenizer", "").get_vocab()

    assert len(vocabulary("small", "--vocab_size", "270")) == 270
    assert any(len(token) > 1 and token.isdigit() for token in vocabulary("merged", "--vocab_size", "400"))
    assert not any(
        len(token) > 1 and token.isdigit() for token in vocabulary("single", "--vocab_size", "400", "--split_digits")
    )
    assert vocabulary("sampled", "--vocab_size", "400", "--sample_mb", "0.0002") != vocabulary("all", "--vocab_size", "400")


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_nasty_lines_are_counted_and_nothing_stops(tmp_path):
    nasty = {
        b'{"text": "good"}\r\n': None, b'\xef\xbb\xbf{"text": "with a mark"}\n': None, b"{broken\n": "invalid_json",
        b"[1]\n": "not_an_object", b'{"no": 1}\n': "no_text", b'{"text": 3}\n': "no_text", b'{"text": " "}\n': "empty",
        b'{"text": "\\ud800"}\n': "lone_surrogate", b'{"messages": []}\n': "no_text", b'{"text": "\xff"}\n': "invalid_utf8",
        b'{"text": "nul \x00"}\n': "invalid_json", b'{"text": "nul \\u0000"}\n': None, b"[" * 5000 + b"\n": "invalid_json",
        b'{"messages": [{"role": "user"}]}\n': "no_text", b"\n \n": "blank", b'{"text": "' + b"x" * 90_000 + b'"}\n': "line_too_long",
        b'{"text": NaN}\n': "invalid_json", b'{"prompt": "a", "response": null}\n': "no_text", b'{"text": "good"}': "duplicate",
    }  # fmt: skip
    path = tmp_path / "raw.jsonl"
    path.write_bytes(b"".join(nasty))
    folder = prepare(path, tmp_path / "zh", *TRAIN_TOKENIZER, "--val_fraction", "0", "--max_line_mb", "0.05", "--keep_going")
    assert documents_of_text(folder) == ["good", "with a mark", "nul"]
    lines, line = [], 1
    for text, rule in nasty.items():
        lines += [(line, rule)] if rule and rule != "blank" else []
        line += text.count(b"\n")
    assert rejected(folder) == lines
    assert sum(stats(folder)["rejects"].values()) == len(lines) == stats(folder)["lines"] - 3


def test_a_truncated_file_is_an_error_or_used_as_far_as_it_goes(tmp_path):
    data = b"".join(b'{"text": "%d"}\n' % random.Random(i).getrandbits(200) for i in range(3000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data)[:-5000])
    write_jsonl(tmp_path / "b.jsonl", [{"text": "the next one"}])
    inputs, flags = [tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl"], (*TRAIN_TOKENIZER, "--val_fraction", "0")
    with pytest.raises(UserError, match=r"--input: .*a\.jsonl\.gz' could not be read to its end: 1 of .*--keep_going"):
        prepare(inputs, tmp_path / "zh", *flags)
    assert not (tmp_path / "zh").exists()
    folder = prepare(inputs, tmp_path / "zh", *flags, "--keep_going")
    assert [rule for _, rule in rejected(folder)] == ["broken_file"]
    assert documents_of_text(folder)[-1] == "the next one" and stats(folder)["documents"] > 1000


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--input", "none.jsonl"], "--input: no file at 'none.jsonl'"),
        (["--tokenizer", "none"], "--tokenizer: no tokenizer at 'none'"),
        (["--seq_len", "0"], "seq_len: 0 is invalid"),
        (["--val_fraction", "1"], "val_fraction: 1.0 is invalid"),
        (["--num_workers", "0"], "num_workers: 0 is invalid"),
        (["--near_threshold", "1"], "near_threshold: 1.0 is invalid"),
        (["--max_chars", "0"], "max_chars: 0 is invalid"),
        (["--chunk_mb", "0"], "bytes: 0 is invalid"),
        (["--vocab_size", "100"], "vocab_size: 100 is too small"),
        (["--vocab_size", "70000", "--also_bin"], "--also_bin: .* 16-bit"),
    ],
)
def test_impossible_options_write_nothing(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "raw.jsonl", [{"text": "一"}])
    which = [] if "--tokenizer" in flags else ["--train_tokenizer"]
    with pytest.raises(UserError, match=message):
        main(parse_args(["--input", "raw.jsonl", "--output", "zh", "--num_workers", "1", *which, *flags]))
    assert not (tmp_path / "zh").exists()


def test_no_document_is_an_error_with_the_first_reason(tmp_path):
    path = write_jsonl(tmp_path / "raw.jsonl", ["{broken"])
    with pytest.raises(UserError, match=r"no document to train on .*raw\.jsonl:1: not JSON"):
        prepare(path, tmp_path / "zh", *TRAIN_TOKENIZER, "--keep_going")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="no document to train on"):
        prepare(tmp_path / "empty.jsonl", tmp_path / "empty", *TRAIN_TOKENIZER)
    assert not (tmp_path / "zh").exists()


@pytest.mark.parametrize(
    "line, rule, reason",
    [
        (b"{", "invalid_json", "not JSON"), (b"[]", "not_an_object", "not a JSON object but list"),
        (b'{"a": 1}', "no_text", "no key 'text' .*'a'"), (b'{"text": 1}', "no_text", "not text but int"),
        (b'{"text": "\xff"}', "invalid_utf8", "at byte 10"), (b'{"instruction": 3, "output": "a"}', "no_text", "'instruction'"),
    ],
)  # fmt: skip
def test_a_bad_line_says_why(line, rule, reason):
    with pytest.raises(jsonl.Rejected, match=reason) as error:
        jsonl.parse_line(line, "text")
    assert error.value.rule == rule


@pytest.mark.parametrize("template, rule, reason", [
    ("{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}<s>{{ messages[0].content }}</s>", "chat_template", "user first"),
    ("{% for m in messages %}{% if m.role == 'user' %}<s>{{ m.content }}</s>{% endif %}{% endfor %}", "role_not_in_template", "assistant"),
    ("", "chat_template", "no chat template"),
])  # fmt: skip
def test_a_dialogue_that_the_template_cannot_write_is_a_reject(tmp_path, dataset_folder, template, rule, reason):
    shutil.copytree(dataset_folder / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(template)
    if not template:
        (tmp_path / "tokenizer" / "chat_template.jinja").unlink()
    lines = [{"text": f"第{i}篇"} for i in range(4)]
    if template:
        lines[2] = {"messages": [{"role": "user", "content": "你好"}]}
    bad = {"messages": [{"role": "assistant", "content": "好"}]}
    path = write_jsonl(tmp_path / "raw.jsonl", [*lines, bad])
    flags = ("--tokenizer", tmp_path / "tokenizer", "--val_fraction", "0", "--learn", "everything")
    folder = prepare(path, tmp_path / "zh", *flags)
    [reject] = map(json.loads, (folder / "rejected.jsonl").read_text().splitlines())
    assert (reject["line"], reject["rule"]) == (5, rule) and reason in reject["reason"]
    assert stats(folder)["rejects"] == {rule: 1} and stats(folder)["documents"] == 4
    with pytest.raises(
        UserError, match=f"raw.jsonl' is mostly unusable: 1 of 1 records rejected, the first at line 1: .*{reason}"
    ):
        prepare(write_jsonl(path, [bad]), tmp_path / "none", "--tokenizer", tmp_path / "tokenizer")


def test_one_token_is_a_reject_where_it_stands_alone(tmp_path, dataset_folder):
    tokenizer = ("--tokenizer", dataset_folder / "tokenizer", "--val_fraction", "0")
    np.array([2], np.uint16).tofile(tmp_path / "a.bin")
    with pytest.raises(UserError, match="no document to train on .*one token alone"):
        prepare(tmp_path / "a.bin", tmp_path / "none", *tokenizer)
    np.array([1, 5, 2], np.uint16).tofile(tmp_path / "b.bin")
    folder = prepare([tmp_path / "a.bin", tmp_path / "b.bin"], tmp_path / "zh", *tokenizer)
    assert stats(folder)["tokens"] == 4 and stats(folder)["rejects"] == {}
    write_jsonl(tmp_path / "c.jsonl", [{"text": "别的"}])
    folder = prepare([tmp_path / "c.jsonl", tmp_path / "a.bin"], tmp_path / "both", *tokenizer)
    assert rejected(folder) == [(1, "one_token")]


def test_control_tokens_in_texts_are_counted(tmp_path, dataset_folder, capsys):
    texts = [{"text": "甲</s>乙<s>"}, {"text": "丙"}, {"prompt": "<s>user", "response": "答"}]
    path = write_jsonl(tmp_path / "raw.jsonl", texts)
    flags = ("--tokenizer", dataset_folder / "tokenizer", "--val_fraction", "0")
    assert stats(prepare(path, tmp_path / "zh", *flags))["control_tokens_as_text"] == 2
    assert "control tokens   spelt out in 2 documents" in capsys.readouterr().out
    assert stats(prepare(path, tmp_path / "stripped", *flags, "--strip_control_tokens"))["control_tokens_as_text"] == 0
    assert "spelt out" not in capsys.readouterr().out


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


@pytest.mark.parametrize("name, make, hint", [
    ("cut.json", lambda lines: b"[\n" + b",\n".join(lines), "the JSON array has no end"),
    ("objects.json", lambda lines: b"[" + b",".join(lines) + b"]}", "something follows the JSON array"),
    ("packed.jsonl", lambda lines: gzip.compress(b"\n".join(lines)), r"suffix \.gz"),
    ("plain.jsonl.gz", b"\n".join, "incorrect header"),
    ("utf16.jsonl", lambda lines: b"\n".join(lines).decode().encode("utf-16-le"), "--encoding utf-16-le"),
    ("gbk.jsonl", lambda lines: b"\n".join(lines).decode().encode("gb18030"), "--encoding gb18030"),
])  # fmt: skip
def test_a_file_that_would_vanish_is_named(tmp_path, name, make, hint):
    lines = [json.dumps({"text": f"第 {i} 篇文章说的是春天。"}, ensure_ascii=False).encode() for i in range(30)]
    (tmp_path / name).write_bytes(make(lines))
    good = write_jsonl(tmp_path / "good.jsonl", [{"text": f"好{i}"} for i in range(50)])
    with pytest.raises(UserError, match=rf"--input: '.*/{name}' .*{hint}.*--keep_going"):
        prepare([tmp_path / name, good], tmp_path / "zh", *TRAIN_TOKENIZER)
    folder = prepare([tmp_path / name, good], tmp_path / "zh", *TRAIN_TOKENIZER, "--keep_going")
    assert stats(folder)["documents"] >= 50


def test_a_file_that_is_wrong_from_its_beginning_stops_the_work_at_once(tmp_path, dataset_folder, monkeypatch):
    path = write_jsonl(tmp_path / "raw.jsonl", [{"content": f"{i}" * 50} for i in range(20_000)])
    reads = []
    monkeypatch.setattr(pipeline, "_read", lambda chunk, read=pipeline._read: reads.append(chunk.name) or read(chunk))
    with pytest.raises(UserError, match=r"mostly unusable: 1,\d\d\d of 1,\d\d\d records .*no key 'text'"):
        prepare(path, tmp_path / "zh", "--tokenizer", dataset_folder / "tokenizer", "--chunk_mb", "0.05")
    assert len(reads) < 10


def test_one_bad_file_of_many_that_are_a_document_each_is_one_reject(tmp_path, dataset_folder):
    flags = ("--tokenizer", dataset_folder / "tokenizer", "--txt_document", "file", "--val_fraction", "0")
    for i in range(3):
        (tmp_path / f"{i}.txt").write_bytes(b"\xff" if i == 1 else f"第{i}篇".encode())
    assert rejected(prepare(tmp_path / "*.txt", tmp_path / "zh", *flags)) == [(1, "invalid_utf8")]
    (tmp_path / "0.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"--input: .*/0.txt' is mostly unusable: 2 of 3"):
        prepare(tmp_path / "*.txt", tmp_path / "bad", *flags)


def test_a_disk_that_fills_keeps_what_is_finished(tmp_path, dataset_folder):
    small = tmp_path / "small"
    small.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", small]).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        path = write_jsonl(tmp_path / "raw.jsonl", [{"text": f"{i}从前有一座山，山里有一座庙。" * 5} for i in range(2000)])
        flags = ("--tokenizer", dataset_folder / "tokenizer", "--chunk_mb", "0.05")
        with pytest.raises(UserError, match=r"cannot write .*No space left on device .*the same command goes on"):
            prepare(path, small / "zh", *flags)
        done = {p.name: p.stat().st_mtime_ns for p in (small / "zh.partial" / "chunks").iterdir() if p.suffix != ".partial"}
        assert done and not (small / "zh").exists()
        subprocess.run(["mount", "-o", "remount,size=64m", small], check=True)
        prepare(path, small / "zh", *flags)
        assert_equal_datasets(small / "zh", prepare(path, tmp_path / "zh", *flags))
    finally:
        subprocess.run(["umount", small], check=True)


# ---- again, and after a kill ----------------------------------------------------------------------------------------


def assert_equal_datasets(a, b):
    """Byte for byte, but for the seconds in stats.json."""
    names = sorted(str(path.relative_to(a)) for path in a.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(b)) for path in b.rglob("*") if path.is_file())
    match, mismatch, errors = filecmp.cmpfiles(a, b, names, shallow=False)
    assert set(mismatch) <= {"stats.json"} and not errors
    assert {**stats(a), "seconds": 0} == {**stats(b), "seconds": 0}


def test_the_same_command_again_does_nothing_and_another_refuses(tmp_path, capsys):
    path = write_jsonl(tmp_path / "raw.jsonl", [{"text": f"文字{i}"} for i in range(20)])
    prepare(path, tmp_path / "zh", *TRAIN_TOKENIZER)
    before = (tmp_path / "zh" / "dataset_info.json").stat().st_mtime_ns
    prepare(path, tmp_path / "zh", *TRAIN_TOKENIZER)
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "zh" / "dataset_info.json").stat().st_mtime_ns == before
    for flags, message in [
        (["--min_chars", "2"], "cleaning.min_chars=1, not 2 "), (["--dedup", "near"], "dedup='exact', not 'near'"), (["--also_bin"], "also_bin=False"),
        (["--chunk_mb", "1"], "sizes.bytes=16000000, not 1000000 "), (["--seq_len", "17"], "seq_len=16, not 17"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=rf"was made with .*{message}.*--overwrite"):
            prepare(path, tmp_path / "zh", *TRAIN_TOKENIZER, *flags)
    with path.open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(UserError, match=r"another --input: .*raw\.jsonl' had \d+ bytes, now \d+"):
        prepare(path, tmp_path / "zh", *TRAIN_TOKENIZER)
    prepare(path, tmp_path / "zh", *TRAIN_TOKENIZER, "--overwrite", "--val_fraction", "0")
    assert stats(tmp_path / "zh")["documents"] == 21 and not (tmp_path / "zh.partial").exists()


def test_what_was_begun_with_other_options_or_another_input_is_refused(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "raw.jsonl", [{"text": f"文字{i}"} for i in range(100)])
    monkeypatch.setattr(chunk_writer.ChunkWriter, "write_chunk", stop_after(2, chunk_writer.ChunkWriter.write_chunk))
    flags = (*TRAIN_TOKENIZER, "--chunk_mb", "0.0005")
    with pytest.raises(KeyboardInterrupt):
        prepare(path, tmp_path / "zh", *flags)
    monkeypatch.undo()
    assert len(list((tmp_path / "zh.partial" / "chunks").iterdir())) == 2
    with pytest.raises(UserError, match=r"was begun with .*val_fraction=0.01, not 0.5"):
        prepare(path, tmp_path / "zh", *flags, "--val_fraction", "0.5")
    path.write_text(path.read_text().replace("文字1", "文章1"))  # the same size
    with pytest.raises(UserError, match="--input: the content has changed since a tokenizer was trained on it"):
        prepare(path, tmp_path / "zh", *flags)
    prepare(path, tmp_path / "zh", *flags, "--val_fraction", "0", "--overwrite")
    assert "文章1" in documents_of_text(tmp_path / "zh")


def stop_after(n, function):
    calls = []

    def wrapped(*args):
        calls.append(args)
        if len(calls) > n:
            raise KeyboardInterrupt
        return function(*args)

    return wrapped


def test_two_runs_in_one_folder_do_not_mix(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "raw.jsonl", [{"text": "一"}])
    monkeypatch.setattr(work_folder, "LOCK_SECONDS", 0.2)
    with (
        work_folder.opened(tmp_path / "zh.partial", {}, False),
        pytest.raises(UserError, match="another run is writing"),
    ):
        prepare(path, tmp_path / "zh", *TRAIN_TOKENIZER)
    workers = work_folder.hold_for_worker(tmp_path / "zh.partial")  # its parent was killed, and it still writes
    with pytest.raises(UserError, match="another run is writing"):
        prepare(path, tmp_path / "zh", *TRAIN_TOKENIZER, "--overwrite")
    workers.close()
    prepare(path, tmp_path / "zh", *TRAIN_TOKENIZER, "--overwrite")


def test_a_run_waits_for_the_lock_of_one_that_is_dying(tmp_path):
    path = write_jsonl(tmp_path / "raw.jsonl", [{"text": "一"}])
    script = """
import sys, time
from mateconv_jax.data.build import work_folder
with work_folder.opened(__import__("pathlib").Path(sys.argv[1]), {"input": []}, False):
    print("locked", flush=True)
    time.sleep(1.5)
"""
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "zh.partial")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n" and process.poll() is None
    prepare(path, tmp_path / "zh", *TRAIN_TOKENIZER, "--overwrite")
    process.wait()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """1,500 documents with duplicates over all of it and bad lines; and the dataset that one process makes of them."""
    folder = tmp_path_factory.mktemp("kill")
    rng = random.Random(0)
    raw = []
    for i in range(1500):
        text = f"{rng.randrange(600)}：" + "山里有一座庙，庙里有一个老和尚。" * rng.randrange(1, 12)
        raw.append("{broken" if i % 100 == 7 else {"text": text})
    path = write_jsonl(folder / "raw.jsonl", raw)
    flags = ("--train_tokenizer", "--vocab_size", "400", "--chunk_mb", "0.02", "--val_fraction", "0.1", "--dedup", "near")
    return path, flags, prepare(path, folder / "straight", *flags)


@pytest.mark.parametrize("workers", [2, 3])
def test_the_bytes_do_not_depend_on_the_number_of_workers(corpus, tmp_path, workers):
    path, flags, straight = corpus
    main(parse_args(command(path, tmp_path / "zh", *flags, "--num_workers", workers)))
    assert_equal_datasets(tmp_path / "zh", straight)


def test_killed_at_any_moment_it_goes_on_and_the_bytes_are_the_same(corpus, tmp_path):
    path, flags, straight = corpus
    arguments = [sys.executable, "-m", "mateconv_jax.prepare", *command(path, tmp_path / "zh", *flags, "--num_workers", "2")]
    rng, kills, chunks_seen = random.Random(1), 0, set()
    while True:
        process = subprocess.Popen(
            arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        chunks = tmp_path / "zh.partial" / "chunks"
        deadline = time.monotonic() + 120
        if kills < 3:  # somewhere in the work: when some chunks more are there
            goal = len(list(chunks.glob("*"))) + rng.randrange(1, 6)
            while process.poll() is None and len(list(chunks.glob("*"))) < goal and time.monotonic() < deadline:
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)  # the parent alone: its workers must not stay behind
            process.wait()
            kills += process.returncode == -signal.SIGKILL
            chunks_seen.add(len(list(chunks.glob("*[0-9]"))))
        else:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
            break
    assert len(chunks_seen) > 1
    assert_equal_datasets(tmp_path / "zh", straight)


def test_workers_end_with_their_parent(corpus, tmp_path):
    path, flags, _ = corpus
    arguments = [sys.executable, "-m", "mateconv_jax.prepare", *command(path, tmp_path / "zh", *flags, "--num_workers", "2")]
    process = subprocess.Popen(arguments, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "zh.partial" / "chunks").glob("*")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)  # is anyone of its group left?
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    pytest.fail("workers live on")


def die(chunk):
    os.kill(os.getpid(), signal.SIGKILL)


def test_more_chunks_than_files_may_be_open(tmp_path, dataset_folder):
    """All of them are put together, into a flat file too, where 300 files may be open."""
    path = write_jsonl(tmp_path / "raw.jsonl", [{"text": f"第{i:03d}篇"} for i in range(60)])
    flags = ("--tokenizer", dataset_folder / "tokenizer", "--also_bin", "--val_fraction", "0", "--num_workers", "1")
    arguments = command(path, tmp_path / "zh", *flags, "--chunk_mb", "0.000001")
    script = "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300)); from mateconv_jax import prepare; "
    script += "sys.exit(prepare.main(prepare.parse_args(sys.argv[1:])))"
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, stdout=subprocess.DEVNULL)
    assert len(list((tmp_path / "zh").glob("*array_record*"))) == 60
    assert (np.fromfile(tmp_path / "zh" / "train.bin", np.uint16) == 1).sum() == 60


def test_a_worker_that_is_killed_is_a_clear_error(corpus, tmp_path, monkeypatch):
    path, flags, straight = corpus
    monkeypatch.setattr(pipeline, "_read", die)
    with pytest.raises(UserError, match="--num_workers: a worker process was killed.*run the command again"):
        main(parse_args(command(path, tmp_path / "zh", *flags, "--num_workers", "2")))
    monkeypatch.undo()
    assert_equal_datasets(prepare(path, tmp_path / "zh", *flags), straight)


# ---- sampling -------------------------------------------------------------------------------------------------------


def records(n, size=10):
    source = SimpleNamespace(path="a", format="jsonl")
    lines = [(i, b"%0*d" % (size, i)) for i in range(n)]
    return [Chunk(str(i), [Part(source, lines[i : i + 7])]) for i in range(0, n, 7)]


def drawn(chunks, max_bytes, seed=0):
    return [line for chunk in pipeline.sample(chunks, max_bytes, seed) for part in chunk.parts for line, _ in part.records]


def test_a_sample_is_bounded_ordered_and_the_same_for_the_same_seed():
    sample = drawn(records(1000), 300)
    assert len(sample) == 30 and sample == sorted(sample)
    assert sample == drawn(records(1000), 300) != drawn(records(1000), 300, seed=1)
    assert drawn(records(20), 200) == list(range(20))
    long = Chunk("x", [Part(SimpleNamespace(path="a", format="jsonl"), [(1, b"x" * 301)])])
    assert len(drawn([long, *records(1000)], 300, seed=5)) == 30  # a record that is too long alone takes no place


def test_every_record_is_as_likely_in_a_sample():
    counts = np.zeros(50)
    for seed in range(2000):
        counts[drawn(records(50), 100, seed)] += 1
    assert counts.sum() == 2000 * 10
    chi_square = ((counts - 400) ** 2 / 400 / 0.8).sum()
    assert chi_square < 85  # 49 degrees of freedom: 0.1 % of fair samplers are above
