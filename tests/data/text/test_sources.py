import bz2
import dataclasses
import functools
import gzip
import json
import lzma
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
import zstandard
from array_record.python.array_record_module import ArrayRecordReader
from hypothesis import assume, given, strategies as st
from tensorboard.summary.writer.record_writer import RecordWriter

from mateconv_jax.data.text import sources
from mateconv_jax.data.text.compression import decompressed
from mateconv_jax.data.text.sources import ChunkSizes, Reader
from mateconv_jax.errors import UserError

COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": functools.partial(lzma.compress, preset=0),
    ".zst": zstandard.ZstdCompressor().compress,
}


def chunks(path, sizes=ChunkSizes(), **options):
    """The parts that chunks of one file have."""
    found = list(sources.chunks(sources.find([str(path)]), 0, sizes, Reader(**options)))
    assert [chunk.name for chunk in found] == [f"0000000-{part:06d}" for part in range(len(found))]
    return [part for chunk in found for part in chunk.parts]


def records(path, sizes=ChunkSizes(), **options):
    return [record for part in chunks(path, sizes, **options) for record in part.records]


def rejects(path, sizes=ChunkSizes(), **options):
    return [(line, rule) for part in chunks(path, sizes, **options) for line, rule, _ in part.rejects]


@given(
    lines=st.lists(st.binary(max_size=40).filter(lambda b: b"\n" not in b), max_size=30),
    size=st.integers(1, 200),
    block=st.integers(1, 50),
    ends=st.booleans(),
)
def test_chunks_hold_every_line_once_and_do_not_depend_on_how_the_file_is_read(tmp_path_factory, lines, size, block, ends):
    path = tmp_path_factory.mktemp("chunks") / "a.jsonl"
    path.write_bytes(data := b"\n".join(lines) + (b"\n" if ends else b""))
    assume(
        data.lstrip(b"\xef\xbb\xbf\n \t\r\v\f")[:1] != b"[" and data[:2] not in (b"\xff\xfe", b"\xfe\xff")
    )  # see test_formats.py
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "READ_BYTES", block)
        by_block = chunks(path, ChunkSizes(size))
    whole = chunks(path, ChunkSizes(size))
    assert [chunk.records for chunk in whole] == [chunk.records for chunk in by_block]
    assert [record for chunk in whole for record in chunk.records] == [
        (number, line) for number, line in enumerate(lines, 1) if line.strip()
    ]
    for chunk in whole[:-1]:
        sizes = [len(record) for _, record in chunk.records]
        assert sum(sizes) >= size > sum(sizes[:-1])
    if whole:
        assert whole[-1].position == path.stat().st_size


def test_chunks_of_so_many_records(tmp_path):
    (tmp_path / "a.jsonl").write_text("a\nb\n\nc\nd\ne\n")
    assert [len(chunk.records) for chunk in chunks(tmp_path / "a.jsonl", ChunkSizes(records=2))] == [2, 2, 1]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files_of_several_members(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix]("一\n二".encode()) + COMPRESS[suffix]("三\n四\n".encode()))
    assert [record.decode() for _, record in records(path)] == ["一", "二三", "四"]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_truncated_file_gives_what_it_has_and_says_so(tmp_path, suffix):
    rng = np.random.default_rng(0)
    data = b"".join(rng.bytes(30).hex().encode() + b"\n" for _ in range(40_000))  # .bz2 has blocks of 900 kB
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](data)[: len(COMPRESS[suffix](data)) * 2 // 3])
    found = records(path)
    assert 10_000 < len(found) < 40_000
    assert [record for _, record in found] == data.split(b"\n")[: len(found)]
    assert rejects(path) == [(len(found) + 1, "broken_file")]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_file_that_is_not_compressed_is_rejected(tmp_path, suffix):
    (tmp_path / f"a.jsonl{suffix}").write_text("{}\n")
    assert rejects(tmp_path / f"a.jsonl{suffix}") == [(1, "broken_file")]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_what_a_small_file_expands_to_is_never_held(tmp_path, suffix):
    """Zeros, 100 MB of which .zst stores in 3 kB."""
    path = tmp_path / f"bomb{suffix}"
    path.write_bytes(COMPRESS[suffix](bytes(100_000_000 if suffix == ".zst" else 20_000_000)))
    largest = total = 0
    for block in decompressed(iter([path.read_bytes()]), suffix):
        largest, total = max(largest, len(block)), total + len(block)
    assert total >= 20_000_000 and largest <= (2**25 if suffix == ".zst" else 2**20)


def test_zstd_windows_up_to_2_gb_are_read(tmp_path):
    """As `zstd --long=31` writes; the decompressor's own limit is 128 MB."""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28, enable_ldm=True)
    path = tmp_path / "a.jsonl.zst"
    with path.open("wb") as file, zstandard.ZstdCompressor(compression_params=parameters).stream_writer(file) as writer:
        writer.write(b"one\ntwo\n")
    assert [record for _, record in records(path)] == [b"one", b"two"]


