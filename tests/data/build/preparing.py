"""Calls of `prepare`, and what is in the datasets that it makes."""

import filecmp
import json

import numpy as np
import tensorflow_datasets as tfds

from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib
from mateconv_jax.prepare import main, parse_args

TRAIN_TOKENIZER = ("--train_tokenizer", "--vocab_size", "300")


def command(path, output, *flags):
    return [
        "--input",
        *map(str, path if isinstance(path, list) else [path]),
        "--output",
        str(output),
        "--seq_len",
        "16",
        *map(str, flags),
    ]


def prepare(path, output, *flags):
    main(parse_args(command(path, output, "--num_workers", "1", *flags)))
    return output


def write_jsonl(path, records):
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def streams(folder, split):
    """What the rows of a split hold, without their overlap: one stream a shard."""
    builder = tfds.builder_from_directory(folder)
    if split not in builder.info.splits:
        return
    rows = iter(builder.as_data_source(split))
    for length in builder.info.splits[split].shard_lengths:
        shard = [next(rows) for _ in range(length)]
        parts = [row["tokens"][1 : row["length"]] for row in shard]
        yield np.concatenate([shard[0]["tokens"][:1], *parts]).tolist()


def documents(folder, splits=("train", "validation")):
    """The texts of a dataset, in order, split at <s>."""
    tokenizer = tokenizer_lib.load(folder / "tokenizer", "")
    found = []
    for split in splits:
        for stream in streams(folder, split):
            starts = [i for i, token in enumerate(stream) if token == tokenizer.bos_token_id]
            assert starts[0] == 0
            for a, b in zip(starts, [*starts[1:], len(stream)], strict=True):
                found.append(tokenizer.decode(stream[a:b]).removeprefix("<s>"))
    return found


def documents_of_text(folder):
    return [document.removesuffix("</s>") for document in documents(folder)]


def stats(folder):
    return json.loads((folder / "stats.json").read_text(encoding="utf-8"))


def rejected(folder):
    return [(r["line"], r["rule"]) for r in map(json.loads, (folder / "rejected.jsonl").read_text().splitlines())]


def assert_equal_datasets(a, b):
    """Byte for byte, but for the seconds in stats.json."""
    names = sorted(str(path.relative_to(a)) for path in a.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(b)) for path in b.rglob("*") if path.is_file())
    match, mismatch, errors = filecmp.cmpfiles(a, b, names, shallow=False)
    assert set(mismatch) <= {"stats.json"} and not errors
    assert {**stats(a), "seconds": 0} == {**stats(b), "seconds": 0}


def stop_after(n, function):
    calls = []

    def wrapped(*args):
        calls.append(args)
        if len(calls) > n:
            raise KeyboardInterrupt
        return function(*args)

    return wrapped
