"""Assemble finished chunks into a dataset folder.

mateconv-train.array_record-00000-of-00004 …    see data/shards.py
dataset_info.json, features.json, metadata.json  `tfds.builder_from_directory` opens the folder
tokenizer/
stats.json, stats.png                            see data/build/statistics.py
rejected.jsonl                                   rejected records: file, line, rule, reason
"""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tensorflow_datasets as tfds

from mateconv_jax import files
from mateconv_jax.data.build import packing
from mateconv_jax.data.build.options import SPLITS
from mateconv_jax.data.build.statistics import Statistics, summary
from mateconv_jax.data.rows import Batch
from mateconv_jax.data.shards import RowFormat, ShardRows, features, write_shard
from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib
from mateconv_jax.errors import UserError

NAME = "mateconv"  # of the TFDS dataset
DESCRIPTION = (
    "Rows of seq_len + 1 tokens; those of texts overlap by one; `length` of them are real. `document_starts`: a bit a token, "
    "the lowest of a byte first; 1 where a document begins. `learned`, where there are dialogues: bits, 1 for tokens to learn. "
    "Rows of pairs have another dimension of 2 in front: the chosen and the rejected dialogue."
)


def assemble(
    chunks: list[Path],
    folder: Path,
    tokenizer_folder: Path,
    seq_len: int,
    options: dict,
    input_digest: str,
    seconds: float,
    also_bin: bool,
) -> dict:
    """Assemble a dataset folder from the folders of finished chunks, which are left unchanged.

    Args:
      chunks: folders that ChunkWriter wrote, in order.
      folder: must not exist yet.
      tokenizer_folder: the tokenizer that the chunks were made with; copied unchanged.
      options, input_digest: what the dataset was made from, see build/identity.py.
      seconds: how long the work took, for stats.json.
      also_bin: also write each split as a flat uint16 stream, SPLIT.bin.

    Returns:
      The summary, as in stats.json.

    Raises:
      UserError: no chunk has a training document.
    """
    from mateconv_jax.data.build.statistics_plot import write_plot  # imports matplotlib, 1 s

    folder.mkdir(parents=True)
    tokenizer = tokenizer_lib.load(tokenizer_folder, "--tokenizer")
    vocab_size = tokenizer_lib.vocab_size(tokenizer)
    statistics, shards = _gather(chunks, folder, vocab_size)
    format = _format_of(shards, statistics, seq_len, vocab_size)
    split_infos = [_place_split(folder, split, found, format) for split, found in shards.items() if found]
    if also_bin:
        _write_bins(folder, shards, format)
    shutil.copytree(tokenizer_folder, folder / "tokenizer")
    figures = summary(statistics, tokenizer, seq_len, seconds)
    files.write_text(folder / "stats.json", json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
    write_plot(figures, folder / "stats.png")
    metadata = {
        "seq_len": seq_len,
        "vocab_size": format.vocab_size,
        "version": format.version,
        "content": "pairs" if format.pairs else "texts",
        "learned": format.learned,
        "tokenizer_fingerprint": tokenizer_lib.fingerprint(tokenizer),
        "splits": figures["splits"],
        "options": options,
        "input_digest": input_digest,
    }
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features(format),
        split_infos=split_infos,
        description=DESCRIPTION,
        metadata=tfds.core.MetadataDict(metadata),
        check_data=False,  # TFDS would read with TensorFlow, which lacks ArrayRecord
    )
    return figures


Shards = dict[str, list[tuple[Path, dict]]]  # {split: [(shard, its counts)]}, see chunk_writer.py


def _format_of(shards: Shards, statistics: Statistics, seq_len: int, vocab_size: int) -> RowFormat:
    if any(counts.pairs for counts in statistics.splits.values()):
        return RowFormat.of_pairs(seq_len, vocab_size)
    return RowFormat(seq_len, vocab_size, any(counts["learned"] for found in shards.values() for _, counts in found))


def _gather(chunks: list[Path], folder: Path, vocab_size: int) -> tuple[Statistics, Shards]:
    """Merge the chunks' statistics, collect their shards, and concatenate their rejects into rejected.jsonl.

    Raises:
      UserError: no chunk has a training document.
    """
    statistics = Statistics(vocab_size)
    shards: Shards = {split: [] for split in SPLITS}
    with (folder / "rejected.jsonl").open("wb") as rejected:
        for chunk in chunks:
            statistics += Statistics.load(chunk / "statistics.npz")
            for split, counts in json.loads((chunk / "chunk.json").read_text(encoding="utf-8"))["splits"].items():
                shards[split].append((chunk / split, counts))
            with (chunk / "rejected.jsonl").open("rb") as lines:
                shutil.copyfileobj(lines, rejected)
    if not shards["train"]:
        with (folder / "rejected.jsonl").open(encoding="utf-8") as lines:
            first = next(map(json.loads, lines), None)
        reason = f" ({first['file']}:{first['line']}: {first['reason']})" if first else ""
        raise UserError(f"--input: no document to train on{reason}")
    return statistics, shards


def _place_split(folder: Path, split: str, shards: list[tuple[Path, dict]], format: RowFormat) -> tfds.core.SplitInfo:
    """Link the shards under TFDS's names. If any shard has the field `learned`, those without it are rewritten with it."""
    template = tfds.core.ShardedFileTemplate(data_dir=folder, dataset_name=NAME, split=split, filetype_suffix="array_record")
    n_bytes = 0
    for index, (path, counts) in enumerate(shards):
        placed = Path(template.sharded_filepath(shard_index=index, num_shards=len(shards)))
        if counts["learned"] == format.learned:
            files.link(path, placed)
        else:
            rows = _read(path, dataclasses.replace(format, learned=False))
            write_shard(placed, rows | {"learned": packing.is_real(rows)}, format)
        n_bytes += placed.stat().st_size
    return tfds.core.SplitInfo(
        name=split,
        shard_lengths=[counts["rows"] for _, counts in shards],
        num_bytes=n_bytes,
        filename_template=template,
    )


def _read(path: Path, format: RowFormat) -> Batch:
    """All rows of a shard."""
    shard = ShardRows([path], format, document_starts=(0, 0))  # shards record the starts, so the ids are unused
    return shard.read(np.arange(len(shard)))


def _write_bins(folder: Path, shards: Shards, format: RowFormat) -> None:
    if format.pairs:
        print("--also_bin: no .bin file is written, which cannot hold pairs", file=sys.stderr)
        return
    if format.learned:
        print("--also_bin: a .bin file does not say which tokens are learned, only the dataset folder does", file=sys.stderr)
    for split, found in shards.items():
        if found:
            with (folder / f"{split}.bin").open("wb") as file:
                for path, counts in found:  # one at a time: there may be more shards than the limit of open files
                    _write_stream(file, _read(path, dataclasses.replace(format, learned=counts["learned"])), counts)


def _write_stream(file: BinaryIO, rows: Batch, counts: dict) -> None:
    """Append the shard's tokens. A text row omits its first token, which is the last one of the row before."""
    for i, (tokens, length) in enumerate(zip(rows["tokens"], rows["length"], strict=True)):
        file.write(tokens[0 < i < counts["streamed_rows"] : length].tobytes())
