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

from mateconv_jax.data import shards
from mateconv_jax.data.build import packing
from mateconv_jax.data.dataset import open_dataset
from mateconv_jax.data.shards import RowFormat
from mateconv_jax.data.token_bin import FlatRows
from mateconv_jax.errors import UserError


def some_rows(n, seq_len, vocab_size, seed=0, learned=False):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab_size, (n, seq_len + 1)).astype(shards.token_dtype(vocab_size))
    rows = {"tokens": tokens, "length": rng.integers(2, seq_len + 2, n).astype(np.int32)}
    return rows | {name: rng.random(tokens.shape) < 0.3 for name in ("document_starts", "learned")[: 1 + learned]}


def write(path, *args, version=2, **kwargs):
    """Rows as a file; them and their format."""
    rows = some_rows(*args, **kwargs)
    if version == 1:
        del rows["document_starts"]
    format = RowFormat(*args[1:3], kwargs.get("learned", False), version)
    shards.write_shard(path, rows, format)
    return rows, format


def assert_equal(rows, expected):
    assert rows.keys() == expected.keys()
    for name, values in expected.items():
        assert rows[name].dtype == values.dtype
        np.testing.assert_array_equal(rows[name], values)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("vocab_size, dtype", [(6400, np.uint16), (2**16, np.uint16), (2**16 + 1, np.uint32)])
