"""What `prepare` finds at its output, its work folder and its inputs: replaced, gone on with, or left alone."""

import io
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from mateconv_jax import DataProcessor
from mateconv_jax.data.build import chunk_writer, pipeline
from mateconv_jax.errors import UserError
from tests.data.build.preparing import (
    TRAIN_TOKENIZER,
    assert_equal_datasets,
    documents_of_text,
    prepare,
    stats,
    stop_after,
    write_jsonl,
)


def texts(n, word="文字"):
    return [{"text": f"{word}{i}"} for i in range(n)]


def snapshot(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- only a dataset is replaced -----------------------------------------------------------------------------------


def test_overwrite_never_removes_what_is_no_dataset(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    path = write_jsonl(data / "raw.jsonl", texts(20))
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match="--output: .*data' is not a dataset"):
        prepare(path, data, *TRAIN_TOKENIZER, "--overwrite")
    processor = DataProcessor("none")
    processor.tokenizer_path = str(prepare(path, tmp_path / "zh", *TRAIN_TOKENIZER) / "tokenizer")
    with pytest.raises(UserError, match="--output: .*data' is not a dataset"):
        processor.process_dataset(str(path), str(data), resume=False)
    shutil.rmtree(tmp_path / "zh")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["notes.txt", "tokenizer/model.safetensors", "raw.jsonl"])
def test_overwrite_never_removes_what_someone_put_into_a_dataset(tmp_path, name):
    path = write_jsonl(tmp_path / "raw.jsonl", texts(20))
    folder = prepare(path, tmp_path / "zh", *TRAIN_TOKENIZER)
    (folder / name).write_bytes(path.read_bytes())
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=f"--output: .*zh' holds '{name}', not part of a dataset"):
        prepare(folder / name if name == "raw.jsonl" else path, folder, *TRAIN_TOKENIZER, "--overwrite")
    assert snapshot(tmp_path) == before


def test_an_input_is_never_replaced(tmp_path):
    path = write_jsonl(tmp_path / "raw.jsonl", texts(20))
    folder = prepare(path, tmp_path / "zh", *TRAIN_TOKENIZER, "--also_bin")
    before = snapshot(tmp_path)
    flags = ("--tokenizer", folder / "tokenizer", "--overwrite")
    with pytest.raises(UserError, match="--input: .*train.bin' is in .*zh'"):
        prepare(folder / "train.bin", folder, *flags)
    processor = DataProcessor(str(folder / "tokenizer"))
    with pytest.raises(UserError, match="output_path: .*raw.jsonl' is the input"):
        processor.validate_and_clean_jsonl(str(path), str(path))
    (tmp_path / "x.rejected.jsonl").write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="output_path: .*x.rejected.jsonl' is the input"):
        processor.validate_and_clean_jsonl(str(tmp_path / "x.rejected.jsonl"), str(tmp_path / "x"))
    (tmp_path / "x.rejected.jsonl").unlink()
    (tmp_path / "flat.bin").write_bytes((folder / "train.bin").read_bytes())
    with pytest.raises(UserError, match="output_path: .*flat.bin' is there"):
        processor.process_dataset(str(path), str(tmp_path / "flat.bin"), resume=False)
    (tmp_path / "flat.bin").unlink()
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
def test_what_others_put_at_the_work_folders_path_is_left_alone(tmp_path, flags):
    path = write_jsonl(tmp_path / "raw.jsonl", texts(20))
    (tmp_path / "zh.partial").mkdir()
    (tmp_path / "zh.partial" / "notes.txt").write_text("notes")
    with pytest.raises(UserError, match="work folder '.*zh.partial' holds a foreign file, 'notes.txt'"):
        prepare(path, tmp_path / "zh", *TRAIN_TOKENIZER, *flags)
    moved = tmp_path / "zh.partial" / "chunks"
    moved.mkdir()
    (tmp_path / "zh.partial" / "notes.txt").rename(moved / "raw.jsonl")
    with pytest.raises(UserError, match="--input: .*raw.jsonl' is in .*zh.partial'"):
        prepare(moved / "raw.jsonl", tmp_path / "zh", *TRAIN_TOKENIZER, *flags)
    assert (moved / "raw.jsonl").read_text() == "notes"


