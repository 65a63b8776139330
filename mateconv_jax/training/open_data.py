"""The data of a run, checked against the model."""

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from mateconv_jax.data.dataset import Dataset, Rows, open_dataset
from mateconv_jax.data.prompts import Prompts, read_prompts
from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib
from mateconv_jax.errors import UserError


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
    """Training rows, validation rows by the name of their set (see `validation_paths`) and tokenizer.

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
    train = open_dataset(data.train_data_path, "data.train_data_path", data.seq_len)
    validation = {
        name: open_dataset(path, "data.val_data_path", data.seq_len)
        for name, path in validation_paths(data.val_data_path).items()
    }
    for dataset in validation.values():
        if train.path.resolve() == dataset.path.resolve():
            raise UserError(
                f"data.val_data_path: {str(dataset.path)!r} is the training data (expected another dataset, or None for its "
                "validation split)"
            )
    tokenizer = _tokenizer(data, train)
    for dataset in (train, *validation.values()):
        check(dataset)
        _check(dataset, data.seq_len, tokenizer)
    _check_vocabulary(tokenizer, vocab_size)
    document_starts = (tokenizer.bos_token_id, tokenizer.eos_token_id) if document_mask else None
    train_rows = train.rows("train", document_starts)
    if train_rows is None:
        raise UserError(f"{train.key}: {str(train.path)!r} has no split 'train' (prepare it again)")
    sets = {name: dataset.rows(None, document_starts) for name, dataset in validation.items()}  # all of it is for validation
    if data.val_data_path is None and train.splits is not None:
        sets[""] = train.rows("validation", document_starts)
    val_sets = {name: rows for name, rows in sets.items() if rows is not None}
    for dataset, rows in ((train, train_rows), *((validation.get(name, train), rows) for name, rows in val_sets.items())):
        dataset.check_tokens(rows, vocab_size, f"model.vocab_size is {vocab_size}")
    return train_rows, val_sets, tokenizer


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


def _tokenizer(data: DataOptions, train: Dataset) -> PreTrainedTokenizerFast:
    if data.tokenizer_path is not None:
        return tokenizer_lib.load(data.tokenizer_path, "data.tokenizer_path")
    if train.tokenizer_folder is None:
        raise UserError(f"data.tokenizer_path: missing (expected the tokenizer of {str(train.path)!r}, which holds only ids)")
    return tokenizer_lib.load(train.tokenizer_folder, train.key)


def _check(dataset: Dataset, seq_len: int, tokenizer: PreTrainedTokenizerFast) -> None:
    path = str(dataset.path)
    if dataset.seq_len != seq_len:
        raise UserError(f"data.seq_len: {seq_len}, but {path!r} has rows of {dataset.seq_len} tokens (set it to that)")
    if dataset.tokenizer_fingerprint not in (None, tokenizer_lib.fingerprint(tokenizer)):
        raise UserError(
            f"{dataset.key}: {path!r} was tokenised with another tokenizer than the run's (prepare it with the run's)"
        )