def test_small_inputs_are_joined_in_order(tmp_path):
    sizes = ChunkSizes(bytes=3200)
    lengths = {"a.txt": 200, "b.jsonl": 150, "c.bin": 100, "d.bin": 2, "e.jsonl": 201, "f.txt": 100}
    for name, length in lengths.items():
        (tmp_path / name).write_bytes(b"x" * length)
    found = sources.find([str(tmp_path / "*")])
    names = [[Path(source.path).name for source in group] for group in sources.groups(found, sizes)]
    assert names == [["a.txt", "b.jsonl"], ["c.bin", "d.bin"], ["e.jsonl"], ["f.txt"]]
    [chunk] = sources.chunks(found[:2], 7, sizes)
    assert chunk.name == "0000007-000000"
    assert [(part.source, part.records, part.position) for part in chunk.parts] == [
        (found[0], [(1, b"x" * 200)], 200),
        (found[1], [(1, b"x" * 150)], 150),
    ]
    sixteen = [dataclasses.replace(found[0], size=200)] * 17
    assert [len(group) for group in sources.groups(sixteen, sizes)] == [16, 1]


def test_a_too_long_line_is_skipped_without_holding_it(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"one\n" + b"x" * 50_000_000 + b"\nthree\n")
    sizes = ChunkSizes(longest_record=1_000_000)
    assert [line for line, _ in records(path, sizes)] == [1, 3]
    [(line, rule, reason)] = chunks(path, sizes)[0].rejects
    assert (line, rule) == (2, "line_too_long") and "50,000,000 bytes (at most 1,000,000)" in reason
    assert len(records(path, ChunkSizes(longest_record=50_000_000))) == 3


def test_documents_of_a_text_file(tmp_path):
    path = tmp_path / "novel.txt"
    path.write_bytes("第一行\r\n第二行\r\n \r\n\n第三行".encode())

    def texts(document):
        return [(line, record.decode()) for line, record in records(path, txt_document=document)]

    assert texts("line") == [(1, "第一行\r"), (2, "第二行\r"), (5, "第三行")]
    assert texts("blank_line") == [(1, "第一行\r\n第二行\r"), (5, "第三行")]
    assert texts("file") == [(1, "第一行\r\n第二行\r\n \r\n\n第三行")]
    assert rejects(path, ChunkSizes(longest_record=25), txt_document="blank_line") == []
    assert rejects(path, ChunkSizes(longest_record=15), txt_document="blank_line") == [(1, "line_too_long")]


def test_documents_of_a_bin_file(tmp_path):
    tokens = np.array([1, 7, 8, 2, 1, 9, 2, 1, 5, 5, 5, 5, 5, 5, 5], np.uint16)
    tokens.tofile(tmp_path / "a.bin")
    found = records(tmp_path / "a.bin", ChunkSizes(8), bos_eos=(1, 2))
    assert np.concatenate([np.frombuffer(record, np.uint16) for _, record in found]).tolist() == tokens.tolist()
    assert [line for line, _ in found] == [1, 5, 8, 13]  # documents, and a stream without end cut at 4 tokens
    (tmp_path / "a.bin").write_bytes(b"abc")
    with pytest.raises(UserError, match="odd number of bytes"):
        records(tmp_path / "a.bin", bos_eos=(1, 2))
    (tmp_path / "a.bin").write_bytes(b"")
    assert records(tmp_path / "a.bin", bos_eos=(1, 2)) == []


