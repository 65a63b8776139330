"""A model that lies on the disk, of whatever kind."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from flax import nnx
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerFast

from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib
from mateconv_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Model:
    """What is known before weights are read.

    Attributes:
      config: resolved; of another format than a run, the defaults but for its `model` section and data.seq_len.
      tokenizer: None where there is none.
      has_ema: whether there are EMA weights beside the raw ones.
      step: of a run's checkpoint; None: another format.
      read: (abstract parameters, use_ema) to parameters.
      run: the run folder; None: another format.
    """

    path: Path
    config: ConfigDict
    tokenizer: PreTrainedTokenizerFast | None
    has_ema: bool
    step: int | None
    read: Callable[[nnx.State, bool], nnx.State]
    run: Path | None = None

    def params(self, abstract_params: nnx.State, use_ema: bool | None = None) -> nnx.State:
        """The weights, read straight into the dtypes and onto the shardings of `abstract_params`.

        Args:
          use_ema: EMA weights or the raw ones; None takes EMA where there are some.

        Raises:
          UserError: EMA weights asked for and not there; tensors that do not fit the configuration.
        """
        if use_ema and not self.has_ema:
            raise UserError(f"--use_ema: {str(self.path)!r} has no EMA weights (a run has them with training.use_ema)")
        return self.read(abstract_params, self.has_ema if use_ema is None else use_ema)


def load_tokenizer(given: str | Path | None, own: Path | None, key: str) -> PreTrainedTokenizerFast | None:
    """The tokenizer in the folder that --tokenizer gave, or in the model's own, if it has one.

    Raises:
      UserError: no tokenizer there; `key` names the flag that gave the model.
    """
    if given is not None:
        return tokenizer_lib.load(given, "--tokenizer", needs_begin=False)
    return None if own is None else tokenizer_lib.load(own, key, needs_begin=False)
