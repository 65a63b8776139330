import concurrent.futures
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from hypothesis import given, strategies as st

from mateconv_jax.data import dataset, shards
from mateconv_jax.data.build import packing
from mateconv_jax.data.token_bin import FlatRows
from mateconv_jax.errors import UserError


def some_rows(n, seq_len, vocab_size, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab_size, (n, seq_len + 1)).astype(shards.token_dtype(vocab_size))
    return tokens, rng.integers(2, seq_len + 2, n).astype(np.int32)


@pytest.mark.parametrize("vocab_size, dtype", [(6400, np.uint16), (2**16, np.uint16), (2**16 + 1, np.uint32)])
@given(seq_len=st.integers(1, 300), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_rows_come_back_from_several_shards(tmp_path_factory, vocab_size, dtype, seq_len, sizes, seed):
    folder = tmp_path_factory.mktemp("shards")
    written = [some_rows(n, seq_len, vocab_size, seed + i) for i, n in enumerate(sizes)]
    for i, (tokens, length) in enumerate(written):
        shards.write_shard(folder / str(i), tokens, length)
    reader = shards.ShardRows([folder / str(i) for i in range(len(sizes))], seq_len, vocab_size)
    assert len(reader) == sum(sizes)
    order = np.random.default_rng(seed).permutation(len(reader))
    batch = reader.read(order)
    assert batch["tokens"].dtype == dtype and batch["length"].dtype == np.int32
    np.testing.assert_array_equal(batch["tokens"], np.concatenate([tokens for tokens, _ in written])[order])
    np.testing.assert_array_equal(batch["length"], np.concatenate([length for _, length in written])[order])


@pytest.mark.parametrize("seq_len, vocab_size", [(1, 300), (64, 300), (512, 6400), (10_000, 70_000)])
def test_tfds_reads_the_same(tmp_path, seq_len, vocab_size):
    tokens, length = some_rows(5, seq_len, vocab_size)
    template = tfds.core.ShardedFileTemplate(data_dir=tmp_path, dataset_name="x", split="train", filetype_suffix="array_record")
    shards.write_shard(template.sharded_filepath(shard_index=0, num_shards=1), tokens, length)
    tfds.folder_dataset.write_metadata(
        data_dir=tmp_path,
        features=shards.features(seq_len, vocab_size),
        split_infos=[tfds.core.SplitInfo(name="train", shard_lengths=[5], num_bytes=1, filename_template=template)],
        check_data=False,
    )
    for i, row in enumerate(tfds.builder_from_directory(tmp_path).as_data_source("train")):
        np.testing.assert_array_equal(row["tokens"], tokens[i])
        assert row["length"] == length[i] and row["tokens"].dtype == tokens.dtype


def test_equal_rows_give_equal_bytes(tmp_path):
    for name in "ab":
        shards.write_shard(tmp_path / name, *some_rows(100, 16, 300))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_full_disk_and_a_missing_folder_are_os_errors(tmp_path):
    with pytest.raises(OSError, match="none"):
        shards.write_shard(tmp_path / "none" / "a", *some_rows(1, 16, 300))
    (tmp_path / "small").mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path / "small"]).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        with pytest.raises(OSError, match="No space left on device"):
            shards.write_shard(tmp_path / "small" / "a", *some_rows(2000, 128, 300))
    finally:
        subprocess.run(["umount", tmp_path / "small"], check=True)


@pytest.mark.parametrize("seq_len, vocab_size", [(32, 300), (16, 70_000)])
def test_rows_of_another_size_are_refused(tmp_path, seq_len, vocab_size):
    shards.write_shard(tmp_path / "a", *some_rows(4, 16, 300))
    with pytest.raises(UserError, match="another version"):
        shards.ShardRows([tmp_path / "a"], seq_len, vocab_size)


@pytest.mark.parametrize("name", [b"length", b"tokens"])
def test_records_that_only_have_the_same_size_are_refused(tmp_path, name):
    shards.write_shard(tmp_path / "a", *some_rows(4, 16, 300))
    writer = ArrayRecordWriter(str(tmp_path / "b"), "group_size:1,uncompressed")
    for record in ArrayRecordReader(str(tmp_path / "a")).read_all():
        writer.write(record.replace(name, name.upper()))
    writer.close()
    with pytest.raises(UserError, match="another version"):
        shards.ShardRows([tmp_path / "b"], 16, 300)