@pytest.mark.parametrize(
    "tokens, starts",
    [
        ([1, 7, 2, 9, 1, 8, 2, 9, 1, 7, 2, 1, 5, 2], [1, 12]),  # turns stay together: 9 is the template's line feed
        ([7, 7, 2, 8, 2, 9], [1, 4, 6]),  # without `<s>`
    ],
)
def test_where_a_bin_files_documents_end(tmp_path, tokens, starts):
    np.array(tokens, np.uint16).tofile(tmp_path / "a.bin")
    assert [line for line, _ in records(tmp_path / "a.bin", bos_eos=(1, 2))] == starts


def test_what_is_found(tmp_path, monkeypatch):
    for name in ("b.jsonl", "a.jsonl.gz", "c.txt.zst", "d.bin", "e.2024.json"):
        (tmp_path / name).write_text("x")
    monkeypatch.chdir(tmp_path)
    assert [(s.path, s.format) for s in sources.find(["e*", "[a-d].*", "-", "tfds:a/b:train:text"])] == [
        ("e.2024.json", "jsonl"), ("a.jsonl.gz", "jsonl"), ("b.jsonl", "jsonl"), ("c.txt.zst", "txt"), ("d.bin", "bin"),
        ("-", "jsonl"), ("tfds:a/b:train:text", "tfds"),
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"--input: no file at 'no\*'"):
        sources.find(["no*"])
    for incomplete in ("tfds:imdb", "tfds:imdb:train[:10%]", "tfds:imdb::text"):
        with pytest.raises(UserError, match="tfds:NAME/CONFIG:SPLIT:FEATURE"):
            sources.find([incomplete])


class Poems(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield from enumerate({"text": text} for text in ["床前明月光", b"\xff", "疑是\n地上霜"])


@pytest.fixture
def tfds_texts(tmp_path, monkeypatch):
    """A TFDS dataset that someone prepared: its folder."""
    Poems(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    return tmp_path / "poems" / "1.0.0"


def to_tfrecord(folder):
    """Stored as TFDS does by default; TensorBoard's event files have the same frames."""
    [shard] = folder.glob("*array_record*")
    writer = RecordWriter((folder / shard.name.replace("array_record", "tfrecord")).open("wb"))
    for record in ArrayRecordReader(str(shard)).read_all():
        writer.write(record)
    writer.close()
    shard.unlink()
    info = (folder / "dataset_info.json").read_text()
    (folder / "dataset_info.json").write_text(info.replace("array_record", "tfrecord"))


def tfds_records(split):
    return [record for _, record in records(f"tfds:poems:{split}:text")]


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_a_tfds_dataset_by_name(tfds_texts, file_format):
    if file_format == "tfrecord":
        to_tfrecord(tfds_texts)
    found = tfds_records("train")
    texts = [json.loads(record)["text"] for record in found if b"\xff" not in record]
    assert sorted(texts) == sorted(["床前明月光", "疑是\n地上霜"]) and len(found) == 3
    assert tfds_records("train[1:]") == found[1:]
    assert tfds.builder("poems").info.file_format.value == file_format


def test_a_tfrecord_that_is_cut_short(tfds_texts):
    to_tfrecord(tfds_texts)
    [shard] = tfds_texts.glob("*tfrecord*")
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(UserError, match="is broken or cut short at record 3"):
        tfds_records("train")


def test_a_tfds_dataset_is_made_without_tensorflow_or_the_error_names_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds, "builder", lambda name, **options: Poems(data_dir=tmp_path, **options))
    assert len(tfds_records("train")) == 3
    [shard] = tmp_path.glob("poems/1.0.0/*train*")
    assert "array_record" in shard.name
    shutil.rmtree(tmp_path / "poems")
    monkeypatch.setattr(Poems, "_generate_examples", lambda self: __import__("no_such_package"))
    with pytest.raises(UserError, match="TFDS cannot make 'poems' without no_such_package"):
        tfds_records("train")


@pytest.mark.parametrize(
    "name, message",
    [
        ("tfds:no_such_set:train:text", "no dataset 'no_such_set'"),
        ("tfds:poems:test:text", r"no split 'test' \(there are: train\)"),
        ("tfds:poems:train:body", r"no feature 'body' \(there are: text\)"),
    ],
)
def test_a_tfds_dataset_that_is_not_there(tfds_texts, name, message):
    with pytest.raises(UserError, match=message):
        list(sources.chunks(sources.find([name]), 0, ChunkSizes()))
