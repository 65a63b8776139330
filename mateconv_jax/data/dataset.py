"""Opening a dataset. This is the only place that knows which formats a dataset may have.

A dataset folder, as `prepare` writes it:

mateconv-train.array_record-00000-of-00004 …    rows, see shards.py
dataset_info.json, features.json                 `tfds.builder_from_directory` opens the folder
metadata.json                                    seq_len, vocab_size, version, content, learned, tokenizer_fingerprint, …
tokenizer/
stats.json, stats.png                            see build/statistics.py
rejected.jsonl                                   what was left out: file, line, rule, reason

A flat `.bin` file: MateConv's stream of 16-bit token ids, see token_bin.py. All of it is the split that is asked for.
"""

import dataclasses
import hashlib
import json
import re
from pathlib import Path

import numpy as np

from mateconv_jax.data.rows import Batch, Rows
from mateconv_jax.data.shards import PAIRS_VERSION, RowFormat, ShardRows
from mateconv_jax.data.token_bin import FlatRows, n_rows
from mateconv_jax.data.tokenizer import folder as tokenizer_folder_lib
from mateconv_jax.errors import UserError, check_name


class JoinedRows:
    """Rows with more fields: arrays of a value for each row."""

    def __init__(self, rows: Rows, fields: dict[str, np.ndarray]):
        self._rows, self._fields = rows, fields

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, indices: np.ndarray) -> Batch:
        """Rows by number (B,), in any order."""
        return self._rows.read(indices) | {name: values[indices] for name, values in self._fields.items()}


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What is known of a dataset before its rows are read.

    Attributes:
      key: the flag or configuration key that gave the path, for errors.
      seq_len: targets of a row.
      splits: {name: number of rows}; None: a flat file, which has none.
      tokenizer_folder, tokenizer_fingerprint: of the tokenizer that made the ids; None: not known.
      content: what the rows are: texts (dialogues among them) or pairs.
    """

    path: Path
    key: str
    seq_len: int
    splits: dict[str, int] | None = None
    tokenizer_folder: Path | None = None
    tokenizer_fingerprint: str | None = None
    content: str = "texts"
    _format: RowFormat | None = None

    @property
    def learned(self) -> bool:
        """Whether rows say what is learned of them: there are whole dialogues in them."""
        return self._format is not None and self._format.learned

    def n_rows(self, split: str) -> int:
        """0 where there is no such split."""
        return n_rows(self.path, self.seq_len, self.key) if self.splits is None else self.splits.get(split, 0)

    def rows(self, split: str | None, document_starts: tuple[int | None, int] | None = None) -> Rows | None:
        """The rows of a split, or of all splits (None); None where there is no such split.

        Args:
          document_starts: the ids of `<s>` and `</s>`: batches have `document_starts`, which in a format that does not record
            them follow from the two tokens (see rows.starts_after_end). None: batches come without, unless rows say what is
            learned of them: dialogues packed into a row must not see each other.

        Raises:
          UserError: the files are missing, broken or of another version.
        """
        if self.splits is None:
            return FlatRows(self.path, self.seq_len, self.key, document_starts)
        assert self._format is not None
        if self.content == "pairs":
            document_starts = None
        elif self.learned and document_starts is None:
            document_starts = 0, 0  # they are recorded: the ids are not used
        import tensorflow_datasets as tfds  # 2 s: not for those who only read metadata

        splits = tfds.builder_from_directory(self.path).info.splits
        names = list(splits) if split is None else [split]
        if not set(names) <= set(splits):
            return None
        return ShardRows([path for name in names for path in splits[name].filepaths], self._format, document_starts)

    def check_tokens(self, rows: Rows, vocab_size: int, vocabulary: str) -> None:
        """Raises UserError where a flat file has an id that the model does not know: it would silently take the embedding's
        last row. A folder's ids are known to be its tokenizer's. `vocabulary` ends the message.
        """
        if isinstance(rows, FlatRows) and (largest := rows.largest_token()) >= vocab_size:
            raise UserError(f"{self.key}: {str(self.path)!r} has the token id {largest} ({vocabulary})")


def is_dataset(path: str | Path) -> bool:
    """Whether `open_dataset` is what opens it: a folder or an existing flat file."""
    return Path(path).is_dir() or Path(path).suffix == ".bin" and Path(path).is_file()


def open_dataset(path: str | Path, key: str, seq_len: int) -> Dataset:
    """A dataset folder or a flat .bin file.

    Args:
      key: the flag or configuration key that gave the path, for errors.
      seq_len: of the rows that a flat file is cut into; a folder has its own.

    Raises:
      UserError: nothing of that kind is there, or a newer version of this project made it.
    """
    path = Path(path)
    if path.suffix == ".bin" and not path.is_dir():
        return Dataset(path, key, seq_len)
    check_name(path, key)
    metadata = read_metadata(path, key)
    version = metadata.get("version", 1)
    if version > PAIRS_VERSION:
        raise UserError(
            f"{key}: {str(path)!r} has rows of version {version}, this project reads up to {PAIRS_VERSION} (update it, or "
            "prepare the dataset again)"
        )
    return Dataset(
        path,
        key,
        metadata["seq_len"],
        {split: counts["rows"] for split, counts in metadata["splits"].items()},
        path / "tokenizer",
        metadata["tokenizer_fingerprint"],
        metadata.get("content", "texts"),
        _row_format(metadata),
    )


def _row_format(metadata: dict) -> RowFormat:
    seq_len, vocab_size = metadata["seq_len"], metadata["vocab_size"]
    if metadata.get("content") == "pairs":
        return RowFormat.of_pairs(seq_len, vocab_size)
    return RowFormat(seq_len, vocab_size, metadata.get("learned", False), metadata.get("version", 1))


def fingerprint(rows: Rows, n: int) -> str:
    """16 hex digits that tell the first n rows from others: their number, and 64 of them, evenly spread. Rows are packed from a
    stream, so a changed document moves nearly all that follow it.
    """
    digest = hashlib.sha256(f"{n}".encode())
    if n == 0:
        return digest.hexdigest()[:16]
    batch = rows.read(np.unique(np.linspace(0, n - 1, 64).astype(np.int64)))
    for key in sorted(set(batch) - {"document_starts"}):  # in batches of runs that ask for it
        digest.update(key.encode() + np.ascontiguousarray(batch[key]).tobytes())
    return digest.hexdigest()[:16]


_OWN_FILES = re.compile(
    r"mateconv-\w+\.array_record-\d+-of-\d+|(dataset_info|features|metadata|stats)\.json|stats\.png|rejected\.jsonl"
    r"|(train|validation)\.bin|tokenizer"
)


def foreign_files(folder: Path) -> list[str]:
    """What stands in a dataset folder and is not of the dataset, sorted."""
    foreign = [path.name for path in folder.iterdir() if not _OWN_FILES.fullmatch(path.name)]
    tokenizer = folder / "tokenizer"
    if tokenizer.is_dir():
        foreign += [f"tokenizer/{name}" for name in tokenizer_folder_lib.foreign_files(tokenizer)]
    return sorted(foreign)


def read_metadata(folder: str | Path, key: str) -> dict:
    """A dataset folder's metadata.json. `key` names the flag or configuration key that gave the folder, for the error.

    Raises:
      UserError: no dataset at `folder`.
    """
    try:
        return json.loads((Path(folder) / "metadata.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"{key}: no dataset at {str(folder)!r} (expected a folder with dataset_info.json and metadata.json). "
            "Make one with: python -m mateconv_jax.prepare --input raw.jsonl --output data/zh --train_tokenizer"
        ) from error
