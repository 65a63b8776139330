"""What people bring: archives, parquet, JSON arrays, folders, encodings."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import tracemalloc
import zipfile

import pyarrow
import pytest
import zstandard
from hypothesis import given, strategies as st
from pyarrow import parquet

from mateconv_jax.data.text import archives, encodings, json_array, sources
from mateconv_jax.data.text.sources import ChunkSizes, Reader
from mateconv_jax.errors import UserError

TEXTS = [f"第 {i} 篇文章说的是春天。" for i in range(100)]
JSONL = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS).encode()
COMPRESS = {
    "": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress
}  # fmt: skip


def read(path, sizes=ChunkSizes(), **options):
    """{name: [(line, record)]} and [(name, line, rule)] of an input."""
    found, rejects = {}, []
    for chunk in sources.chunks(sources.find([str(path)]), 0, sizes, Reader(**options)):
        for part in chunk.parts:
            name = part.source.name.removeprefix(str(path)).removeprefix(":")
            found.setdefault(name, []).extend(part.records)
            rejects += [(name, line, rule) for line, rule, _ in part.rejects]
    return found, rejects


def texts(path, **options):
    found, rejects = read(path, **options)
    assert not rejects
    return [json.loads(record)["text"] for records in found.values() for _, record in records]


def tar(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def zipped(members: dict[str, bytes], compression=zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


# ---- archives -----------------------------------------------------------------------------------------------------

MEMBERS = {
    "d/a.jsonl": JSONL, "d/b.TXT": "一\n二\n".encode(), "c.csv": "text\n三\n".encode(), "e.jsonl.gz": gzip.compress(JSONL),
    "README": b"no", "d/._a.jsonl": b"\0", "x" * 150 + ".json": b'[{"text":"4"}]', "f.tar": tar({"a.txt": b"x"}),
}  # fmt: skip


@pytest.mark.parametrize(
    "name, content",
    [(f"a.jsonl.tar{suffix}", compress(tar(MEMBERS))) for suffix, compress in COMPRESS.items()]
    + [("a.TGZ", gzip.compress(tar(MEMBERS))), ("a.tbz2", bz2.compress(tar(MEMBERS))), ("a.zip", zipped(MEMBERS))]
    + [("b.zip", zipped(MEMBERS, zipfile.ZIP_LZMA))],
)
def test_members_of_archives(tmp_path, name, content, monkeypatch):
    (tmp_path / name).write_bytes(content)
    found, rejects = read(tmp_path / name)
    jsonl = list(enumerate(JSONL.splitlines(), 1))
    assert found == {
        "d/a.jsonl": jsonl, "d/b.TXT": [(1, "一".encode()), (2, "二".encode())], "c.csv": [(2, '{"text":"三"}'.encode())],
        "e.jsonl.gz": jsonl, "README": [], "d/._a.jsonl": [], "x" * 150 + ".json": [(1, b'{"text":"4"}')], "f.tar": [],
    }  # fmt: skip
    assert rejects == [(name, 1, "not_read") for name in ("README", "d/._a.jsonl", "f.tar")]
    monkeypatch.setattr(sources, "READ_BYTES", 37)
    monkeypatch.setattr(archives, "READ_BYTES", 41)
    assert read(tmp_path / name) == (found, rejects)


@pytest.mark.parametrize(
    "share, suffix", [(share, suffix) for share in (0.3, 0.6) for suffix in COMPRESS] + [(0.97, ".gz"), (0.97, ".zst")]
)
def test_a_truncated_tar_is_broken(tmp_path, suffix, share):
    members = {f"{i}.txt": f"{i} ".encode() * 2000 + b"\n" for i in range(9)}
    data = COMPRESS[suffix](tar(members))
    (tmp_path / f"a.tar{suffix}").write_bytes(data[: int(len(data) * share)])
    _, rejects = read(tmp_path / f"a.tar{suffix}")
    assert "broken_file" in {rule for _, _, rule in rejects}


def test_a_tar_cut_between_two_members_or_with_a_broken_header_is_broken(tmp_path):
    data = tar({"a.txt": b"x" * 512, "b.txt": b"y"})
    for broken in (data[:1024], data[:1024] + b"?" * 512 + data[1536:], b"", b"no tar at all\n" * 100):
        (tmp_path / "a.tar").write_bytes(broken)
        assert ("", 1, "broken_file") in read(tmp_path / "a.tar")[1]


def test_a_zip_that_is_broken_or_wants_a_password(tmp_path):
    data = zipped({"a.txt": b"hello " * 500, "b.txt": b"good"})
    for broken in (data[:-30], b"no zip", data[:100]):
        (tmp_path / "a.zip").write_bytes(broken)
        assert read(tmp_path / "a.zip")[1] == [("", 1, "broken_file")]
    flipped = bytearray(data)
    flipped[45] ^= 0xFF  # in a.txt
    (tmp_path / "a.zip").write_bytes(flipped)
    found, rejects = read(tmp_path / "a.zip")
    assert [rule for name, _, rule in rejects] == ["broken_file"] and found["b.txt"] == [(1, b"good")]
    locked = bytearray(data)
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        locked[data.index(mark) + offset] |= 1
    (tmp_path / "a.zip").write_bytes(locked)
    [part] = [p for c in sources.chunks(sources.find([str(tmp_path / "a.zip")]), 0, ChunkSizes()) for p in c.parts if p.rejects]
    assert "encrypted" in part.rejects[0][2]


@pytest.mark.parametrize("name", ["a.tar.gz", "a.zip", "a.tar.zst", "pax.tar.gz"])
def test_what_an_archive_expands_to_is_never_held(tmp_path, name):
    zeros = bytes(60_000_000)
    if name == "a.zip":
        content = zipped({"a.txt": zeros})
    elif name == "pax.tar.gz":  # a header that promises 60 MB of names
        info = tarfile.TarInfo("x")
        info.size, info.type = len(zeros), tarfile.XHDTYPE
        header = info.tobuf(tarfile.USTAR_FORMAT)
        content = gzip.compress(header + zeros, 1)
    else:
        content = COMPRESS[name[5:]](tar({"a.txt": zeros}))
    (tmp_path / name).write_bytes(content)
    del zeros
    tracemalloc.start()
    rejects = read(tmp_path / name, ChunkSizes(longest_record=1_000_000))[1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [rule for _, _, rule in rejects] == ["broken_file" if name == "pax.tar.gz" else "line_too_long"]
    assert peak < (80_000_000 if name.endswith(".zst") else 40_000_000)  # 1 kB of .zst may be 32 MB


def test_positions_in_an_archive_are_those_of_its_file(tmp_path):
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(tar({f"{i}.jsonl": JSONL for i in range(20)})))
    parts = [part for chunk in sources.chunks(sources.find([str(path)]), 0, ChunkSizes(5000)) for part in chunk.parts]
    positions = [part.position for part in parts]
    assert positions == sorted(positions) and positions[-1] == path.stat().st_size


# ---- JSON arrays --------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.integers(-99, 99) | st.text(max_size=8) | st.sampled_from(['"', "\\", '\\"', "[{", "],", "\n"]),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=3),
    max_leaves=8,
)


@given(st.lists(VALUES, max_size=6), st.sampled_from([None, 0, 2]), st.booleans(), st.integers(1, 20), st.booleans())
def test_elements_of_an_array_are_jsons_own(values, indent, ascii, block, mark):
    data = (b"\xef\xbb\xbf" if mark else b"") + json.dumps(values, indent=indent, ensure_ascii=ascii).encode() + b"\n"
    is_array, blocks = json_array.is_array(data[i : i + block] for i in range(0, len(data), block))
    assert is_array
    found = list(json_array.elements(blocks, 1000))
    assert [number for number, _ in found] == list(range(1, len(values) + 1))
    assert [json.loads(record) for _, record in found] == values


def test_arrays_that_are_none_or_broken():
    def elements(text):
        return [record for _, record in json_array.elements(iter([text]), 10)]

    assert elements(b"[1,]") == [b"1"] and elements(b"[1,,2]") == [b"1", b"", b"2"] and elements(b"[ ]") == []
    assert elements(b"[1, 2") == [b"1", ("broken_file", "the JSON array has no end")]
    assert elements(b"[1]\n[2]\n") == [b"1", b"2"]
    assert elements(b"[1] x")[1] == ("broken_file", "something follows the JSON array")
    assert elements(b'["12345678901234", 2]') == [("line_too_long", "a record of 16 bytes (at most 10)"), b"2"]
    for text in (b'{"a": 1}\n', b"", b"\n\n", b"\xef\xbb\xbf{}", b'"['):
        assert not json_array.is_array(iter([text[:1], text[1:]]))[0]


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_in_a_file(tmp_path, indent, monkeypatch):
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps([{"text": text} for text in TEXTS], ensure_ascii=False, indent=indent), encoding="utf-8")
    assert texts(path) == TEXTS
    whole = [chunk.parts[0].records for chunk in sources.chunks(sources.find([str(path)]), 0, ChunkSizes(500))]
    monkeypatch.setattr(sources, "READ_BYTES", 13)
    assert [chunk.parts[0].records for chunk in sources.chunks(sources.find([str(path)]), 0, ChunkSizes(500))] == whole
    assert len(whole) > 5 and whole[1][0][0] == len(whole[0]) + 1


# ---- parquet ------------------------------------------------------------------------------------------------------


def test_rows_of_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    dialogue = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
    table = pyarrow.table({
        "id": range(100), "text": TEXTS[:99] + [None], "messages": [None] * 99 + [dialogue], "image": [b"\xff"] * 100,
    })  # fmt: skip
    parquet.write_table(table, path, row_group_size=30)
    found, rejects = read(path)
    assert not rejects and [line for line, _ in found[""]] == list(range(1, 101))
    rows = [json.loads(record) for _, record in found[""]]
    assert [row["text"] for row in rows] == TEXTS[:99] + [None] and rows[99] == {"text": None, "messages": dialogue}
    assert [list(json.loads(record)) for _, record in read(path, text_key="id")[0][""]][0] == ["id", "messages"]


def test_parquet_that_cannot_be_read(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"body": ["x"]}), path)
    [chunk] = sources.chunks(sources.find([str(path)]), 0, ChunkSizes())
    assert chunk.parts[0].rejects == [(1, "broken_file", "no column 'text' or those of a dialogue (there are: body)")]
    texts_as_bytes = pyarrow.array([b"good", b"\xff", "好".encode()])
    parquet.write_table(pyarrow.table({"text": texts_as_bytes}), path)
    assert read(path) == ({"": [(1, b'{"text":"good"}'), (3, '{"text":"好"}'.encode())]}, [("", 2, "invalid_utf8")])
    path.write_bytes(path.read_bytes()[:-20])
    assert read(path)[1] == [("", 1, "broken_file")]


# ---- what is found ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.docx", "a.jsonl.lz4", "a.rar", "a.7z.gz", "a.bin.gz", "a.parquet.zst", "a.2024", "a.md"])
def test_an_unknown_suffix_is_refused_by_name_before_anything_is_read(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=rf"--input: '.*/{name}' is no '\..*' file that can be read \(expected \.jsonl"):
        sources.find([str(tmp_path / name)])


def test_a_known_suffix_in_any_spelling(tmp_path):
    for name in ("a.JSONL", "b.Txt.GZ", "c.CSV", "d.ndjson", "e.tar.XZ", "f.Zip", "part-00000"):
        (tmp_path / name).touch()
        [source] = sources.find([str(tmp_path / name)])
        assert (
            source.format == {"a": "jsonl", "b": "txt", "c": "csv", "d": "jsonl", "e": "tar", "f": "zip", "p": "jsonl"}[name[0]]
        )


def test_folders_and_globs(tmp_path, capsys):
    for name in ("b.jsonl", "sub/a.txt", "sub/deep/c.json.gz", ".hidden/x.txt", "sub/.y.txt", "LICENSE", "notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def names(pattern):
        return [source.path.removeprefix(f"{tmp_path}/") for source in sources.find([f"{tmp_path}{pattern}"])]

    assert names("") == names("/") == ["b.jsonl", "sub/a.txt", "sub/deep/c.json.gz"]
    assert "2 other files in" in (said := capsys.readouterr().err) and "LICENSE" in said
    assert names("/**/*.json*") == ["b.jsonl", "sub/deep/c.json.gz"]
    assert names("/sub/**") == ["sub/a.txt", "sub/deep/c.json.gz"]
    with pytest.raises(UserError, match="no '.md' file"):
        names("/*.*")
    with pytest.raises(UserError, match="matches folders only"):
        names("/su*")
    (tmp_path / "dataset_info.json").touch()
    with pytest.raises(UserError, match="is a dataset folder"):
        names("")


# ---- encodings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "gb18030", "GBK", "big5"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv", "a.jsonl.gz", "a.zip", "array.json"])
def test_encodings(tmp_path, encoding, name, monkeypatch):
    monkeypatch.setattr(sources, "READ_BYTES", 7)
    monkeypatch.setattr(archives, "READ_BYTES", 7)
    texts = ["第一篇", "的文章"]
    text = {
        "a.txt": "\n".join(texts),
        "a.csv": "text\n" + "\n".join(texts),
        "array.json": json.dumps([{"text": t} for t in texts], ensure_ascii=False),
    }.get(name, "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts))
    data = text.encode(encoding)
    data = gzip.compress(data) if name.endswith("gz") else zipped({"a.jsonl": data}) if name == "a.zip" else data
    (tmp_path / name).write_bytes(data)
    marked = encoding in ("utf-8-sig", "utf-16", "utf-32")
    found, rejects = read(tmp_path / name, encoding=encodings.normal_name("gb18030" if marked else encoding))
    records = [record.decode().removeprefix("\ufeff") for part in found.values() for _, record in part]
    assert not rejects
    assert records == texts if name == "a.txt" else [json.loads(record)["text"] for record in records] == texts


def test_a_line_that_cannot_be_decoded_is_rejected_alone(tmp_path):
    (tmp_path / "a.txt").write_bytes("好\n".encode("gb18030") + b"\xff\xff\n" + "第三".encode("gb18030") + b"\n\x81")
    found, rejects = read(tmp_path / "a.txt", encoding="gb18030")
    assert found[""] == [(1, "好".encode()), (3, "第三".encode())]
    assert rejects == [("", 2, "invalid_utf8"), ("", 4, "invalid_utf8")]
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe" + "好\n".encode("utf-16-le") + b"\x00\xd8\n\x00" + "三".encode("utf-16-le"))
    assert read(tmp_path / "b.txt") == ({"": [(1, "好".encode()), (3, "三".encode())]}, [("", 2, "invalid_utf8")])


def test_the_likely_encoding():
    simplified, traditional = "这是第一篇文章，说的是春天。", "這是第一篇文章，說的是春天。"
    assert encodings.likely(simplified.encode("gb18030")) == "gb18030"
    assert encodings.likely(traditional.encode("big5")) == "big5"
    assert encodings.likely('{"text": "ab"}'.encode("utf-16-le")) == "utf-16-le"
    assert encodings.likely('{"text": "ab"}'.encode("utf-16-be")) == "utf-16-be"
    assert encodings.likely(b"\xff\xff\xff") is None
    assert encodings.normal_name("rot13") is None and encodings.normal_name("none") is None
    assert encodings.normal_name("GB2312") == "gb18030" and encodings.normal_name("UTF8") == "utf-8"
