"""The data of a run, once it is known to fit the model."""

from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerFast

from mateconv_jax.data.dataset import Dataset, Rows, open_dataset
from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib
from mateconv_jax.errors import UserError


def open_data(config: ConfigDict) -> tuple[Rows, Rows | None, PreTrainedTokenizerFast]:
    """Training rows, validation rows (None: there are none) and tokenizer, once they are known to fit each other and the model.

    Raises:
      UserError: they do not; the message names the key.
    """
    data = config.data
    if data.train_data_path is None:
        raise UserError(
            "data.train_data_path: missing (expected a folder made by python -m mateconv_jax.prepare, or a .bin file)"
        )
    train = open_dataset(data.train_data_path, "data.train_data_path", data.seq_len)
    validation = None
    if data.val_data_path is not None:
        validation = open_dataset(data.val_data_path, "data.val_data_path", data.seq_len)
    elif train.splits is not None:
        validation = train
    tokenizer = _tokenizer(config, train)
    datasets = [dataset for dataset in (train, validation) if dataset is not None]
    for dataset in datasets:
        _check(dataset, config, tokenizer)
    if len(tokenizer) > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size: {config.model.vocab_size} is smaller than the tokenizer's vocabulary "
            f"(expected at least {len(tokenizer)})"
        )
    document_starts = (tokenizer.bos_token_id, tokenizer.eos_token_id) if config.training.document_mask else None
    train_rows = train.rows("train", document_starts)
    if train_rows is None:
        raise UserError(f"{train.key}: {str(train.path)!r} has no split 'train' (prepare it again)")
    val_rows = None if validation is None else validation.rows("validation", document_starts)
    for dataset, rows in ((train, train_rows), (validation, val_rows)):
        if dataset is not None and rows is not None:
            dataset.check_tokens(rows, config.model.vocab_size, f"model.vocab_size is {config.model.vocab_size}")
    return train_rows, val_rows, tokenizer


def _tokenizer(config: ConfigDict, train: Dataset) -> PreTrainedTokenizerFast:
    if config.data.tokenizer_path is not None:
        return tokenizer_lib.load(config.data.tokenizer_path, "data.tokenizer_path")
    if train.tokenizer_folder is None:
        raise UserError(f"data.tokenizer_path: missing (expected the tokenizer of {str(train.path)!r}, which holds only ids)")
    return tokenizer_lib.load(train.tokenizer_folder, train.key)


def _check(dataset: Dataset, config: ConfigDict, tokenizer: PreTrainedTokenizerFast) -> None:
    path = str(dataset.path)
    if dataset.seq_len != config.data.seq_len:
        raise UserError(
            f"data.seq_len: {config.data.seq_len}, but {path!r} has rows of {dataset.seq_len} tokens (set it to that)"
        )
    if dataset.tokenizer_fingerprint not in (None, tokenizer_lib.fingerprint(tokenizer)):
        raise UserError(
            f"{dataset.key}: {path!r} was tokenised with another tokenizer than the run's (prepare it with the same one)"
        )
