"""A model on disk, whatever its format."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from flax import nnx
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerFast

from mateconv_jax import files
from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib
from mateconv_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """An opened model whose weights are not read yet.

    Attributes:
      path: as the user gave it.
      config: a resolved config; for other formats than a run, the defaults except for `model` and data.seq_len.
      tokenizer: None if the model has none.
      has_ema: whether it has EMA weights besides the raw ones.
      step: the checkpoint's step; None for other formats than a run.
      read: (abstract parameters, use_ema) -> parameters.
      run: the run folder; None for other formats.
      end_ids: tokens that end an answer besides the tokenizer's eos_token.
    """

    path: Path
    config: ConfigDict
    tokenizer: PreTrainedTokenizerFast | None
    has_ema: bool
    step: int | None
    read: Callable[[nnx.State, bool], nnx.State]
    run: Path | None = None
    end_ids: tuple[int, ...] = ()

    def params(self, abstract_params: nnx.State, use_ema: bool | None = None) -> nnx.State:
        """Read the weights directly into the dtypes and shardings of `abstract_params`.

        Args:
          use_ema: read the EMA weights (True) or the raw ones (False); None: EMA if the model has them.

        Raises:
          UserError: EMA weights requested but missing, or tensors that do not match the configuration.
        """
        if use_ema and not self.has_ema:
            raise UserError(f"--use_ema: {str(self.path)!r} has no EMA weights (a run has them with training.use_ema)")
        return self.read(abstract_params, self.has_ema if use_ema is None else use_ema)


def load_tokenizer(given: str | Path | None, own: Path | None, key: str) -> PreTrainedTokenizerFast | None:
    """The tokenizer in the folder `given` with --tokenizer, otherwise in the model's `own`; None if both are None.

    Raises:
      UserError: the folder has no tokenizer; `key` is the flag that named the model.
    """
    if given is not None:
        return tokenizer_lib.load(given, "--tokenizer")
    return None if own is None else tokenizer_lib.load(own, key)


def all_end_ids(model: StoredModel) -> tuple[int, ...]:
    """The tokens that end an answer, the tokenizer's eos_token first. `model` has a tokenizer."""
    assert model.tokenizer is not None
    return tuple(dict.fromkeys((model.tokenizer.eos_token_id, *model.end_ids)))


def write_end_ids(folder: Path, end_ids: tuple[int, ...]) -> None:
    """Into a run folder, for `read_end_ids`."""
    files.write_text(folder / "generation_config.json", json.dumps({"eos_token_id": list(end_ids)}) + "\n")


def read_end_ids(folder: Path, vocab_size: int) -> tuple[int, ...]:
    """eos_token_id of the folder's generation_config.json, one token or several; otherwise of its config.json, as transformers
    reads them. Empty without these files.

    Raises:
      UserError: not valid JSON, or anything but token ids.
    """
    for path in (folder / "generation_config.json", folder / "config.json"):
        if not path.is_file():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path}: not a JSON object ({error})") from error
        found = [] if found is None else found if isinstance(found, list) else [found]
        if not all(type(token) is int and 0 <= token < vocab_size for token in found):
            raise UserError(f"{path}: eos_token_id: {found} is invalid (expected token ids from 0 to {vocab_size - 1})")
        if found:
            return tuple(found)
    return ()
