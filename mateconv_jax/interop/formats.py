"""The model formats on disk: detecting, opening and converting them."""

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mateconv_jax import config as config_lib, files
from mateconv_jax.errors import UserError
from mateconv_jax.interop import gguf_file, hugging_face, pytorch, run
from mateconv_jax.interop.stored_model import StoredModel
from mateconv_jax.model.config import ModelConfig, ModelOptions
from mateconv_jax.model.transformer import abstract_model


@dataclasses.dataclass(frozen=True)
class Format:
    """A model format.

    Attributes:
      description: with its article, for messages.
      matches: whether a path holds a model in this format.
      open: (path, key, tokenizer folder, number of heads) -> StoredModel.
      write: (path, StoredModel, parameters), to a path that does not exist or an empty folder; a .gguf file's also takes dtype.
      dtypes: dtypes of weights it can be written in.
      suffixes: of its files; empty for folders.
    """

    description: str
    matches: Callable[[Path], bool]
    open: Callable[[Path, str, str | Path | None, int | None], StoredModel]
    write: Callable[..., None]
    dtypes: tuple[str, ...]
    suffixes: tuple[str, ...] = ()


FLOATS = ("float32", "float16", "bfloat16")
FORMATS = {
    "run": Format("a run folder", run.is_run, run.open_run, run.write_run, ("float32",)),
    "hf": Format("a Hugging Face folder", hugging_face.is_folder, hugging_face.open_folder, hugging_face.write_folder, FLOATS),
    "pth": Format("a .pth file", pytorch.is_pth, pytorch.open_pth, pytorch.write_pth, FLOATS, (".pth", ".pt")),
    "gguf": Format(
        "a .gguf file", gguf_file.is_gguf, gguf_file.open_gguf, gguf_file.write_gguf, tuple(gguf_file.DTYPES), (".gguf",)
    ),
}
*_FIRST, _LAST = (format.description for format in FORMATS.values())
EXPECTED = f"{', '.join(_FIRST)} or {_LAST}"


def detect_format(path: str | Path, key: str) -> str:
    """The key in FORMATS of the model at `path`, detected by content.

    Args:
      key: the flag or configuration key that `path` came from, for the error message.

    Raises:
      UserError: no known format.
    """
    for name, format in FORMATS.items():
        if format.matches(Path(path)):
            return name
    problem = f"no model at {str(path)!r}" if not Path(path).exists() else f"{str(path)!r} is not a model"
    raise UserError(f"{key}: {problem} (expected {EXPECTED})")


def open_model(path: str | Path, key: str, tokenizer: str | Path | None = None, n_heads: int | None = None) -> StoredModel:
    """Open a model in any format. Its weights are not read yet.

    Args:
      path: ~ is the home.
      key: as in `detect_format`.
      tokenizer: a folder with the tokenizer to use; None: the model's own.
      n_heads: number of query heads, for a .pth file, whose shapes do not determine it; None: see `pytorch.open_pth`.

    Raises:
      UserError: no model at `path`, one that this architecture cannot represent, or a tokenizer with more tokens than the
        model's vocabulary.
    """
    path = os.path.expanduser(path)
    model = FORMATS[detect_format(path, key)].open(Path(path), key, tokenizer, n_heads)
    if model.tokenizer is not None and len(model.tokenizer) > model.config.model.vocab_size:
        raise UserError(
            f"{'--tokenizer' if tokenizer else key}: the tokenizer at {str(tokenizer or path)!r} has {len(model.tokenizer)} "
            f"tokens, the model {model.config.model.vocab_size} (expected the tokenizer it was trained with)"
        )
    return model


def convert(
    source: str | Path,
    target: str | Path,
    to_format: str | None = None,
    dtype: str = "float32",
    use_ema: bool | None = None,
    tokenizer: str | Path | None = None,
    n_heads: int | None = None,
) -> StoredModel:
    """Convert the model at `source` to another format at `target`, which must not exist. An interrupted or failed conversion
    leaves nothing there.

    Args:
      to_format: a key of FORMATS; None: by the target's suffix; for folders, run -> hf and hf -> run.
      dtype: of the written weights, one of the format's `dtypes`.
      use_ema: write the EMA weights (True) or the raw ones (False); None: EMA if the model has them.
      tokenizer, n_heads: see `open_model`.

    Returns:
      The source model.

    Raises:
      UserError: options that do not fit together; anything that `open_model` and the format's writer raise.
    """
    source, target = Path(source), Path(target)
    from_format = detect_format(source, "--from")
    to_format = to_format or _default_target_format(from_format, target)
    format = FORMATS[to_format]
    _check_target(target, format)
    if n_heads is not None and from_format != "pth":
        raise UserError(f"--n_heads: {str(source)!r} already specifies it (expected only with a .pth file)")
    if dtype not in format.dtypes:
        raise UserError(f"--dtype: {dtype} is invalid for {format.description} (expected {' or '.join(format.dtypes)})")
    if tokenizer is not None and to_format == "pth":
        raise UserError("--tokenizer: a .pth file cannot hold one (omit it)")
    model = open_model(source, "--from", tokenizer, n_heads)
    if use_ema and not model.has_ema:
        raise UserError(f"--ema: {str(source)!r} has no EMA weights (a run has them with training.use_ema)")
    if model.tokenizer is None and to_format != "pth":
        raise UserError(f"--tokenizer: missing ({str(source)!r} has none; expected a tokenizer's folder)")

    model_config = model.config.model.copy_and_resolve_references()
    model_config.attention = "auto"  # the backend used in training may be unavailable on this machine
    _, abstract_params = abstract_model(ModelConfig.make(config_lib.options(ModelOptions, model_config), "float32"))
    # The GGUF writer rounds by itself: it keeps norms in float32 and quantises q8_0 in blocks.
    read_dtype = jnp.dtype("float32" if to_format == "gguf" else dtype)
    abstract_params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, read_dtype), abstract_params)
    with np.errstate(over="ignore"):
        params = model.params(abstract_params, use_ema)
    if read_dtype == jnp.float16 and not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
        raise UserError("--dtype: some weights overflow float16 (expected bfloat16 or float32)")
    write = functools.partial(format.write, dtype=dtype) if to_format == "gguf" else format.write
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with files.aside(target, folder=not format.suffixes) as written:
            write(written, model, params)
    except OSError as error:
        raise UserError(f"--to: cannot write {str(target)!r} ({error.strerror or error})") from error
    return model


def _check_target(target: Path, format: Format) -> None:
    suffixes = [suffix for other in FORMATS.values() for suffix in other.suffixes]
    if target.suffix not in format.suffixes if format.suffixes else target.suffix in suffixes:
        ending = format.suffixes[0] if format.suffixes else f"none of {', '.join(suffixes)}"
        raise UserError(f"--to: {str(target)!r} cannot name {format.description} (expected a name that ends in {ending})")
    if target.exists():
        raise UserError(f"--to: {str(target)!r} exists (expected a new name)")


def _default_target_format(from_format: str, target: Path) -> str:
    for name, format in FORMATS.items():
        if target.suffix in format.suffixes:
            return name
    defaults = {"run": "hf", "hf": "run"}
    if from_format not in defaults:
        raise UserError(f"--to_kind: missing (expected run or hf: the folder {str(target)!r} could become either)")
    return defaults[from_format]
