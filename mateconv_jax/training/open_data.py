"""The data of a run, once it is known to fit the model."""

from pathlib import Path

from ml_collections import ConfigDict

from mateconv_jax.data import dataset
from mateconv_jax.data.token_bin import FlatRows
from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib
from mateconv_jax.errors import UserError


def open_data(config: ConfigDict):
    """Training rows, validation rows (None: there are none) and tokenizer, once they are known to fit each other and the model.

    Raises:
      UserError: they do not; the message names the key.
    """
    data = config.data
    if data.train_data_path is None:
        raise UserError(
            "data.train_data_path: missing (expected a folder made by python -m mateconv_jax.prepare, or a .bin file)"
        )
    paths = {"data.train_data_path": data.train_data_path, "data.val_data_path": data.val_data_path}
    if data.tokenizer_path is None and data.train_data_path.endswith(".bin"):
        raise UserError(
            f"data.tokenizer_path: missing (expected the tokenizer of {data.train_data_path!r}, which holds only ids)"
        )
    tokenizer = tokenizer_lib.load(data.tokenizer_path, "data.tokenizer_path") if data.tokenizer_path else None
    for key, path in paths.items():
        if path is None or path.endswith(".bin"):
            continue
        metadata = dataset.read_metadata(path, key)
        if metadata["seq_len"] != data.seq_len:
            raise UserError(
                f"data.seq_len: {data.seq_len}, but {path!r} has rows of {metadata['seq_len']} tokens (set it to that)"
            )
        if tokenizer is None:
            tokenizer = tokenizer_lib.load(Path(path) / "tokenizer", key)
        if tokenizer_lib.fingerprint(tokenizer) != metadata["tokenizer_fingerprint"]:
            raise UserError(
                f"{key}: {path!r} was tokenised with another tokenizer than the run's (prepare it with the same one)"
            )
    if len(tokenizer) > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size: {config.model.vocab_size} is smaller than the tokenizer's vocabulary "
            f"(expected at least {len(tokenizer)})"
        )
    train_rows = dataset.open_rows(data.train_data_path, "train", data.seq_len, "data.train_data_path")
    if data.val_data_path is not None:
        val_rows = dataset.open_rows(data.val_data_path, "validation", data.seq_len, "data.val_data_path")
    elif data.train_data_path.endswith(".bin"):
        val_rows = None
    else:
        val_rows = dataset.open_rows(data.train_data_path, "validation", data.seq_len, "data.train_data_path")
    for (key, path), rows in zip(paths.items(), (train_rows, val_rows), strict=True):
        # A folder's ids are known to fit. Out of range, an id would silently take the last row of the embedding.
        if isinstance(rows, FlatRows) and (largest := rows.largest_token()) >= config.model.vocab_size:
            raise UserError(f"{key}: {path!r} has the token id {largest} (model.vocab_size is {config.model.vocab_size})")
    return train_rows, val_rows, tokenizer
