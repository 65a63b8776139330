"""A dataset folder: rows in ArrayRecord shards with TFDS metadata, the tokenizer, and what was found out about the text.

mateconv-train.array_record-00000-of-00004 …    see shards.py
dataset_info.json, features.json, metadata.json  `tfds.builder_from_directory` opens the folder
tokenizer/
stats.json, stats.png                            see build/statistics.py
rejected.jsonl                                   what was left out: file, line, rule, reason
"""

import json
from pathlib import Path

from mateconv_jax.data.shards import ShardRows
from mateconv_jax.data.token_bin import FlatRows
from mateconv_jax.errors import UserError

Rows = ShardRows | FlatRows


def read_metadata(folder: str | Path, key: str) -> dict:
    """The folder's metadata.json: seq_len, vocab_size, tokenizer_fingerprint, splits and options. `key` names the flag or
    configuration key that gave the folder, for the error.

    Raises:
      UserError: no dataset at `folder`.
    """
    try:
        return json.loads((Path(folder) / "metadata.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"{key}: no dataset at {str(folder)!r} (expected a folder with dataset_info.json and metadata.json). "
            "Make one with: python -m mateconv_jax.prepare --input raw.jsonl --output data/zh --train_tokenizer"
        ) from error


def open_rows(path: str | Path, split: str, seq_len: int, key: str) -> Rows | None:
    """The rows of a dataset folder's split, or of a flat .bin file; None where the folder has no such split.

    Raises:
      UserError: nothing of that kind is there. `key` names the configuration key that gave the path.
    """
    if str(path).endswith(".bin"):
        return FlatRows(path, seq_len, key)
    import tensorflow_datasets as tfds  # 2 s: not for those who only read metadata

    metadata = read_metadata(path, key)
    info = tfds.builder_from_directory(path).info
    if split not in info.splits:
        return None
    return ShardRows(info.splits[split].filepaths, metadata["seq_len"], metadata["vocab_size"])
