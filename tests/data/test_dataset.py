import json
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds

from mateconv_jax.data import shards
from mateconv_jax.data.dataset import is_dataset, open_dataset
from mateconv_jax.data.shards import RowFormat
from mateconv_jax.errors import UserError


def test_a_dataset_folder(dataset_folder):
    dataset = open_dataset(dataset_folder, "", 512)
    assert dataset.seq_len == 32 and dataset.tokenizer_folder == dataset_folder / "tokenizer"
    for split in ("train", "validation"):
        assert len(dataset.rows(split)) == dataset.n_rows(split) > 0
    batch = dataset.rows("train").read(np.array([5, 0, 5]))
    assert batch.keys() == {"tokens", "length"}
    assert batch["tokens"].shape == (3, 33) and batch["tokens"].dtype == np.uint16
    np.testing.assert_array_equal(batch["tokens"][0], batch["tokens"][2])
    assert batch["tokens"][1, 0] == 1 and batch["length"].tolist() == [33] * 3
    assert dataset.rows("train", (1, 2)).read(np.array([0]))["document_starts"][0, 0]
    assert dataset.rows("no_such_split") is None and dataset.n_rows("no_such_split") == 0


def test_a_flat_file(tmp_path):
    np.array([1, 7, 2, 1, 8, 9, 2], np.uint16).tofile(tmp_path / "a.bin")
    dataset = open_dataset(tmp_path / "a.bin", "", 4)
    assert (dataset.seq_len, dataset.splits, dataset.tokenizer_folder, dataset.n_rows("train")) == (4, None, None, 2)
    batch = dataset.rows("train", (1, 2)).read(np.arange(2))
    assert batch["length"].tolist() == [5, 3]
    assert np.flatnonzero(batch["document_starts"]).tolist() == [3]
    with pytest.raises(UserError, match=r"has the token id 9 \(the model has 9\)"):
        dataset.check_tokens(dataset.rows("train"), 9, "the model has 9")
    assert is_dataset(tmp_path / "a.bin") and not is_dataset(tmp_path / "b.bin") and is_dataset(tmp_path)


@pytest.fixture
def version_1(tmp_path):
    """A folder as `prepare` made it before rows recorded where documents start."""
    format = RowFormat(4, 300, version=1)
    rows = {"tokens": np.array([[1, 7, 2, 1, 8], [8, 9, 2, 9, 1]], np.uint16), "length": np.array([5, 5], np.int32)}
    template = tfds.core.ShardedFileTemplate(
        data_dir=tmp_path, dataset_name="mateconv", split="train", filetype_suffix="array_record"
    )
    shards.write_shard(template.sharded_filepath(shard_index=0, num_shards=1), rows, format)
    metadata = {"seq_len": 4, "vocab_size": 300, "tokenizer_fingerprint": "", "splits": {"train": {"rows": 2}}, "options": {}}
    tfds.folder_dataset.write_metadata(
        data_dir=tmp_path,
        features=shards.features(format),
        split_infos=[tfds.core.SplitInfo(name="train", shard_lengths=[2], num_bytes=1, filename_template=template)],
        metadata=tfds.core.MetadataDict(metadata),
        check_data=False,
    )
    return tmp_path, rows


def test_a_folder_of_version_1_is_still_read(version_1):
    folder, rows = version_1
    dataset = open_dataset(folder, "", 512)
    batch = dataset.rows("train", (1, 2)).read(np.arange(2))
    np.testing.assert_array_equal(batch["tokens"], rows["tokens"])
    assert batch["document_starts"].tolist() == [[False, False, False, True, False], [False] * 5]
    assert dataset.rows("train").read(np.arange(1)).keys() == {"tokens", "length"}


def test_a_folder_of_a_newer_version_is_an_error(dataset_folder, tmp_path):
    shutil.copy(dataset_folder / "metadata.json", tmp_path)
    metadata = json.loads((tmp_path / "metadata.json").read_text())
    assert metadata["version"] == shards.VERSION == 2 and metadata["learned"] is False
    (tmp_path / "metadata.json").write_text(json.dumps(metadata | {"version": 4}))
    with pytest.raises(UserError, match=r"data.train_data_path: .* has rows of version 4, this project reads up to 3"):
        open_dataset(tmp_path, "data.train_data_path", 32)


@pytest.mark.parametrize("path", ["none", "none.bin"])
def test_nothing_there(tmp_path, path):
    with pytest.raises(UserError, match="--data: no (dataset|file) at"):
        open_dataset(tmp_path / path, "--data", 32).rows("train")
