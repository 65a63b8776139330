"""Input and options that `prepare` rejects, line by line or as a whole."""

import gzip
import json
import random
import shutil

import numpy as np
import pytest

from mateconv_jax.data.build import parallel_chunks
from mateconv_jax.data.text import jsonl
from mateconv_jax.errors import UserError
from mateconv_jax.prepare import main, parse_args
from tests.data.build.preparing import TRAIN_TOKENIZER, documents_of_text, prepare, rejected, stats, write_jsonl


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
        (["--input", "pictures"], r"--input: no file in 'pictures' has a known suffix \(\.jsonl"),
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
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").touch()
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
    monkeypatch.setattr(
        parallel_chunks, "_read", lambda chunk, read=parallel_chunks._read: reads.append(chunk.name) or read(chunk)
    )
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
