import json

import numpy as np
import pytest
import tensorflow_datasets as tfds

from mateconv_jax.data import dataset, jsonl, tokenizer as tokenizer_lib
from mateconv_jax.errors import UserError
from mateconv_jax.prepare import main, parse_args


def prepare(path, output, *flags):
    main(parse_args(["--input", str(path), "--output", str(output), "--seq_len", "16", *flags]))


def write_jsonl(path, records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in records))
    return path


def streams(folder, split):
    """What the rows of a split hold, without their overlap: one stream a shard."""
    builder = tfds.builder_from_directory(folder)
    rows = iter(builder.as_data_source(split))
    for length in builder.info.splits[split].shard_lengths:
        shard = [next(rows) for _ in range(length)]
        parts = [row["tokens"][1 : row["length"]] for row in shard]
        yield np.concatenate([shard[0]["tokens"][:1], *parts]).tolist()


def test_the_dataset_holds_every_document_once(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "CHUNK_CHARACTERS", 40)  # several shards
    texts = [f"第{i}个故事：</s>从前有一座山。" for i in range(30)]
    dialogue = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]
    path = write_jsonl(tmp_path / "raw.jsonl", [*({"text": text} for text in texts), {"messages": dialogue}])
    prepare(path, tmp_path / "zh", "--train_tokenizer", "--vocab_size", "300", "--val_fraction", "0.3")

    tokenizer = tokenizer_lib.load(tmp_path / "zh" / "tokenizer", "")
    documents, n_shards = [], 0
    for split in ("train", "validation"):
        for stream in streams(tmp_path / "zh", split):
            n_shards += 1
            ends = [i + 1 for i, token in enumerate(stream) if token == tokenizer.eos_token_id]
            documents += [tokenizer.decode(stream[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
    # The literal </s> of a text stayed text: no document was cut there.
    turns = ["<s>user\n你好</s>", "\n<s>assistant\n你好！</s>"]
    assert sorted(d for d in documents if d not in turns and d != "\n") == sorted(f"<s>{text}</s>" for text in texts)
    assert set(turns) <= set(documents)
    assert n_shards > 4

    metadata = dataset.read_metadata(tmp_path / "zh", "")
    assert sum(split["documents"] for split in metadata["splits"].values()) == 31
    info = tfds.builder_from_directory(tmp_path / "zh").info
    assert info.splits["train"].num_examples == metadata["splits"]["train"]["rows"]


def test_broken_lines_are_skipped_and_said(tmp_path, capsys):
    records = [
        {"text": "好的文字。"},
        "{broken",
        "[1]",
        {"no": 1},
        {"text": 3},
        {"text": " "},
        '{"text": "\\ud800"}',
        {"messages": []},
    ]
    path = write_jsonl(tmp_path / "raw.jsonl", records)
    path.write_bytes(path.read_bytes() + b'{"text": "\xff"}\n')
    prepare(path, tmp_path / "zh", "--train_tokenizer", "--vocab_size", "300", "--val_fraction", "0")
    printed = capsys.readouterr().out
    assert "raw.jsonl:2: not JSON" in printed and "skipped 8 lines in all" in printed
    assert dataset.read_metadata(tmp_path / "zh", "")["splits"]["train"]["documents"] == 1


@pytest.mark.parametrize(
    "line, reason",
    [
        (b"{", "not JSON"), (b"[]", "not a JSON object but list"), (b'{"a": 1}', "no key 'text' .*'a'"),
        (b'{"text": 1}', "not text but int"), (b'{"text": ""}', "empty"), (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "\\ud800"}', "surrogate"), (b'{"messages": [{"role": "user"}]}', "messages"),
    ],
)  # fmt: skip
def test_a_bad_line_says_why(line, reason):
    with pytest.raises(ValueError, match=reason):
        jsonl.parse_line(line, "text")


def test_the_same_command_again_does_nothing_and_another_refuses(tmp_path, capsys):
    path = write_jsonl(tmp_path / "raw.jsonl", [{"text": f"文字{i}"} for i in range(20)])
    prepare(path, tmp_path / "zh", "--train_tokenizer", "--vocab_size", "300")
    before = (tmp_path / "zh" / "dataset_info.json").stat().st_mtime_ns
    prepare(path, tmp_path / "zh", "--train_tokenizer", "--vocab_size", "300")
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "zh" / "dataset_info.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"vocab_size=300, not 280 .*--overwrite"):
        prepare(path, tmp_path / "zh", "--train_tokenizer", "--vocab_size", "280")
    prepare(path, tmp_path / "zh", "--train_tokenizer", "--vocab_size", "280", "--overwrite")
    assert dataset.read_metadata(tmp_path / "zh", "")["options"]["vocab_size"] == 280


def test_an_existing_tokenizer_is_used(tmp_path, dataset_folder):
    path = write_jsonl(tmp_path / "raw.jsonl", [{"text": "熊猫最爱吃竹子。"}])
    prepare(path, tmp_path / "zh", "--tokenizer", str(dataset_folder / "tokenizer"), "--val_fraction", "0")
    fingerprints = [dataset.read_metadata(f, "")["tokenizer_fingerprint"] for f in (tmp_path / "zh", dataset_folder)]
    assert fingerprints[0] == fingerprints[1]


def test_no_input_and_no_document_are_errors(tmp_path):
    with pytest.raises(UserError, match="--input: no file at"):
        prepare(tmp_path / "none.jsonl", tmp_path / "zh", "--train_tokenizer")
    empty = write_jsonl(tmp_path / "raw.jsonl", ["{broken"])
    with pytest.raises(UserError, match=r"--input: no document in .*raw\.jsonl:1: not JSON"):
        prepare(empty, tmp_path / "zh", "--train_tokenizer", "--vocab_size", "300")
    assert not (tmp_path / "zh").exists()


def test_a_large_vocabulary_is_stored_in_32_bits():
    assert dataset.features(8, 2**16)["tokens"].np_dtype == np.uint16
    assert dataset.features(8, 2**16 + 1)["tokens"].np_dtype == np.uint32
