"""The data of a run, checked against the model."""

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from mateconv_jax import weighted_paths
from mateconv_jax.data import mixture
from mateconv_jax.data.dataset import Dataset, Rows, fingerprint, open_dataset
from mateconv_jax.data.prompts import Prompts, read_prompts
from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib
from mateconv_jax.errors import UserError
from mateconv_jax.weighted_paths import WeightedPath


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Which data a run reads: keys of config.data."""

    train_data_path: str | None
    val_data_path: str | None
    tokenizer_path: str | None
    seq_len: int


def open_data(
    data: DataOptions, vocab_size: int, document_mask: bool, check: Callable[[Dataset], None] = lambda dataset: None
) -> tuple[Rows, dict[str, Rows], PreTrainedTokenizerFast]:
    """Training rows, validation rows by the name of their set (see `validation_paths`) and tokenizer. Several training datasets
    are MixedRows; the validation split of each is then a set with its name.

    Args:
      vocab_size: of the model.
      document_mask: whether rows say where documents start. Those of packed dialogues always do.
      check: raises UserError where the run cannot learn from a dataset; see Objective.check.

    Raises:
      UserError: they do not fit each other or the model; the message names the key.
    """
    if data.train_data_path is None:
        raise UserError(
            "data.train_data_path: missing (expected a folder made by python -m mateconv_jax.prepare, or a .bin file)"
        )
    paths = weighted_paths.parse(data.train_data_path, "data.train_data_path")
    train = [open_dataset(path, "data.train_data_path", data.seq_len) for path, _ in paths]
    validation = {
        name: open_dataset(path, "data.val_data_path", data.seq_len)
        for name, path in validation_paths(data.val_data_path).items()
    }
    for dataset in validation.values():
        if dataset.path.resolve() in [one.path.resolve() for one in train]:
            raise UserError(
                f"data.val_data_path: {str(dataset.path)!r} is the training data (expected another dataset, or None for its "
                "validation split)"
            )
    tokenizer = _tokenizer(data, train)
    for dataset in (*train, *validation.values()):
        check(dataset)
        _check(dataset, data.seq_len, tokenizer)
    _check_vocabulary(tokenizer, vocab_size)
    document_starts = (tokenizer.bos_token_id, tokenizer.eos_token_id) if document_mask else None
    train_rows = [_training_rows(dataset, document_starts) for dataset in train]
    names = mixture.names([path for path, _ in paths]) if len(train) > 1 else [""]
    sets = {name: dataset.rows(None, document_starts) for name, dataset in validation.items()}  # all of it is for validation
    if data.val_data_path is None:
        validation = {name: dataset for name, dataset in zip(names, train, strict=True) if dataset.splits is not None}
        sets = {name: dataset.rows("validation", document_starts) for name, dataset in validation.items()}
    val_sets = {name: rows for name, rows in sets.items() if rows is not None}
    for dataset, rows in (*zip(train, train_rows, strict=True), *((validation[name], rows) for name, rows in val_sets.items())):
        dataset.check_tokens(rows, vocab_size, f"model.vocab_size is {vocab_size}")
    return _mixed(paths, names, train_rows), val_sets, tokenizer


def _training_rows(dataset: Dataset, document_starts: tuple[int | None, int] | None) -> Rows:
    rows = dataset.rows("train", document_starts)
    if rows is None:
        raise UserError(f"{dataset.key}: {str(dataset.path)!r} has no split 'train' (prepare it again)")
    return rows


def _mixed(paths: Sequence[WeightedPath], names: Sequence[str], rows: Sequence[Rows]) -> Rows:
    """Raises UserError where a dataset has no rows, next to no weight, or those of another one."""
    if len(paths) == 1:
        return rows[0]
    key, parts = "data.train_data_path", []
    counts = mixture.apportion([weight for _, weight in paths])
    for (path, weight), name, of_set, count in zip(paths, names, rows, counts, strict=True):
        if len(of_set) == 0:
            raise UserError(f"{key}: {path!r} has no rows for training (leave it out)")
        if count == 0:
            raise UserError(
                f"{key}: {path!r} has the weight {float(weight):g}, less than one row in {mixture.PERIOD:,} (expected more, or "
                "leave it out)"
            )
        digits = fingerprint(of_set, len(of_set))
        if (same := next((part.name for part in parts if part.fingerprint == digits), None)) is not None:
            raise UserError(
                f"{key}: {path!r} holds the same rows as {same!r} (expected one of them, with the sum of the weights)"
            )
        parts.append(mixture.Part(name, of_set, count, digits))
    return mixture.MixedRows(parts)


def validation_paths(val_data_path: str | None) -> dict[str, str]:
    """{name: path} of data.val_data_path, such as "wiki=data/wiki,code=data/code". A path that stands alone has the name "".

    Raises:
      UserError: names without a path, or twice.
    """
    if val_data_path is None:
        return {}
    if not re.match(r"[\w-]+=", val_data_path) or Path(val_data_path).exists():
        return {"": val_data_path}
    paths = {}
    for part in val_data_path.split(","):
        match = re.fullmatch(r"\s*([\w-]+)=(.+)", part)
        if match is None or match[1] in paths:
            raise UserError(
                f"data.val_data_path: {part!r} is {'there twice' if match else 'not possible'} (expected different names with "
                "their paths, such as wiki=data/wiki,code=data/code)"
            )
        paths[match[1]] = os.path.expanduser(match[2])  # config.resolve expands only a path that stands alone
    return paths


def open_prompts(
    data: DataOptions, vocab_size: int, max_tokens: int, rows_per_prompt: int, tokenizer: PreTrainedTokenizerFast | None
) -> tuple[Prompts, dict[str, Prompts], PreTrainedTokenizerFast]:
    """Training prompts, validation prompts by the name of their set (see `validation_paths`) and tokenizer.

    Args:
      vocab_size: of the model.
      max_tokens, rows_per_prompt: see Prompts.
      tokenizer: of the model that the run starts from or continues; None: it has none.

    Raises:
      UserError: a file cannot be read, or the tokenizer is missing or does not fit the model.
    """
    if data.train_data_path is None:
        raise UserError('data.train_data_path: missing (expected a JSONL file of prompts, a {"prompt": …} a line)')
    if data.tokenizer_path is not None:
        tokenizer = tokenizer_lib.load(data.tokenizer_path, "data.tokenizer_path")
    if tokenizer is None:
        raise UserError("data.tokenizer_path: missing (the run starts from no model that has a tokenizer: training.init_from)")
    _check_vocabulary(tokenizer, vocab_size)
    if len(weighted_paths.parse(data.train_data_path, "data.train_data_path")) > 1:
        raise UserError(
            f"data.train_data_path: {data.train_data_path!r} has weights, but prompts come from one file (expected one JSONL "
            "file: put them into one)"
        )
    train = read_prompts(data.train_data_path, "data.train_data_path", tokenizer, max_tokens, rows_per_prompt)
    validation = {
        name: read_prompts(path, "data.val_data_path", tokenizer, max_tokens)
        for name, path in validation_paths(data.val_data_path).items()
    }
    return train, validation, tokenizer


def _check_vocabulary(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> None:
    if (needed := tokenizer_lib.vocab_size(tokenizer)) > vocab_size:
        raise UserError(
            f"model.vocab_size: {vocab_size} is smaller than the tokenizer's vocabulary (expected at least {needed})"
        )


def _tokenizer(data: DataOptions, train: Sequence[Dataset]) -> PreTrainedTokenizerFast:
    if data.tokenizer_path is not None:
        return tokenizer_lib.load(data.tokenizer_path, "data.tokenizer_path")
    for dataset in train:
        if dataset.tokenizer_folder is not None:
            return tokenizer_lib.load(dataset.tokenizer_folder, dataset.key)
    raise UserError(f"data.tokenizer_path: missing (expected the tokenizer of {str(train[0].path)!r}, which holds only ids)")


def _check(dataset: Dataset, seq_len: int, tokenizer: PreTrainedTokenizerFast) -> None:
    path = str(dataset.path)
    if dataset.seq_len != seq_len:
        raise UserError(f"data.seq_len: {seq_len}, but {path!r} has rows of {dataset.seq_len} tokens (set it to that)")
    if dataset.tokenizer_fingerprint not in (None, tokenizer_lib.fingerprint(tokenizer)):
        raise UserError(
            f"{dataset.key}: {path!r} was tokenised with another tokenizer than the run's (prepare it with the run's)"
        )