def test_an_empty_folder_is_taken_and_a_nameless_one_is_an_error(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "raw.jsonl", texts(20))
    (tmp_path / "zh").mkdir()
    prepare(path, tmp_path / "zh", *TRAIN_TOKENIZER, "--overwrite")
    assert stats(tmp_path / "zh")["documents"] == 20
    with pytest.raises(UserError, match=r"--output: '\.' does not name a folder"):
        prepare(path, ".", *TRAIN_TOKENIZER, "--overwrite")


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_while_it_replaces_a_dataset(tmp_path, moment):
    """Before or after the new one takes the place of the old one, which lies in the work folder."""
    path = write_jsonl(tmp_path / "raw.jsonl", texts(20))
    folder = prepare(path, tmp_path / "zh", *TRAIN_TOKENIZER)
    before = snapshot(folder)
    tokenizer = ("--tokenizer", folder / "tokenizer")
    partial = tmp_path / "zh.partial"
    partial.mkdir()
    if moment == "before":
        folder.rename(partial / "replaced")
        (tmp_path / "other.jsonl").touch()
        with pytest.raises(UserError, match="was made with"):
            prepare(tmp_path / "other.jsonl", folder, *tokenizer)
        assert snapshot(folder) == before
    else:
        shutil.copytree(folder, partial / "replaced")
    prepare(path, folder, *tokenizer, "--overwrite", "--val_fraction", "0")
    assert stats(folder)["documents"] == 20 and not partial.exists()


# ---- what is found is what it must be -----------------------------------------------------------------------------


def test_a_changed_input_of_the_same_size_is_noticed(tmp_path, capsys):
    path = write_jsonl(tmp_path / "raw.jsonl", texts(2000))
    folder = prepare(path, tmp_path / "zh", *TRAIN_TOKENIZER)
    path.touch()  # another time, the same content
    prepare(path, folder, *TRAIN_TOKENIZER)
    assert "nothing to do" in capsys.readouterr().out
    content = path.read_text(encoding="utf-8")
    path.write_text(content.replace('文字1000"', '文章1000"'), encoding="utf-8")
    with pytest.raises(UserError, match="--input: the content is not what .*zh' was made from"):
        prepare(path, folder, *TRAIN_TOKENIZER)
    prepare(path, folder, *TRAIN_TOKENIZER, "--overwrite")
    assert "文章1000" in documents_of_text(folder)


def test_another_text_on_standard_input_is_noticed(tmp_path, monkeypatch, capsys):
    def piped(n, *flags, word="文字"):
        data = "".join(json.dumps(record) + "\n" for record in texts(n, word)).encode()
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
        return prepare("-", tmp_path / "zh", *TRAIN_TOKENIZER, "--chunk_mb", "0.0003", "--val_fraction", "0", *flags)

    piped(40)
    capsys.readouterr()
    piped(40)
    assert "nothing to do" in capsys.readouterr().out
    for n, word in [(40, "别的"), (30, "文字"), (50, "文字")]:
        with pytest.raises(UserError, match="--input: the content is not what .*zh' was made from"):
            piped(n, word=word)
    piped(30, "--overwrite")
    assert stats(tmp_path / "zh")["documents"] == 30


def test_only_chunks_of_this_input_are_put_together(tmp_path, monkeypatch, dataset_folder):
    """What is piped in the second time ends where a chunk of the first ended."""
    lines = [json.dumps({"text": f"{i:03d}"}).encode() + b"\n" for i in range(100)]

    def piped(n):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"".join(lines[:n]))))
        chunk_mb = 10 * (len(lines[0]) - 1) / 1e6
        flags = ("--tokenizer", dataset_folder / "tokenizer", "--chunk_mb", f"{chunk_mb:.6f}", "--val_fraction", "0")
        return prepare("-", tmp_path / "zh", *flags)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_assemble", stop_after(0, pipeline._assemble))
        with pytest.raises(KeyboardInterrupt):
            piped(100)
    assert len(list((tmp_path / "zh.partial" / "chunks").iterdir())) == 10
    assert documents_of_text(piped(50)) == [f"{i:03d}" for i in range(50)]