def test_a_missing_and_a_broken_shard(tmp_path):
    shards.write_shard(tmp_path / "a", *some_rows(4000, 16, 300))
    with pytest.raises(UserError, match="b' is missing or broken"):
        shards.ShardRows([tmp_path / "a", tmp_path / "b"], 16, 300)
    with (tmp_path / "a").open("r+b") as file:
        file.truncate((tmp_path / "a").stat().st_size // 2)
    with pytest.raises(UserError, match="a' is missing or broken"):
        shards.ShardRows([tmp_path / "a"], 16, 300)


@pytest.mark.parametrize("kind", ["shards", "flat"])
def test_many_threads_read_at_once(tmp_path, kind):
    tokens, _ = some_rows(3000, 16, 300)
    length = np.full(3000, 17, np.int32)
    for i in range(3):
        shards.write_shard(tmp_path / str(i), tokens[1000 * i : 1000 * (i + 1)], length[:1000])
    reader = shards.ShardRows([tmp_path / str(i) for i in range(3)], 16, 300)
    if kind == "flat":
        stream = tokens[:, :-1].ravel()
        stream.tofile(tmp_path / "a.bin")
        tokens, length = packing.pack(stream, 16)
        reader = FlatRows(tmp_path / "a.bin", 16, "")

    def read(seed):
        order = np.random.default_rng(seed).permutation(len(reader))
        return all((reader.read(part)["tokens"] == tokens[part]).all() for part in np.array_split(order, 20))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns between any two lines
    try:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert all(pool.map(read, range(8)))
    finally:
        sys.setswitchinterval(interval)


def test_more_shards_than_files_may_be_open_at_first(tmp_path):
    shards.write_shard(tmp_path / "a", *some_rows(2, 16, 300))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
        assert len(shards.ShardRows([tmp_path / "a"] * 400, 16, 300)) == 800
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with pytest.raises(UserError, match=f"the system allows {hard}"):
        shards.ShardRows([tmp_path / "a"] * hard, 16, 300)


def test_workers_import_nothing_heavy():
    heavy = "{'grain', 'jax', 'tensorflow', 'tensorflow_datasets', 'transformers'}"
    program = f"import sys, mateconv_jax.data.shards; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "set()\n"


@given(n=st.integers(2, 300), seq_len=st.integers(1, 40))
def test_a_flat_file_gives_the_rows_that_packing_makes(tmp_path_factory, n, seq_len):
    stream = np.arange(1, n + 1, dtype=np.uint16)
    path = tmp_path_factory.mktemp("flat") / "a.bin"
    stream.tofile(path)
    flat = FlatRows(path, seq_len, "data.train_data_path")
    expected, lengths = packing.pack(stream, seq_len)
    batch = flat.read(np.arange(len(flat)))
    np.testing.assert_array_equal(batch["tokens"], expected)
    np.testing.assert_array_equal(batch["length"], lengths)
    assert batch["length"].dtype == np.int32 and flat.largest_token() == n


@pytest.mark.parametrize("content", [b"", b"ab", b"abc", b"abcde"])
def test_what_is_no_flat_file(tmp_path, content):
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(UserError, match=rf"data.val_data_path: .*a.bin' has {len(content)} bytes \(expected 16-bit"):
        dataset.open_rows(tmp_path / "a.bin", "train", 8, "data.val_data_path")
    with pytest.raises(UserError, match="data.val_data_path: no file at"):
        dataset.open_rows(tmp_path / "b.bin", "train", 8, "data.val_data_path")


def test_rows_of_a_dataset_folder(dataset_folder):
    batch = dataset.open_rows(dataset_folder, "train", 32, "").read(np.array([5, 0, 5]))
    assert batch["tokens"].shape == (3, 33) and batch["tokens"].dtype == np.uint16
    np.testing.assert_array_equal(batch["tokens"][0], batch["tokens"][2])
    assert batch["tokens"][1, 0] == 1 and batch["length"].tolist() == [33] * 3
    assert dataset.open_rows(dataset_folder, "no_such_split", 32, "") is None
