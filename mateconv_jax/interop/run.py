"""Run folders as a model format; see run_folder.py."""

from pathlib import Path

from flax import nnx

from mateconv_jax import run_folder
from mateconv_jax.interop import hugging_face
from mateconv_jax.interop.stored_model import StoredModel, all_end_ids, load_tokenizer, read_end_ids, write_end_ids


def is_run(path: Path) -> bool:
    """Whether `path` is a run folder or one of its checkpoints."""
    return run_folder.run_of(path) is not None and not hugging_face.is_folder(path)


def open_run(path: Path, key: str, tokenizer: str | Path | None, n_heads: int | None) -> StoredModel:
    """Open the checkpoint that `path` refers to.

    Raises:
      UserError: an invalid configuration, no finished checkpoint, or no tokenizer.
    """
    checkpoint = run_folder.find_checkpoint(path, key)
    config = run_folder.read_config(checkpoint.run, key)
    return StoredModel(
        path=path,
        config=config,
        tokenizer=load_tokenizer(tokenizer, checkpoint.run / "tokenizer", key),
        has_ema=config.training.use_ema,
        step=checkpoint.step,
        read=lambda abstract_params, use_ema: run_folder.load_params(checkpoint.path, abstract_params, use_ema),
        run=checkpoint.run,
        end_ids=read_end_ids(checkpoint.run, config.model.vocab_size),
    )


def write_run(path: Path, model: StoredModel, params: nnx.State) -> None:
    """Write a run folder whose checkpoint holds only weights."""
    config = model.config.copy_and_resolve_references()
    config.training.use_ema = False
    run_folder.write_config(path, config)
    assert model.tokenizer is not None  # checked by `formats.convert`
    model.tokenizer.save_pretrained(path / "tokenizer")
    if len(end_ids := all_end_ids(model)) > 1:
        write_end_ids(path, end_ids)
    run_folder.write_params(path, model.step or 0, params)