def test_a_changed_chat_template_is_noticed(tmp_path, dataset_folder, capsys):
    path = write_jsonl(tmp_path / "raw.jsonl", [{"prompt": f"问{i}", "response": "答"} for i in range(20)])
    shutil.copytree(dataset_folder / "tokenizer", tmp_path / "tokenizer")
    flags = ("--tokenizer", tmp_path / "tokenizer")
    folder = prepare(path, tmp_path / "zh", *flags)
    template = tmp_path / "tokenizer" / "chat_template.jinja"
    template.write_text(template.read_text().replace("</s>", "</s></s>"))
    with pytest.raises(UserError, match="was made with tokenizer_settings="):
        prepare(path, folder, *flags)
    old = json.loads((folder / "metadata.json").read_text())  # as earlier versions wrote it
    del old["options"]["tokenizer_settings"], old["input_digest"]
    old["options"]["input"] = [entry[:2] for entry in old["options"]["input"]]
    (folder / "metadata.json").write_text(json.dumps(old))
    capsys.readouterr()
    prepare(path, folder, *flags)
    assert "nothing to do" in capsys.readouterr().out


def test_an_input_that_changed_under_a_run_that_was_stopped(tmp_path, monkeypatch, dataset_folder):
    path = write_jsonl(tmp_path / "raw.jsonl", texts(100))
    flags = ("--tokenizer", dataset_folder / "tokenizer", "--chunk_mb", "0.0005")
    monkeypatch.setattr(chunk_writer.ChunkWriter, "write_chunk", stop_after(2, chunk_writer.ChunkWriter.write_chunk))
    with pytest.raises(KeyboardInterrupt):
        prepare(path, tmp_path / "zh", *flags)
    monkeypatch.undo()
    content = path.read_text(encoding="utf-8")
    path.write_text(content.replace('文字1"', '文章1"'), encoding="utf-8")
    with pytest.raises(UserError, match=r"--input: .*raw.jsonl' has changed .* near line 1 "):
        prepare(path, tmp_path / "zh", *flags)
    path.write_text(content, encoding="utf-8")  # as it was, but for its time: the same chunks
    prepare(path, tmp_path / "zh", *flags)
    straight = prepare(path, tmp_path / "straight", *flags)
    assert_equal_datasets(tmp_path / "zh", straight)


def test_one_file_more_is_named_alone(tmp_path, dataset_folder):
    for i in range(100):
        (tmp_path / f"{i:03d}.txt").write_text(f"第{i}篇")
    flags = ("--tokenizer", dataset_folder / "tokenizer", "--txt_document", "file")
    folder = prepare(tmp_path / "*.txt", tmp_path / "zh", *flags)
    (tmp_path / "100.txt").write_text("多一篇")
    with pytest.raises(UserError, match=r"made with another --input: without '.*/100\.txt' \(") as error:
        prepare(tmp_path / "*.txt", folder, *flags)
    assert len(str(error.value)) < 400
    for i in (3, 100):
        (tmp_path / f"{i:03d}.txt").unlink()
    with pytest.raises(UserError, match=r"made with another --input: with '.*/003\.txt' \("):
        prepare(tmp_path / "*.txt", folder, *flags)


# ---- many small files ---------------------------------------------------------------------------------------------


def test_many_small_files_become_few_shards_and_rejects_keep_their_file(tmp_path, dataset_folder):
    for i in range(300):
        (tmp_path / f"{i:03d}.txt").write_bytes(b"\xff" if i == 7 else f"第{i}条新闻，今天有比赛。".encode())
    flags = ("--tokenizer", dataset_folder / "tokenizer", "--txt_document", "file", "--val_fraction", "0")
    folder = prepare(tmp_path / "*.txt", tmp_path / "zh", *flags)
    assert len(list(folder.glob("*array_record*"))) == 1
    assert documents_of_text(folder) == [f"第{i}条新闻，今天有比赛。" for i in range(300) if i != 7]
    [reject] = map(json.loads, (folder / "rejected.jsonl").read_text().splitlines())
    assert (reject["file"], reject["line"], reject["rule"]) == (str(tmp_path / "007.txt"), 1, "invalid_utf8")


