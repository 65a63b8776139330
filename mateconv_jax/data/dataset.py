"""A dataset folder: rows in ArrayRecord shards, TFDS metadata and the tokenizer, written shard by shard and read back."""

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from transformers import PreTrainedTokenizerFast

from mateconv_jax.data import packing, tokenizer as tokenizer_lib
from mateconv_jax.data.jsonl import Document
from mateconv_jax.errors import UserError

NAME = "mateconv"  # of the TFDS dataset
SPLITS = ("train", "validation")
CHUNK_CHARACTERS = 8_000_000  # of text a shard is made of: about 5 M tokens, a few hundred MB while it is tokenised
ENCODE_BATCH = 2_000  # documents given to the tokenizer at once


@dataclasses.dataclass
class ShardCounts:
    """What one shard holds."""

    documents: int = 0
    characters: int = 0
    tokens: int = 0
    rows: int = 0
    bytes: int = 0

    def __add__(self, other: "ShardCounts") -> "ShardCounts":
        return ShardCounts(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


def features(seq_len: int, vocab_size: int) -> tfds.features.FeaturesDict:
    """A row: seq_len + 1 tokens, of which `length` are real."""
    dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
    return tfds.features.FeaturesDict(
        {"tokens": tfds.features.Tensor(shape=(seq_len + 1,), dtype=dtype), "length": tfds.features.Scalar(np.int32)}
    )


def chunks(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Consecutive documents by the shard-ful. Depends on the documents alone, so that a chunk means the same to any worker."""
    chunk, size = [], 0
    for document in documents:
        chunk.append(document)
        size += n_characters(document)
        if size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def n_characters(document: Document) -> int:
    """Of a text, or of a dialogue's contents."""
    return len(document) if isinstance(document, str) else sum(len(message["content"]) for message in document)


def is_validation(document: Document, val_fraction: float) -> bool:
    """Whole documents, by a hash of their text: the same document always falls on the same side."""
    text = document if isinstance(document, str) else json.dumps(document, ensure_ascii=False)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") < val_fraction * 2**64


def write_chunk(
    chunk: list[Document], folder: Path, index: int, tokenizer: PreTrainedTokenizerFast, seq_len: int, val_fraction: float
) -> dict[str, ShardCounts]:
    """Tokenise and pack one chunk into at most one shard a split, `folder`/SPLIT-INDEX, each written aside and renamed.

    Returns:
      {split: counts} of the splits that got documents.
    """
    row_features = features(seq_len, len(tokenizer))
    split_of = ["validation" if is_validation(document, val_fraction) else "train" for document in chunk]
    counts = {}
    for split in SPLITS:
        documents = [document for document, its_split in zip(chunk, split_of, strict=True) if its_split == split]
        if documents:
            token_ids = itertools.chain.from_iterable(_token_ids(documents, tokenizer))
            stream = np.fromiter(token_ids, row_features["tokens"].np_dtype)
            rows, lengths = packing.pack(stream, seq_len)
            path = folder / f"{split}-{index:05d}"
            _write_shard(path, rows, lengths, row_features)
            counts[split] = ShardCounts(
                len(documents), sum(map(n_characters, documents)), len(stream), len(rows), path.stat().st_size
            )
    return counts


def _token_ids(documents: list[Document], tokenizer: PreTrainedTokenizerFast) -> Iterator[list[int]]:
    """A text becomes `<s>` text `</s>`; a dialogue goes through the chat template, which brings its own control tokens."""
    for start in range(0, len(documents), ENCODE_BATCH):
        batch = documents[start : start + ENCODE_BATCH]
        texts = [document for document in batch if isinstance(document, str)]
        encoded = iter(tokenizer_lib.encode(tokenizer, texts) if texts else [])
        for document in batch:
            if isinstance(document, str):
                yield [tokenizer.bos_token_id, *next(encoded), tokenizer.eos_token_id]
            else:
                yield tokenizer_lib.encode_chat(tokenizer, document, add_generation_prompt=False)


def _write_shard(path: Path, rows: np.ndarray, lengths: np.ndarray, row_features: tfds.features.FeaturesDict) -> None:
    serializer = tfds.core.example_serializer.ExampleSerializer(row_features.get_serialized_info())
    aside = path.with_name(path.name + ".partial")
    writer = ArrayRecordWriter(os.fspath(aside), "group_size:1")  # one row a group: training reads rows in random order
    for tokens, length in zip(rows, lengths, strict=True):
        writer.write(serializer.serialize_example(row_features.encode_example({"tokens": tokens, "length": length})))
    writer.close()
    aside.rename(path)


def finish(
    folder: Path, shards: dict[str, list[ShardCounts]], tokenizer: PreTrainedTokenizerFast, seq_len: int, options: dict
) -> dict:
    """Name the shards as TFDS does, add its metadata and the tokenizer. `tfds.builder_from_directory` then opens the folder.

    Args:
      folder: where `write_chunk` wrote.
      shards: counts of each split's shards, in the order of their files.
      options: what the dataset was made from, kept for the reader.

    Returns:
      The metadata, as in the folder's metadata.json.
    """
    split_infos = []
    for split, counts in shards.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name=NAME, split=split, filetype_suffix="array_record"
        )
        for index, path in enumerate(sorted(folder.glob(f"{split}-*"))):
            path.rename(template.sharded_filepath(shard_index=index, num_shards=len(counts)))
        split_infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[c.rows for c in counts],
                num_bytes=sum(c.bytes for c in counts),
                filename_template=template,
            )
        )
    tokenizer.save_pretrained(folder / "tokenizer")
    metadata = {
        "seq_len": seq_len,
        "vocab_size": len(tokenizer),
        "tokenizer_fingerprint": tokenizer_lib.fingerprint(tokenizer),
        "splits": {split: dataclasses.asdict(sum(counts, ShardCounts())) for split, counts in shards.items()},
        "options": options,
    }
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features(seq_len, len(tokenizer)),
        split_infos=split_infos,
        description="Rows of seq_len + 1 tokens that overlap by one; `length` of them are real.",
        metadata=tfds.core.MetadataDict(metadata),
        check_data=False,  # TFDS' check reads with TensorFlow, which has no ArrayRecord
    )
    return metadata


def read_metadata(folder: str | Path, key: str) -> dict:
    """What `finish` returned. `key` names the flag or configuration key that gave the folder, for the error.

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


class Rows:
    """One split's rows, read at random."""

    def __init__(self, folder: str | Path, split: str):
        builder = tfds.builder_from_directory(folder)
        self._source = builder.as_data_source(split) if split in builder.info.splits else []

    def __len__(self) -> int:
        return len(self._source)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """{"tokens": (len(indices), seq_len + 1), "length": (len(indices),)}, in one read."""
        records = self._source.__getitems__(indices.tolist())
        return {key: np.stack([record[key] for record in records]) for key in ("tokens", "length")}
