"""Evaluation on held-out text: loss, perplexity and bits per byte of a trained model."""

import contextlib
import math
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerFast

from mateconv_jax import cores
from mateconv_jax.data.build import pipeline
from mateconv_jax.data.build.options import PrepareOptions
from mateconv_jax.data.dataset import Dataset, Rows, open_dataset
from mateconv_jax.data.text import sources
from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib
from mateconv_jax.data.tokenizer.token_bytes import bytes_per_token
from mateconv_jax.errors import UserError
from mateconv_jax.evaluation import several_sets
from mateconv_jax.evaluation.documents import NO_SPLITS, in_terms_of, is_prepared
from mateconv_jax.evaluation.scored_model import bar, check_divisible, config_of, on_mesh, open_to_score
from mateconv_jax.interop.stored_model import StoredModel
from mateconv_jax.losses.next_token import next_token_loss
from mateconv_jax.model.transformer import abstract_model
from mateconv_jax.runtime import sharding
from mateconv_jax.training.evaluator import Evaluator
from mateconv_jax.training.step import make_eval_step

BATCH_SIZE = 8
READING = ("encoding", "ignore_fields", "split_at_tokens", "text_key", "txt_document")


def evaluator(args) -> Callable[[str], dict]:
    """Of the command line; see evaluate.py."""
    return lambda path: evaluate_run(
        path,
        args.data,
        args.split,
        args.batch_size,
        args.max_batches,
        args.use_ema,
        args.dtype,
        args.tokenizer,
        reading_of(args),
    )


def reading_of(args) -> dict[str, Any]:
    """How the command line says that raw files are read: those of READING that it gives."""
    given = {name: getattr(args, name) for name in READING}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items() if value is not None}


@several_sets.each
def evaluate_run(
    model_path: str | Path,
    data: list[str],
    split: str | None = None,
    batch_size: int | None = None,
    max_batches: int | None = None,
    use_ema: bool | None = None,
    dtype: str = "auto",
    tokenizer: str | Path | None = None,
    reading: dict[str, Any] | None = None,
) -> dict:
    """Score a model on text, on all devices.

    Args:
      model_path: a run folder (its newest checkpoint), one of its checkpoints, a Hugging Face folder, a .pth or .gguf file.
      data: a dataset folder; a flat .bin file; raw files, as in `sources.find`, which are tokenised with the model's tokenizer
        into a temporary folder, with the run's seq_len or, for others, their context up to 512; or see `several_sets.each`.
      split: of a dataset folder; None: validation.
      batch_size: rows over all devices; None: BATCH_SIZE rounded up to a multiple of the devices.
      max_batches: stop after this many; None: score everything.
      use_ema: score the EMA weights (True) or the raw ones (False); None: both, if the model has both.
      dtype: compute dtype: auto, float32 or bfloat16.
      tokenizer: a folder with the tokenizer to use; None: the model's own.
      reading: how to read raw files, any of READING as in PrepareOptions.

    Returns:
      A dict: model_path; step (None if unknown); data; split (None: all of the data); seq_len; the numbers of rows, tokens
      (targets) and bytes scored; rejected, {rule: raw documents rejected}; and scores, {"raw" and/or "ema": {loss in
      nats/token, perplexity, bits_per_byte}}.
      Bits per byte is the total loss of all targets, control tokens included, in bits, divided by the UTF-8 bytes of the text
      they encode; None if that is 0.

    Raises:
      UserError: the model, tokenizer, EMA weights or data are missing; the data do not fit the model; a size is out of range.
    """
    model, own_tokenizer = open_to_score(model_path, tokenizer)
    mesh = sharding.make_mesh()
    batch_size = check_sizes(batch_size, max_batches, mesh)
    with opened(data, split, model.config, own_tokenizer, reading or {}) as (rows, described):
        graph, abstract_params = abstract_model(config_of(model, dtype, described["seq_len"]))
        weights = _weights(model, abstract_params, use_ema, mesh)
        eval_step = make_eval_step(graph, next_token_loss)
        evaluator = Evaluator(eval_step, rows, bytes_per_token(own_tokenizer), batch_size, max_batches, mesh)
        result = evaluator(weights, progress=bar)
        assert result is not None  # None only if interrupted by a stop request
    return {
        "model_path": str(model_path),
        "step": model.step,
        **described,
        "rows": result.rows,
        "tokens": result.tokens,
        "bytes": result.bytes,
        "scores": {name: _score(result.loss(name), result.bits_per_byte(name)) for name in weights},
    }