@given(seq_len=st.integers(1, 300), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_rows_come_back_from_several_shards(tmp_path_factory, vocab_size, dtype, learned, seq_len, sizes, seed):
    folder = tmp_path_factory.mktemp("shards")
    format = RowFormat(seq_len, vocab_size, learned)
    written = [some_rows(n, seq_len, vocab_size, seed + i, learned) for i, n in enumerate(sizes)]
    for i, rows in enumerate(written):
        shards.write_shard(folder / str(i), rows, format)
    together = {name: np.concatenate([rows[name] for rows in written]) for name in written[0]}
    assert together["tokens"].dtype == dtype
    paths = [folder / str(i) for i in range(len(sizes))]
    order = np.random.default_rng(seed).permutation(sum(sizes))
    expected = {name: values[order] for name, values in together.items()}
    assert_equal(shards.ShardRows(paths, format, (1, 2)).read(order), expected)
    del expected["document_starts"]  # not asked for
    assert_equal(shards.ShardRows(paths, format).read(order), expected)


@pytest.mark.parametrize("seq_len, vocab_size", [(1, 300), (64, 300), (512, 6400), (10_000, 70_000)])
def test_tfds_reads_the_same(tmp_path, seq_len, vocab_size):
    template = tfds.core.ShardedFileTemplate(data_dir=tmp_path, dataset_name="x", split="train", filetype_suffix="array_record")
    rows, format = write(template.sharded_filepath(shard_index=0, num_shards=1), 5, seq_len, vocab_size, learned=True)
    tfds.folder_dataset.write_metadata(
        data_dir=tmp_path,
        features=shards.features(format),
        split_infos=[tfds.core.SplitInfo(name="train", shard_lengths=[5], num_bytes=1, filename_template=template)],
        check_data=False,
    )
    for i, row in enumerate(tfds.builder_from_directory(tmp_path).as_data_source("train")):
        np.testing.assert_array_equal(row["tokens"], rows["tokens"][i])
        assert row["length"] == rows["length"][i] and row["tokens"].dtype == rows["tokens"].dtype
        for name in ("document_starts", "learned"):
            bits = [row[name][t // 8] >> t % 8 & 1 for t in range(seq_len + 1)]
            np.testing.assert_array_equal(bits, rows[name][i])


# As they were written before they recorded where documents start.
RECORDS_OF_VERSION_1 = [
    b"\n.\n\x12\n\x06length\x12\x08\n\x06\n\x04\x05\0\0\0\n\x18\n\x06tokens\x12\x0e\n\x0c\n\n\5\0\2\0\1\0\7\0\2\0",
    b"\n.\n\x12\n\x06length\x12\x08\n\x06\n\x04\x04\0\0\0\n\x18\n\x06tokens\x12\x0e\n\x0c\n\n\2\0\t\0\1\0\2\0\1\0",
]


def test_records_of_version_1_are_read(tmp_path):
    """Documents then start at a `<s>` that follows a `</s>`."""
    writer = ArrayRecordWriter(str(tmp_path / "a"), "group_size:1,uncompressed")
    for record in RECORDS_OF_VERSION_1:
        writer.write(record)
    writer.close()
    rows = {"tokens": np.array([[5, 2, 1, 7, 2], [2, 9, 1, 2, 1]], np.uint16), "length": np.array([5, 4], np.int32)}
    starts = np.array([[0, 0, 1, 0, 0], [0, 0, 0, 0, 1]], bool)
    format = RowFormat(4, 300, version=1)
    assert_equal(shards.ShardRows([tmp_path / "a"], format).read(np.arange(2)), rows)
    assert_equal(shards.ShardRows([tmp_path / "a"], format, (1, 2)).read(np.arange(2)), rows | {"document_starts": starts})


def test_equal_rows_give_equal_bytes(tmp_path):
    for name in "ab":
        write(tmp_path / name, 100, 16, 300)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_full_disk_and_a_missing_folder_are_os_errors(tmp_path):
    with pytest.raises(OSError, match="none"):
        write(tmp_path / "none" / "a", 1, 16, 300)
    (tmp_path / "small").mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path / "small"]).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        with pytest.raises(OSError, match="No space left on device"):
            write(tmp_path / "small" / "a", 2000, 128, 300)
    finally:
        subprocess.run(["umount", tmp_path / "small"], check=True)


@pytest.mark.parametrize(
    "seq_len, vocab_size, learned, version",
    [(32, 300, False, 2), (16, 70_000, False, 2), (16, 300, True, 2), (16, 300, False, 1), (16, 300, True, 1)],
)
def test_rows_of_another_format_are_refused(tmp_path, seq_len, vocab_size, learned, version):
    write(tmp_path / "a", 4, 16, 300)
    with pytest.raises(UserError, match="another version"):
        shards.ShardRows([tmp_path / "a"], RowFormat(seq_len, vocab_size, learned, version))


@pytest.mark.parametrize("name", [b"document_starts", b"length", b"tokens"])
def test_records_that_only_have_the_same_size_are_refused(tmp_path, name):
    write(tmp_path / "a", 4, 16, 300)
    writer = ArrayRecordWriter(str(tmp_path / "b"), "group_size:1,uncompressed")
    for record in ArrayRecordReader(str(tmp_path / "a")).read_all():
        writer.write(record.replace(name, name.upper()))
    writer.close()
    with pytest.raises(UserError, match="another version"):
        shards.ShardRows([tmp_path / "b"], RowFormat(16, 300))


def test_a_missing_and_a_broken_shard(tmp_path):
    write(tmp_path / "a", 4000, 16, 300)
    with pytest.raises(UserError, match="b' is missing or broken"):
        shards.ShardRows([tmp_path / "a", tmp_path / "b"], RowFormat(16, 300))
    with (tmp_path / "a").open("r+b") as file:
        file.truncate((tmp_path / "a").stat().st_size // 2)
    with pytest.raises(UserError, match="a' is missing or broken"):
        shards.ShardRows([tmp_path / "a"], RowFormat(16, 300))


@pytest.mark.parametrize("kind", ["shards", "flat"])
def test_many_threads_read_at_once(tmp_path, kind):
    rows = some_rows(3000, 16, 300) | {"length": np.full(3000, 17, np.int32)}
    tokens = rows["tokens"]
    for i in range(3):
        part = {name: values[1000 * i : 1000 * (i + 1)] for name, values in rows.items()}
        shards.write_shard(tmp_path / str(i), part, RowFormat(16, 300))
    reader = shards.ShardRows([tmp_path / str(i) for i in range(3)], RowFormat(16, 300))
    if kind == "flat":
        stream = tokens[:, :-1].ravel()
        stream.tofile(tmp_path / "a.bin")
        tokens = packing.pack({"tokens": stream}, 16)["tokens"]
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
    write(tmp_path / "a", 2, 16, 300)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
        assert len(shards.ShardRows([tmp_path / "a"] * 400, RowFormat(16, 300))) == 800
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


MANY_SHARDS = """
import concurrent.futures, resource, sys
import numpy as np
resource.setrlimit(resource.RLIMIT_NOFILE, (290, 290))
from mateconv_jax.data import shards
rows = shards.ShardRows(sys.argv[1:] * 200, shards.RowFormat(16, 300))
expected = rows.read(np.arange(6))["tokens"]
assert len(rows) == 1200 and len(set(map(bytes, expected))) == 6
def read(seed):
    order = np.random.default_rng(seed).permutation(1200)
    return all((rows.read(part)["tokens"] == expected[part % 6]).all() for part in np.array_split(order, 20))
sys.setswitchinterval(1e-6)
with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert all(pool.map(read, range(8)))
"""


def test_more_shards_than_the_system_ever_lets_be_open(tmp_path):
    """400 shards where 290 files may be open, 17 of them shards; read by threads that open and close them for each other."""
    for seed, name in enumerate("ab"):
        write(tmp_path / name, 3, 16, 300, seed)
    command = [sys.executable, "-c", MANY_SHARDS, tmp_path / "a", tmp_path / "b"]
    subprocess.run(command, check=True, timeout=120)


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
    assert_equal(flat.read(np.arange(len(flat))), packing.pack({"tokens": stream}, seq_len))
    assert flat.largest_token() == n


@pytest.mark.parametrize("content", [b"", b"ab", b"abc", b"abcde"])
def test_what_is_no_flat_file(tmp_path, content):
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(UserError, match=rf"data.val_data_path: .*a.bin' has {len(content)} bytes \(expected 16-bit"):
        open_dataset(tmp_path / "a.bin", "data.val_data_path", 8).rows("train")
    with pytest.raises(UserError, match="data.val_data_path: no file at"):
        open_dataset(tmp_path / "b.bin", "data.val_data_path", 8).rows("train")
