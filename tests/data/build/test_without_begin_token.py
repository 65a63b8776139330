"""Tokenizers without a begin token, as Qwen's: documents are separated by the end token alone."""

import json
import shutil

import numpy as np
import pytest

from mateconv_jax.data.dataset import open_dataset
from mateconv_jax.data.rows import starts_after_end
from mateconv_jax.data.text import bin_documents
from mateconv_jax.data.token_bin import FlatRows
from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib
from mateconv_jax.training.open_data import DataOptions, open_data
from tests.data.build.preparing import prepare, streams, write_jsonl

BOS, EOS = 1, 2
TEXTS = [f"第{i}个故事：从前有一座山。" for i in range(30)]


@pytest.fixture(scope="module")
def tokenizer(dataset_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    shutil.copytree(dataset_folder / "tokenizer", folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": None}))
    assert tokenizer_lib.load(folder, "").bos_token_id is None
    return folder


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    raw = write_jsonl(path / "raw.jsonl", [{"text": text} for text in TEXTS])
    return prepare(raw, path / "zh", "--tokenizer", tokenizer, "--val_fraction", "0", "--also_bin")


def starts_of(rows):
    """Positions in the stream at which documents begin, of rows that overlap by one token."""
    batch = rows.read(np.arange(len(rows)))
    n_targets = batch["tokens"].shape[1] - 1
    found = {r * n_targets + i for r, i in np.argwhere(batch["document_starts"]).tolist() if i < batch["length"][r]}
    return sorted(found)


def test_texts_are_separated_by_the_end_token_alone(folder, tokenizer):
    [stream] = streams(folder, "train")
    assert stream.count(BOS) == 0 and stream.count(EOS) == len(TEXTS)
    ends = np.flatnonzero(np.array(stream) == EOS)
    texts = [tokenizer_lib.load(tokenizer, "").decode(part) for part in np.split(stream, ends + 1) if len(part)]
    assert texts == [f"{text}</s>" for text in TEXTS]
    assert starts_of(open_dataset(folder, "", 16).rows("train", (None, EOS))) == [0, *(ends[:-1] + 1).tolist()]


def test_it_trains_and_its_flat_file_too(folder, tokenizer):
    rows, _, loaded = open_data(DataOptions(str(folder), None, None, 16), 10_000, document_mask=True)
    assert loaded.bos_token_id is None
    flat, _, _ = open_data(DataOptions(str(folder / "train.bin"), None, str(tokenizer), 16), 10_000, document_mask=True)
    assert starts_of(flat) == starts_of(rows)[1:]  # of a flat file the first is not marked


def test_a_flat_files_documents_end_with_every_end_token(folder, tokenizer, tmp_path):
    tokens = np.fromfile(folder / "train.bin", np.uint16)
    found = list(bin_documents.documents(str(folder / "train.bin"), (None, EOS), 10**6, [0]))
    assert len(found) == len(TEXTS) and b"".join(ids for _, ids in found) == tokens.tobytes()
    again = prepare(folder / "train.bin", tmp_path / "again", "--tokenizer", tokenizer, "--val_fraction", "0")
    assert starts_of(open_dataset(again, "", 16).rows("train", (None, EOS))) == starts_of(
        open_dataset(folder, "", 16).rows("train", (None, EOS))
    )


def test_a_flat_file_without_begin_tokens_whose_tokenizer_has_one(tmp_path, dataset_folder):
    tokens = np.array([7, 8, EOS, 9, EOS, 7, 7], np.uint16)
    tokens.tofile(tmp_path / "a.bin")
    assert starts_of(FlatRows(tmp_path / "a.bin", 3, "", (BOS, EOS))) == [3, 5]
    folder = prepare(tmp_path / "a.bin", tmp_path / "zh", "--tokenizer", dataset_folder / "tokenizer", "--val_fraction", "0")
    assert starts_of(open_dataset(folder, "", 16).rows("train", (BOS, EOS))) == [0, 3, 5]
    np.array([BOS, 7, EOS, 9, EOS, BOS, 7], np.uint16).tofile(tmp_path / "b.bin")
    assert starts_of(FlatRows(tmp_path / "b.bin", 3, "", (BOS, EOS))) == [5]  # turns stay together


def test_starts_after_end_of_rows():
    tokens = np.array([[EOS, 5, EOS, BOS, EOS]])
    assert starts_after_end(tokens, None, EOS).tolist() == [[False, True, False, True, False]]
    assert starts_after_end(tokens, BOS, EOS).tolist() == [[False, False, False, True, False]]