def _weights(model: StoredModel, abstract_params: nnx.State, use_ema: bool | None, mesh: Mesh) -> dict[str, nnx.State]:
    """The weights to score, {"raw" and/or "ema": parameters}, replicated on the mesh."""
    both = use_ema is None and model.has_ema
    choices = (False, True) if both else (bool(use_ema),)
    return {"ema" if ema else "raw": on_mesh(model, abstract_params, ema, mesh) for ema in choices}


def _score(loss: float, bits_per_byte: float) -> dict[str, float | None]:
    """Non-finite values become None: the model diverged, or the targets encode no text."""
    perplexity = math.exp(loss) if loss < 700 else math.inf
    values = {"loss": loss, "perplexity": perplexity, "bits_per_byte": bits_per_byte}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def check_sizes(batch_size: int | None, max_batches: int | None, mesh: Mesh) -> int:
    """Check both values; returns batch_size, or its default."""
    if batch_size is None:
        batch_size = -(-BATCH_SIZE // mesh.size) * mesh.size
    check_divisible(batch_size, mesh)
    if max_batches is not None and max_batches < 1:
        raise UserError(f"--max_batches: {max_batches} is invalid (expected at least 1)")
    return batch_size


# ---- data ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(
    data: list[str], split: str | None, config: ConfigDict, tokenizer: PreTrainedTokenizerFast, reading: dict[str, Any]
) -> Generator[tuple[Rows, dict]]:
    """Open a dataset folder, a flat .bin file or raw text: (rows, the result's data, split, seq_len and rejected).

    Args: see `evaluate_run`; config and tokenizer are the model's.

    Raises:
      UserError: no such data or split, or data that the model cannot read.
    """
    seq_len = config.data.seq_len
    described = {"data": data, "split": None, "seq_len": seq_len, "rejected": {}}
    document_starts = (tokenizer.bos_token_id, tokenizer.eos_token_id) if config.training.document_mask else None
    if is_prepared(data):
        if reading:
            raise UserError(f"--{next(iter(reading))}: {data[0]!r} is prepared already (expected only with raw text)")
        dataset = open_dataset(data[0], "--data", seq_len)
        if split is not None and dataset.splits is None:
            raise UserError(NO_SPLITS.format(data[0]))
        _check_dataset(dataset, config, tokenizer)
        name = split or "validation"
        rows = dataset.rows(name, document_starts)
        if rows is None:
            raise UserError(f"--split: {data[0]!r} has no split {name!r} (available: {', '.join(dataset.splits or ())})")
        vocab_size = tokenizer_lib.vocab_size(tokenizer)
        dataset.check_tokens(rows, vocab_size, f"the model's tokenizer has {vocab_size}")
        yield rows, described | {"split": None if dataset.splits is None else name, "seq_len": dataset.seq_len}
        return
    if split is not None:
        raise UserError(NO_SPLITS.format(" ".join(data)))
    with tempfile.TemporaryDirectory(prefix="mateconv-") as temporary:
        folder = Path(temporary) / "dataset"
        rejected = _prepare(data, folder, tokenizer, seq_len, reading)
        dataset = open_dataset(folder, "--data", seq_len)
        _check_content(dataset, " ".join(data))
        rows = dataset.rows("train", document_starts)
        assert rows is not None
        yield rows, described | {"rejected": rejected}