def test_a_disk_that_fills_keeps_what_is_finished(tmp_path, dataset_folder):
    small = tmp_path / "small"
    small.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", small]).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        path = write_jsonl(tmp_path / "raw.jsonl", [{"text": f"{i}从前有一座山，山里有一座庙。" * 5} for i in range(2000)])
        flags = ("--tokenizer", dataset_folder / "tokenizer", "--chunk_mb", "0.05")
        with pytest.raises(UserError, match=r"cannot write .*No space left on device .*the same command resumes"):
            prepare(path, small / "zh", *flags)
        done = {p.name: p.stat().st_mtime_ns for p in (small / "zh.partial" / "chunks").iterdir() if p.suffix != ".partial"}
        assert done and not (small / "zh").exists()
        subprocess.run(["mount", "-o", "remount,size=64m", small], check=True)
        prepare(path, small / "zh", *flags)
        assert_equal_datasets(small / "zh", prepare(path, tmp_path / "zh", *flags))
    finally:
        subprocess.run(["umount", small], check=True)


def test_the_same_command_again_does_nothing_and_another_refuses(tmp_path, capsys):
    path = write_jsonl(tmp_path / "raw.jsonl", [{"text": f"文字{i}"} for i in range(20)])
    prepare(path, tmp_path / "zh", *TRAIN_TOKENIZER)
    before = (tmp_path / "zh" / "dataset_info.json").stat().st_mtime_ns
    prepare(path, tmp_path / "zh", *TRAIN_TOKENIZER)
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "zh" / "dataset_info.json").stat().st_mtime_ns == before
    for flags, message in [
        (["--min_chars", "2"], "cleaning.min_chars=1, not 2 "), (["--dedup", "near"], "dedup='exact', not 'near'"), (["--also_bin"], "also_bin=False"),
        (["--chunk_mb", "1"], "sizes.bytes=16000000, not 1000000 "), (["--seq_len", "17"], "seq_len=16, not 17"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=rf"was made with .*{message}.*--overwrite"):
            prepare(path, tmp_path / "zh", *TRAIN_TOKENIZER, *flags)
    with path.open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(UserError, match=r"another --input: .*raw\.jsonl' had \d+ bytes, now \d+"):
        prepare(path, tmp_path / "zh", *TRAIN_TOKENIZER)
    prepare(path, tmp_path / "zh", *TRAIN_TOKENIZER, "--overwrite", "--val_fraction", "0")
    assert stats(tmp_path / "zh")["documents"] == 21 and not (tmp_path / "zh.partial").exists()


def test_what_was_begun_with_other_options_or_another_input_is_refused(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "raw.jsonl", [{"text": f"文字{i}"} for i in range(100)])
    monkeypatch.setattr(chunk_writer.ChunkWriter, "write_chunk", stop_after(2, chunk_writer.ChunkWriter.write_chunk))
    flags = (*TRAIN_TOKENIZER, "--chunk_mb", "0.0005")
    with pytest.raises(KeyboardInterrupt):
        prepare(path, tmp_path / "zh", *flags)
    monkeypatch.undo()
    assert len(list((tmp_path / "zh.partial" / "chunks").iterdir())) == 2
    with pytest.raises(UserError, match=r"was begun with .*val_fraction=0.01, not 0.5"):
        prepare(path, tmp_path / "zh", *flags, "--val_fraction", "0.5")
    path.write_text(path.read_text().replace("文字1", "文章1"))  # the same size
    with pytest.raises(UserError, match="--input: the content has changed since a tokenizer was trained on it"):
        prepare(path, tmp_path / "zh", *flags)
    prepare(path, tmp_path / "zh", *flags, "--val_fraction", "0", "--overwrite")
    assert "文章1" in documents_of_text(tmp_path / "zh")
