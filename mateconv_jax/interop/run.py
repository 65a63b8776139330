"""A run folder as one kind of model among others; see run_folder.py."""

from pathlib import Path

import orbax.checkpoint as ocp
from flax import nnx

from mateconv_jax import run_folder
from mateconv_jax.interop import hugging_face
from mateconv_jax.interop.stored_model import Model, load_tokenizer


def is_run(path: Path) -> bool:
    return (path / "config.json").is_file() and not hugging_face.is_folder(path)


def open_run(path: Path, key: str, tokenizer: str | Path | None, n_heads: int | None) -> Model:
    """Its newest checkpoint. Raises UserError: a broken configuration, no finished checkpoint, no tokenizer."""
    config = run_folder.read_config(path, key)
    step = run_folder.finished_step(path, key)
    return Model(
        path=path,
        config=config,
        tokenizer=load_tokenizer(tokenizer, path / "tokenizer", key),
        has_ema=config.training.use_ema,
        step=step,
        read=lambda abstract_params, use_ema: run_folder.load_params(path, step, abstract_params, use_ema),
    )


def write_run(path: Path, model: Model, params: nnx.State) -> None:
    """A run whose checkpoint holds weights alone. It can be sampled from, evaluated and started from (training.init_from);
    there is no optimizer state with which a training could go on.
    """
    config = model.config.copy_and_resolve_references()
    config.training.use_ema = False
    run_folder.write_config(path, config)
    assert model.tokenizer is not None  # convert has refused
    model.tokenizer.save_pretrained(path / "tokenizer")
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(state=ocp.StandardCheckpointHandler())) as checkpointer:
        folder = path.absolute() / "checkpoints" / str(model.step or 0)
        checkpointer.save(folder, args=ocp.args.Composite(state=ocp.args.StandardSave({"params": params})))
