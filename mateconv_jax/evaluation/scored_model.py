"""A stored model, made ready to be scored on all devices."""

import sys
from collections.abc import Iterable
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from mateconv_jax import config as config_lib
from mateconv_jax.errors import UserError
from mateconv_jax.interop.formats import open_model
from mateconv_jax.interop.stored_model import StoredModel
from mateconv_jax.model.config import ModelConfig, ModelOptions
from mateconv_jax.runtime import sharding


def open_to_score(model_path: str | Path, tokenizer: str | Path | None) -> tuple[StoredModel, PreTrainedTokenizerFast]:
    """The model that --model_path names, and the tokenizer to use: --tokenizer, or None for the model's own.

    Raises:
      UserError: there is no model, or no tokenizer.
    """
    model = open_model(model_path, "--model_path", tokenizer)
    if model.tokenizer is None:
        raise UserError(f"--tokenizer: missing ({str(model_path)!r} has none; expected a tokenizer's folder)")
    # The training backends may be unavailable here. Dropout is not used, and the faster backends do not support it.
    model.config.model.update(dict(attention="auto", experts="auto", dropout=0.0))
    return model, model.tokenizer


def config_of(model: StoredModel, dtype: str, length: int | None = None) -> ModelConfig:
    """As in ModelConfig.make."""
    return ModelConfig.make(config_lib.options(ModelOptions, model.config.model), dtype, length=length)


def on_mesh(model: StoredModel, abstract_params: nnx.State, use_ema: bool | None, mesh: Mesh) -> nnx.State:
    """The weights, a copy on each device. use_ema: EMA (True) or raw ones (False); None: EMA, if the model has them."""
    replicated = sharding.replicated(mesh)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), abstract_params)
    return model.params(shapes, use_ema)


def check_divisible(batch_size: int, mesh: Mesh) -> None:
    """Raises UserError unless every device gets as many rows."""
    if batch_size < 1 or batch_size % mesh.size:
        raise UserError(f"--batch_size: {batch_size} is invalid (expected a multiple of {mesh.size}, the number of devices)")


def bar(batches: Iterable, n: int, doing: str = "evaluating") -> Iterable:
    """A progress bar over n batches, on a terminal."""
    terminal = sys.stderr.isatty()
    return tqdm(batches, doing, n, unit="batch", dynamic_ncols=True, mininterval=0.5, disable=not terminal)
