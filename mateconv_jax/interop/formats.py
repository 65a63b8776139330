"""Models of every kind: recognised, opened and converted."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mateconv_jax import files
from mateconv_jax.errors import UserError
from mateconv_jax.interop import gguf_file, hugging_face, pytorch, run
from mateconv_jax.interop.stored_model import Model
from mateconv_jax.model.config import ModelConfig
from mateconv_jax.model.transformer import abstract_model


@dataclasses.dataclass(frozen=True)
class Kind:
    """words: what it is. is_here: whether a path holds one. open: (path, key, tokenizer folder, number of heads) to a Model.
    write: (path, Model, parameters) for a path that does not exist, or an empty folder; of a .gguf file also the dtype.
    dtypes: of the weights written. suffixes: of a file; a folder has none.
    """

    words: str
    is_here: Callable[[Path], bool]
    open: Callable[[Path, str, str | Path | None, int | None], Model]
    write: Callable[..., None]
    dtypes: tuple[str, ...]
    suffixes: tuple[str, ...] = ()


FLOATS = ("float32", "float16", "bfloat16")
KINDS = {
    "run": Kind("a run folder", run.is_run, run.open_run, run.write_run, ("float32",)),
    "hf": Kind("a Hugging Face folder", hugging_face.is_folder, hugging_face.open_folder, hugging_face.write_folder, FLOATS),
    "pth": Kind("a .pth file", pytorch.is_pth, pytorch.open_pth, pytorch.write_pth, FLOATS, (".pth", ".pt")),
    "gguf": Kind(
        "a .gguf file", gguf_file.is_gguf, gguf_file.open_gguf, gguf_file.write_gguf, tuple(gguf_file.DTYPES), (".gguf",)
    ),
}
*_FIRST, _LAST = (kind.words for kind in KINDS.values())
EXPECTED = f"{', '.join(_FIRST)} or {_LAST}"


def kind_of(path: str | Path, key: str) -> str:
    """Which of KINDS a path holds, by its content. `key` names the flag or configuration key that gave it, for the error.

    Raises:
      UserError: none.
    """
    for name, kind in KINDS.items():
        if kind.is_here(Path(path)):
            return name
    there = f"no model at {str(path)!r}" if not Path(path).exists() else f"{str(path)!r} is no model"
    raise UserError(f"{key}: {there} (expected {EXPECTED})")


def open_model(path: str | Path, key: str, tokenizer: str | Path | None = None, n_heads: int | None = None) -> Model:
    """A model of any kind, before its weights are read.

    Args:
      key: as in `kind_of`.
      tokenizer: a folder with the tokenizer to use; None: the model's own.
      n_heads: of a .pth file, whose shapes do not tell it; None: see `pytorch.open_pth`.

    Raises:
      UserError: no model there, or one that ours cannot be; a tokenizer with more tokens than the model has.
    """
    model = KINDS[kind_of(path, key)].open(Path(path), key, tokenizer, n_heads)
    if model.tokenizer is not None and len(model.tokenizer) > model.config.model.vocab_size:
        raise UserError(
            f"{'--tokenizer' if tokenizer else key}: the tokenizer at {str(tokenizer or path)!r} has {len(model.tokenizer)} "
            f"tokens, the model {model.config.model.vocab_size} (expected the tokenizer that it was trained with)"
        )
    return model


def convert(
    source: str | Path,
    target: str | Path,
    to_kind: str | None = None,
    dtype: str = "float32",
    use_ema: bool | None = None,
    tokenizer: str | Path | None = None,
    n_heads: int | None = None,
) -> Model:
    """Write the model in `source` to `target`, which must not exist, as another kind. It is there whole or not at all.

    Args:
      to_kind: one of KINDS; None: as a file's suffix says, and as a folder the other one of "run" and "hf".
      dtype: of the weights written, one of the kind's `dtypes`.
      use_ema: EMA weights or the raw ones; None takes EMA where there are some.
      tokenizer, n_heads: see `open_model`.

    Returns:
      The source.

    Raises:
      UserError: an option that does not fit; whatever `open_model` and the kind's writer raise.
    """
    source, target = Path(source), Path(target)
    from_kind = kind_of(source, "--from")
    to_kind = to_kind or _kind_to_write(from_kind, target)
    kind = KINDS[to_kind]
    _check_target(target, to_kind)
    if n_heads is not None and from_kind != "pth":
        raise UserError(f"--n_heads: not possible with --from {str(source)!r}, which says it (expected it with a .pth file)")
    if dtype not in kind.dtypes:
        raise UserError(f"--dtype: {dtype} is not possible with {kind.words} (expected {' or '.join(kind.dtypes)})")
    if tokenizer is not None and to_kind == "pth":
        raise UserError("--tokenizer: not possible with a .pth file, which holds none")
    model = open_model(source, "--from", tokenizer, n_heads)
    if use_ema and not model.has_ema:
        raise UserError(f"--ema: {str(source)!r} has no EMA weights (a run has them with training.use_ema)")
    if model.tokenizer is None and to_kind != "pth":
        raise UserError(f"--tokenizer: missing ({str(source)!r} has none; expected a folder with tokenizer.json)")

    model_config = model.config.model.copy_and_resolve_references()
    model_config.attention = "auto"  # the backend it was trained with may not exist on this machine
    _, abstract_params = abstract_model(ModelConfig.make(model_config, "float32"))
    # A .gguf file's writer rounds by itself: norms it does not, and q8_0 has blocks.
    read_dtype = jnp.dtype("float32" if to_kind == "gguf" else dtype)
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, read_dtype), abstract_params)
    with np.errstate(over="ignore"):
        params = model.params(wanted, use_ema)
    if read_dtype == jnp.float16 and not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
        raise UserError("--dtype: float16 has no number as large as one of the weights (expected bfloat16 or float32)")
    write = functools.partial(kind.write, dtype=dtype) if to_kind == "gguf" else kind.write
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with files.aside(target, folder=not kind.suffixes) as written:
            write(written, model, params)
    except OSError as error:
        raise UserError(f"--to: cannot write {str(target)!r} ({error.strerror or error})") from error
    return model


def _check_target(target: Path, to_kind: str) -> None:
    kind = KINDS[to_kind]
    suffixes = [suffix for other in KINDS.values() for suffix in other.suffixes]
    if target.suffix not in kind.suffixes if kind.suffixes else target.suffix in suffixes:
        ending = kind.suffixes[0] if kind.suffixes else f"none of {', '.join(suffixes)}"
        raise UserError(f"--to: {str(target)!r} is not the name of {kind.words} (expected one that ends in {ending})")
    if target.exists():
        raise UserError(f"--to: {str(target)!r} exists (expected a new name)")


def _kind_to_write(from_kind: str, target: Path) -> str:
    for name, kind in KINDS.items():
        if target.suffix in kind.suffixes:
            return name
    others = {"run": "hf", "hf": "run"}
    if from_kind not in others:
        raise UserError(f"--to_kind: missing (expected run or hf: {str(target)!r} could be a folder of either)")
    return others[from_kind]
