"""Finished chunks become a dataset folder.

mateconv-train.array_record-00000-of-00004 …    see data/shards.py
dataset_info.json, features.json, metadata.json  `tfds.builder_from_directory` opens the folder
tokenizer/
stats.json, stats.png                            see data/build/statistics.py
rejected.jsonl                                   what was left out: file, line, rule, reason
"""

import json
import shutil
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from mateconv_jax import files
from mateconv_jax.data.build.options import SPLITS
from mateconv_jax.data.build.statistics import Statistics, summary
from mateconv_jax.data.shards import RowFormat, ShardRows, features
from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib
from mateconv_jax.errors import UserError

NAME = "mateconv"  # of the TFDS dataset
DESCRIPTION = (
    "Rows of seq_len + 1 tokens that overlap by one; `length` of them are real. `document_starts`: a bit a token, the lowest "
    "of a byte first; 1 where a document begins."
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
    """Put the folders of finished chunks together as a dataset folder. The chunks' own folders stay as they are.

    Args:
      chunks: folders that worker.ChunkWriter wrote, in order.
      folder: a new one.
      tokenizer_folder: the tokenizer that made the chunks; it is copied as it is.
      options, input_digest: what the dataset was made from, see build/identity.py.
      seconds: that the work took, for stats.json.
      also_bin: write each split as a flat uint16 stream too, SPLIT.bin.

    Returns:
      The summary, as in stats.json.

    Raises:
      UserError: no chunk has a document.
    """
    from mateconv_jax.data.build.statistics_plot import write_plot  # matplotlib, 1 s: not for those who only read a dataset

    folder.mkdir(parents=True)
    tokenizer = tokenizer_lib.load(tokenizer_folder, "--tokenizer")
    format = RowFormat(seq_len, tokenizer_lib.vocab_size(tokenizer))
    statistics, shards = _gather(chunks, folder, format.vocab_size)
    split_infos = [_link_split(folder, split, found) for split, found in shards.items() if found]
    if also_bin:
        for split, found in shards.items():
            if found:
                _write_bin(folder / f"{split}.bin", [path for path, _ in found], format)
    shutil.copytree(tokenizer_folder, folder / "tokenizer")
    figures = summary(statistics, tokenizer, seconds)
    files.write_text(folder / "stats.json", json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
    write_plot(figures, folder / "stats.png")
    metadata = {
        "seq_len": seq_len,
        "vocab_size": format.vocab_size,
        "version": format.version,
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
        check_data=False,  # TFDS' check reads with TensorFlow, which has no ArrayRecord
    )
    return figures


Shards = dict[str, list[tuple[Path, dict]]]  # split: each shard and its counts, {"rows", "bytes"}


def _gather(chunks: list[Path], folder: Path, vocab_size: int) -> tuple[Statistics, Shards]:
    """What all chunks have: their statistics together and their shards; their rejects go to rejected.jsonl.

    Raises:
      UserError: no chunk has a document.
    """
    statistics = Statistics(vocab_size)
    shards: Shards = {split: [] for split in SPLITS}
    with (folder / "rejected.jsonl").open("wb") as rejected:
        for chunk in chunks:
            statistics += Statistics.load(chunk / "statistics.npz")
            for split, counts in json.loads((chunk / "chunk.json").read_text())["splits"].items():
                shards[split].append((chunk / split, counts))
            with (chunk / "rejected.jsonl").open("rb") as lines:
                shutil.copyfileobj(lines, rejected)
    if not shards["train"]:
        with (folder / "rejected.jsonl").open(encoding="utf-8") as lines:
            first = next(map(json.loads, lines), None)
        reason = f" ({first['file']}:{first['line']}: {first['reason']})" if first else ""
        raise UserError(f"--input: no document to train on{reason}")
    return statistics, shards


def _link_split(folder: Path, split: str, shards: list[tuple[Path, dict]]) -> tfds.core.SplitInfo:
    """The shards under the names that TFDS gives them."""
    template = tfds.core.ShardedFileTemplate(data_dir=folder, dataset_name=NAME, split=split, filetype_suffix="array_record")
    for index, (path, _) in enumerate(shards):
        files.link(path, Path(template.sharded_filepath(shard_index=index, num_shards=len(shards))))
    return tfds.core.SplitInfo(
        name=split,
        shard_lengths=[counts["rows"] for _, counts in shards],
        num_bytes=sum(counts["bytes"] for _, counts in shards),
        filename_template=template,
    )


def _write_bin(path: Path, shards: list[Path], format: RowFormat) -> None:
    """The shards' streams one behind the other: each row but for the token that it shares with the row before."""
    with path.open("wb") as file:
        for shard in shards:  # opened one at a time: there may be more than files may be open
            rows = ShardRows([shard], format)
            for start in range(0, len(rows), 4096):
                batch = rows.read(np.arange(start, min(start + 4096, len(rows))))
                for i, (tokens, length) in enumerate(zip(batch["tokens"], batch["length"], strict=True), start):
                    file.write(tokens[min(i, 1) : length].tobytes())
