import gzip
import json
import random
import shutil
import sys

import pyarrow
import pytest
from pyarrow import parquet

from mateconv_jax.errors import UserError
from mateconv_jax.prepare import main, parse_args
from tests.data.build.preparing import assert_equal_datasets, stats, write_jsonl
from tests.data.text.test_formats import JSONL, tar, zipped


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Two files, one of them compressed, with exact and near duplicates within and across them."""
    folder = tmp_path_factory.mktemp("beam")
    rng = random.Random(0)
    base = ["".join(chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(200)) for _ in range(60)]
    texts = base + rng.sample(base, 20) + [text[:100] + "。" + text[101:] for text in rng.sample(base, 20)]
    rng.shuffle(texts)
    for name, part in (("a.jsonl", texts[:50]), ("b.jsonl", texts[50:])):
        write_jsonl(folder / name, [*({"text": text} for text in part), "{broken"])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress((folder / "b.jsonl").read_bytes()))
    return ["--input", str(folder / "a.jsonl"), str(folder / "b.jsonl.gz")]


FLAGS = ["--seq_len", "16", "--train_tokenizer", "--vocab_size", "300", "--chunk_mb", "0.005", "--val_fraction", "0.1"]


@pytest.mark.parametrize("dedup", ["none", "exact", "near"])
def test_a_beam_pipeline_makes_the_same_bytes(inputs, tmp_path, dedup):
    flags = [*inputs, *FLAGS, "--dedup", dedup]
    main(parse_args([*flags, "--output", str(tmp_path / "local"), "--num_workers", "1"]))
    beam = ["--runner", "DirectRunner", "--direct_num_workers", "1", "--beam_work_folder", str(tmp_path / "work")]
    main(parse_args([*flags, "--output", str(tmp_path / "beam"), *beam]))
    assert_equal_datasets(tmp_path / "beam", tmp_path / "local")
    figures = stats(tmp_path / "beam")
    assert (figures["duplicates"]["exact"] > 10) == (dedup != "none")
    assert (figures["duplicates"]["near"] > 10) == (dedup == "near")
    assert list((tmp_path / "work").glob("*/*/chunk.json"))


def test_chunks_of_another_run_in_the_work_folder_are_not_taken(tmp_path, dataset_folder):
    """Of other input, then with another tokenizer: each dataset is what it is without Beam."""
    shutil.copytree(dataset_folder / "tokenizer", tmp_path / "other")
    template = tmp_path / "other" / "chat_template.jinja"
    template.write_text(template.read_text().replace("</s>", "</s></s>"))
    for name, text, tokenizer in (("a", "甲", dataset_folder / "tokenizer"), ("b", "乙", dataset_folder / "tokenizer"),
                                  ("c", "乙", tmp_path / "other")):  # fmt: skip
        path = write_jsonl(tmp_path / "raw.jsonl", [{"prompt": f"{text}{i}", "response": "答"} for i in range(20)])
        flags = ["--input", str(path), "--seq_len", "40", "--tokenizer", str(tokenizer), "--val_fraction", "0"]
        main(parse_args([*flags, "--output", str(tmp_path / f"local-{name}"), "--num_workers", "1"]))
        beam = ["--runner", "DirectRunner", "--direct_num_workers", "1", "--beam_work_folder", str(tmp_path / "work")]
        main(parse_args([*flags, "--output", str(tmp_path / name), *beam]))
        assert_equal_datasets(tmp_path / name, tmp_path / f"local-{name}")


def test_many_small_inputs_are_joined_by_beam_too(tmp_path, dataset_folder):
    for i in range(50):
        (tmp_path / f"{i:02d}.txt").write_text(f"第{i}篇")
    flags = ["--input", str(tmp_path / "*.txt"), "--seq_len", "16", "--tokenizer", str(dataset_folder / "tokenizer")]
    main(parse_args([*flags, "--output", str(tmp_path / "local"), "--num_workers", "1"]))
    main(parse_args([*flags, "--output", str(tmp_path / "beam"), "--runner", "DirectRunner", "--direct_num_workers", "1"]))
    assert_equal_datasets(tmp_path / "beam", tmp_path / "local")
    assert len(list((tmp_path / "beam").glob("*train.array_record*"))) == 1


def test_inputs_that_workers_cannot_read(tmp_path):
    flags = [*FLAGS, "--output", str(tmp_path / "x"), "--runner", "DirectRunner"]
    with pytest.raises(UserError, match="--input: no file at 'none"):
        main(parse_args(["--input", "none*.jsonl", *flags]))
    with pytest.raises(UserError, match="--input: '-' is this process's"):
        main(parse_args(["--input", "-", *flags]))


def test_flags_that_nobody_takes_are_an_error(inputs, capsys):
    with pytest.raises(SystemExit) as error:
        parse_args([*inputs, *FLAGS, "--output", "x", "--direct_num_workers", "2"])
    assert error.value.code == 2 and "unrecognized arguments: --direct_num_workers" in capsys.readouterr().err


def test_without_beam_the_error_says_what_to_install(inputs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    monkeypatch.delitem(sys.modules, "mateconv_jax.data.build.beam", raising=False)
    monkeypatch.delattr("mateconv_jax.data.build.beam", raising=False)
    with pytest.raises(UserError, match="--runner: Apache Beam is not installed"):
        main(parse_args([*inputs, *FLAGS, "--output", str(tmp_path / "x"), "--runner", "DirectRunner"]))


def test_a_folder_of_many_formats_read_by_beam(tmp_path, dataset_folder):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for name, content in (
        ("a.zip", zipped({"a.txt": "甲\n乙".encode(), "no.md": b""})),
        ("b.tar.gz", gzip.compress(tar({"b.jsonl": JSONL}))),
    ):
        (tmp_path / "in" / name).write_bytes(content)
    (tmp_path / "in" / "sub" / "c.json").write_text('[{"text": "数组"}]', encoding="gb18030")
    (tmp_path / "in" / "sub" / "notes.md").touch()
    parquet.write_table(pyarrow.table({"text": [f"第{i}行" for i in range(100)]}), tmp_path / "in" / "sub" / "d.parquet")
    (tmp_path / "in" / "a.zip").rename(tmp_path / "in" / "A.ZIP")
    flags = ["--input", str(tmp_path / "in"), "--encoding", "GBK", "--seq_len", "16", "--keep_going"]
    flags += ["--tokenizer", str(dataset_folder / "tokenizer")]
    main(parse_args([*flags, "--output", str(tmp_path / "local"), "--num_workers", "1"]))
    main(parse_args([*flags, "--output", str(tmp_path / "beam"), "--runner", "DirectRunner", "--direct_num_workers", "1"]))
    assert_equal_datasets(tmp_path / "beam", tmp_path / "local")
    assert json.loads((tmp_path / "beam" / "stats.json").read_text())["documents"] > 100
