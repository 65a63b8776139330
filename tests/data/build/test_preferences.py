"""Preferences in a prepared dataset: a row is a pair, and only the answers are learned."""

import json

import numpy as np
import pytest

from mateconv_jax.data.build import chunk_writer
from mateconv_jax.data.dataset import open_dataset
from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib
from mateconv_jax.errors import UserError
from mateconv_jax.prepare import main, parse_args
from tests.data.build.preparing import assert_equal_datasets, prepare, rejected, stats, stop_after, write_jsonl
from tests.data.text.test_preference_schemas import ASK, BAD, EARLIER, GOOD

PAIR = {"chosen": [*EARLIER, ASK, GOOD], "rejected": [*EARLIER, ASK, BAD]}


def flags(dataset_folder, *more, seq_len=80):
    return ("--tokenizer", dataset_folder / "tokenizer", "--val_fraction", "0", "--seq_len", seq_len, *more)


def many(n):
    return [{"prompt": f"第{i}问？", "chosen": f"好{i}。", "rejected": f"不好{i}。" * (1 + i % 3)} for i in range(n)]


def test_a_row_is_a_pair_of_which_the_answers_are_learned(tmp_path, dataset_folder):
    folder = prepare(write_jsonl(tmp_path / "raw.jsonl", [PAIR]), tmp_path / "pairs", *flags(dataset_folder))
    dataset = open_dataset(folder, "", 0)
    assert dataset.content == "pairs" and dataset.n_rows("train") == 1
    batch = dataset.rows("train").read(np.array([0]))
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
        "tokens": ((1, 2, 81), np.dtype(np.uint16)), "length": ((1, 2), np.dtype(np.int32)), "learned": ((1, 2, 81), np.dtype(bool))
    }  # fmt: skip
    tokenizer = tokenizer_lib.load(folder / "tokenizer", "")
    prompt = "<s>user\n在吗？</s>\n<s>assistant\n在。</s>\n<s>user\n几点了？</s>\n<s>assistant\n"
    for tokens, length, learned, answer in zip(
        batch["tokens"][0], batch["length"][0], batch["learned"][0], ("三点。</s>", "不知道。</s>"), strict=True
    ):
        assert tokenizer.decode(tokens[:length]) == f"{prompt}{answer}\n"
        assert tokenizer.decode(tokens[learned]) == answer  # of the prompt's own answer nothing
        assert not tokens[length:].any() and not learned[length:].any()
    figures = stats(folder)
    assert figures["pairs"] == figures["rows"] == figures["documents"] == 1
    assert figures["tokens"] == batch["length"].sum() and figures["targets"] == batch["learned"].sum()
    assert figures["filled_share"] == pytest.approx(batch["length"].sum() / (2 * 81), abs=1e-6)
    assert figures["document_length"]["max"] == batch["length"].max()


def test_pairs_of_which_nothing_can_be_learned_are_counted(tmp_path, dataset_folder, capsys):
    long = "长" * 90
    records = [PAIR, {"prompt": "甲", "chosen": "乙", "rejected": "乙 "}, {"prompt": "甲", "chosen": "", "rejected": "丙"},
               {"prompt": "甲", "chosen": long, "rejected": "丙"}, {"prompt": "甲", "chosen": "丙", "rejected": long}, PAIR]  # fmt: skip
    folder = prepare(write_jsonl(tmp_path / "raw.jsonl", records), tmp_path / "pairs", *flags(dataset_folder))
    assert rejected(folder) == [
        (2, "equal_answers"), (3, "empty"), (4, "too_long_pair"), (5, "too_long_pair"), (6, "duplicate"),
    ]  # fmt: skip
    assert " pairs " in capsys.readouterr().out
    with pytest.raises(UserError, match="only the answers can be learned .expected --learn assistant"):
        prepare(tmp_path / "raw.jsonl", tmp_path / "all", *flags(dataset_folder, "--learn", "everything"))


@pytest.mark.parametrize("other", [{"text": "一篇文章。"}, {"q": "甲", "a": "乙"}])
def test_pairs_and_texts_are_two_datasets(tmp_path, dataset_folder, other):
    path = write_jsonl(tmp_path / "raw.jsonl", [other, PAIR])
    with pytest.raises(
        UserError, match=r"preferences \('.*raw.jsonl:2'\) and texts or dialogues \('.*raw.jsonl:1'\) cannot be"
    ):
        prepare(path, tmp_path / "zh", *flags(dataset_folder))


def test_the_same_bytes_whatever_the_workers_and_kills(tmp_path, dataset_folder, monkeypatch):
    path = write_jsonl(tmp_path / "raw.jsonl", many(60))
    common = flags(dataset_folder, "--chunk_mb", "0.001", "--val_fraction", "0.1")
    once = prepare(path, tmp_path / "once", *common)
    assert stats(once)["splits"]["validation"]["pairs"] > 0 and json.loads((once / "dataset_info.json").read_text())
    assert len(list(once.glob("mateconv-train*"))) > 3
    with monkeypatch.context() as patch:
        patch.setattr(chunk_writer.ChunkWriter, "write_chunk", stop_after(2, chunk_writer.ChunkWriter.write_chunk))
        with pytest.raises(KeyboardInterrupt):
            prepare(path, tmp_path / "again", *common)
    assert_equal_datasets(prepare(path, tmp_path / "again", *common), once)


@pytest.mark.slow
def test_the_same_bytes_with_two_workers_and_with_beam(tmp_path, dataset_folder):
    path = write_jsonl(tmp_path / "raw.jsonl", many(60))
    common = flags(dataset_folder, "--chunk_mb", "0.001", "--val_fraction", "0.1")
    once = prepare(path, tmp_path / "once", *common)
    assert_equal_datasets(prepare(path, tmp_path / "two", *common, "--num_workers", "2"), once)
    beam = ("--runner", "DirectRunner", "--direct_num_workers", "1", "--beam_work_folder", tmp_path / "work")
    main(parse_args(["--input", str(path), "--output", str(tmp_path / "beam"), *map(str, (*common, *beam))]))
    assert_equal_datasets(tmp_path / "beam", once)


def test_a_bin_file_of_pairs_is_not_written(tmp_path, dataset_folder, capsys):
    path = write_jsonl(tmp_path / "raw.jsonl", [PAIR])
    folder = prepare(path, tmp_path / "pairs", *flags(dataset_folder, "--also_bin"))
    assert not list(folder.glob("*.bin")) and "cannot hold pairs" in capsys.readouterr().err
