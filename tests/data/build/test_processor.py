import json

import numpy as np
import pytest

from mateconv_jax import DataProcessor
from mateconv_jax.data import dataset
from mateconv_jax.errors import UserError
from tests.data.build.preparing import documents_of_text, write_jsonl


@pytest.fixture
def raw(tmp_path):
    records = [{"text": f"第{i}个\r\n故事"} for i in range(6)] + ["{broken", {"text": "第0个\n故事"}, {"text": "太长" * 40}]
    return write_jsonl(tmp_path / "raw.jsonl", records)


@pytest.fixture
def processor(dataset_folder):
    return DataProcessor(str(dataset_folder / "tokenizer"), max_length=32, chunk_size=4)


def test_validate_and_clean_jsonl(processor, raw, tmp_path):
    counts = processor.validate_and_clean_jsonl(str(raw), str(tmp_path / "clean.jsonl"))
    assert counts == {"lines": 9, "documents": 6, "invalid_json": 1, "duplicate": 1, "too_long": 1}
    lines = (tmp_path / "clean.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"text": f"第{i}个\n故事"} for i in range(6)]
    rejects = map(json.loads, (tmp_path / "clean.jsonl.rejected.jsonl").read_text().splitlines())
    assert [(r["line"], r["rule"]) for r in rejects] == [(7, "invalid_json"), (8, "duplicate"), (9, "too_long")]


def test_process_dataset_makes_a_folder_of_chunks(processor, raw, tmp_path):
    with pytest.raises(UserError, match="save_statistics: nothing was processed"):
        processor.save_statistics(str(tmp_path / "stats.json"))
    figures = processor.process_dataset(str(raw), str(tmp_path / "zh"))
    assert figures["documents"] == 6 and set(documents_of_text(tmp_path / "zh")) == {f"第{i}个\n故事" for i in range(6)}
    metadata = dataset.read_metadata(tmp_path / "zh", "")
    assert metadata["seq_len"] == 32 and metadata["options"]["sizes"]["records"] == 4
    processor.save_statistics(str(tmp_path / "stats.json"))
    assert json.loads((tmp_path / "stats.json").read_text()) == figures
    assert processor.process_dataset(str(raw), str(tmp_path / "zh")) == figures  # was there
    other = DataProcessor(processor.tokenizer_path, max_length=16)
    with pytest.raises(UserError, match="seq_len=32, not 16"):
        other.process_dataset(str(raw), str(tmp_path / "zh"))
    assert other.process_dataset(str(raw), str(tmp_path / "zh"), resume=False)["rows"] > figures["rows"]


def test_process_dataset_writes_a_flat_file(processor, raw, tmp_path):
    figures = processor.process_dataset(str(raw), str(tmp_path / "pretrain_data.bin"))
    tokens = np.fromfile(tmp_path / "pretrain_data.bin", np.uint16)
    assert len(tokens) == figures["tokens"] and (tokens == 1).sum() == (tokens == 2).sum() == 6


SNIPPET = """
processor = OptimizedDataProcessor(
    tokenizer_path=TOKENIZER,
    max_length=512,
    chunk_size=50000,
    save_interval=4
)
processor.validate_and_clean_jsonl(
    input_path='./dataset/raw_data.jsonl',
    output_path='./dataset/cleaned_data.jsonl'
)
processor.process_dataset(
    input_path='./dataset/cleaned_data.jsonl',
    output_path='./dataset/pretrain_data.bin',
    resume=True
)
processor.save_statistics('./dataset/data_stats.json')
"""


def test_the_pytorch_mateconvs_script_runs_with_its_import_changed(dataset_folder, tmp_path, monkeypatch):
    """By the names of its arguments. A chunk, the durable unit, has save_interval records at most."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dataset").mkdir()
    write_jsonl(tmp_path / "dataset" / "raw_data.jsonl", [{"text": f"第{i}个故事"} for i in range(10)])
    names = {"TOKENIZER": str(dataset_folder / "tokenizer")}
    exec("from mateconv_jax import DataProcessor as OptimizedDataProcessor" + SNIPPET, names)
    assert (np.fromfile("dataset/pretrain_data.bin", np.uint16) == 2).sum() == 10
    assert json.loads((tmp_path / "dataset" / "data_stats.json").read_text(encoding="utf-8"))["documents"] == 10
    shards = list((tmp_path / "dataset" / "pretrain_data.bin.dataset").glob("mateconv-train.array_record-*"))
    assert len(shards) == 3
    with pytest.raises(UserError, match="save_interval: 0"):
        DataProcessor("tokenizer", save_interval=0)