def _check_dataset(dataset: Dataset, config: ConfigDict, tokenizer: PreTrainedTokenizerFast) -> None:
    path = str(dataset.path)
    _check_content(dataset, path)
    if dataset.tokenizer_fingerprint not in (None, tokenizer_lib.fingerprint(tokenizer)):
        raise UserError(
            f"--data: {path!r} was not tokenised with the model's tokenizer (give the raw text, or prepare it with --tokenizer "
            f"{tokenizer.name_or_path})"
        )
    if dataset.seq_len > config.model.max_seq_len:
        raise UserError(
            f"--data: {path!r} has rows of {dataset.seq_len} tokens, longer than the model's context of "
            f"{config.model.max_seq_len} (give the raw text, or prepare it with --seq_len {config.model.max_seq_len})"
        )


def _check_content(dataset: Dataset, path: str) -> None:
    if dataset.content != "texts":
        raise UserError(
            f"--data: {path!r} holds {dataset.content} (expected texts or dialogues; train measures {dataset.content})"
        )


def _prepare(
    data: list[str], folder: Path, tokenizer: PreTrainedTokenizerFast, seq_len: int, reading: dict[str, Any]
) -> dict[str, int]:
    """Prepare raw text as a dataset folder with a single split; returns {rule: documents rejected}."""
    tokenizer_folder = folder.with_name("tokenizer")
    tokenizer.save_pretrained(tokenizer_folder)
    options = PrepareOptions(seq_len=seq_len, val_fraction=0.0, dedup="none", **reading)
    options = options.split_at(tokenizer.bos_token, tokenizer.eos_token)
    try:
        found = sources.find(data)
        n_chunks = 1 + sum(source.size or 0 for source in found) // options.sizes.bytes
        n_workers = min(cores.usable(), n_chunks)
        figures = pipeline.prepare(found, folder, str(tokenizer_folder), options, n_workers)
        assert figures is not None  # the folder is new
        return figures["rejects"]
    except UserError as error:
        raise UserError(in_terms_of("--data", error)) from error


# ---- table --------------------------------------------------------------------------------------------------------


def print_result(result: dict) -> None:
    """Print the result of `evaluate_run` to standard output."""
    if "sets" in result:
        _print_sets(result)
        return
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    for heading in ("weights", "loss (nats/token)", "perplexity", "bits per byte"):
        table.add_column(heading, justify="left" if heading == "weights" else "right")
    for name, score in result["scores"].items():
        table.add_row(name, *("-" if value is None else f"{value:,.4f}" for value in score.values()))
    model = f"[bold]{escape(result['model_path'])}[/bold]" + ("" if result["step"] is None else f", step {result['step']:,}")
    text = escape(", ".join([*result["data"], *([result["split"]] if result["split"] else [])]))
    rows = f"{result['rows']:,} rows of {result['seq_len']} tokens"
    size = f"{rows}; {result['tokens']:,} targets, {result['bytes']:,} bytes of text"
    lines = [f"{model}, on {text}", size]
    if result["rejected"]:
        lines.append("rejected: " + ", ".join(f"{rule} {n:,}" for rule, n in result["rejected"].items()))
    console = Console()
    console.print("\n".join(lines), soft_wrap=True, highlight=False)
    console.print(table)


def _print_sets(result: dict) -> None:
    """A row for each set and each kind of weights, then the means."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    for heading in ("set", "share", "weights", "targets", "nats/token", "perplexity", "bits per byte"):
        table.add_column(heading, justify="left" if heading in ("set", "weights") else "right")
    for name, of_set in result["sets"].items():
        for weights, score in of_set["scores"].items():
            values = ("-" if value is None else f"{value:,.4f}" for value in score.values())
            table.add_row(escape(name), f"{of_set['weight']:.3f}", weights, f"{of_set['tokens']:,}", *values)
    table.add_section()
    for weights, score in result["scores"].items():
        table.add_row("mean", "", weights, "", *("-" if value is None else f"{value:,.4f}" for value in score.values()))
    console = Console()
    step = "" if result["step"] is None else f", step {result['step']:,}"
    console.print(f"[bold]{escape(result['model_path'])}[/bold]{step}", soft_wrap=True, highlight=False)
    console.print(table)
