"""Benchmark questions: how many a model answers right, and whether that is more than guessing."""

import functools
import time
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from mateconv_jax.errors import UserError
from mateconv_jax.evaluation.scored_model import bar, check_divisible, config_of, on_mesh, open_to_score
from mateconv_jax.inference.text_generator import TextGenerator
from mateconv_jax.interop.stored_model import StoredModel
from mateconv_jax.model.transformer import abstract_model
from mateconv_jax.runtime import sharding
from mateconv_jax.tasks import results
from mateconv_jax.tasks.benchmark import AskOptions, Benchmark, metrics_of
from mateconv_jax.tasks.files import read_tasks
from mateconv_jax.tasks.questions import Task
from mateconv_jax.training.generated_answers import answer_records, default_check
from mateconv_jax.training.rewards import Rewards


def evaluate_tasks(
    model_path: str | Path,
    paths: list[str],
    options: AskOptions = AskOptions(),
    limit: int | None = None,
    batch_size: int | None = None,
    functions: list[str] | None = None,
    max_new_tokens: int = 64,
    use_ema: bool | None = None,
    dtype: str = "auto",
    tokenizer: str | Path | None = None,
) -> dict:
    """Ask a model the questions of tasks, on all devices.

    Args:
      model_path: as in `held_out.evaluate_run`.
      paths: see tasks/files.py; each PATH or NAME=PATH.
      limit: only the first questions of every subject; None: all.
      batch_size: rows over all devices that are scored at once; None: 8,192 tokens a device.
      functions: check generated answers, see mateconv_jax/rewards.py; None: what suits the answers.
      max_new_tokens: longest generated answer.
      use_ema: score the EMA weights (True) or the raw ones (False); None: EMA, if the model has them.
      dtype, tokenizer: as in `held_out.evaluate_run`.

    Returns:
      model_path; step (None if unknown); dtype; shots; score; chat; seconds of scoring, compilation included; tasks, of each
      what results.summary returns and its records.

    Raises:
      UserError: a task or the model cannot be read, or does not fit the options; a size is out of range.
    """
    _check(options.n_shots, limit, batch_size, max_new_tokens)
    tasks = [task.limited(limit) for task in read_tasks(paths, "--tasks")]
    model, own_tokenizer = open_to_score(model_path, tokenizer)
    found = {}
    started = time.monotonic()
    scored = [task for task in tasks if task.kind != "generation"]
    if scored:
        records = _score(scored, options, model, own_tokenizer, batch_size, use_ema, dtype)
        found |= {task.name: (of_task, metrics_of(task)) for task, of_task in zip(scored, records, strict=True)}
    if len(scored) < len(tasks):
        generator = TextGenerator.from_pretrained(model_path, tokenizer, use_ema, dtype)
        for task in (task for task in tasks if task.kind == "generation"):
            rewards = Rewards(tuple(functions or [default_check(task)]), (), 8)
            found[task.name] = answer_records(generator, task, rewards, options, max_new_tokens), rewards.names
    described = {"model_path": str(model_path), "step": model.step, "dtype": config_of(model, dtype).dtype.name}
    asked = {"shots": options.n_shots, "score": options.score, "chat": options.chat}
    summaries = [results.summary(task, *found[task.name]) | {"records": found[task.name][0]} for task in tasks]
    return described | asked | {"seconds": time.monotonic() - started, "tasks": summaries}


def _score(
    tasks: list[Task],
    options: AskOptions,
    model: StoredModel,
    tokenizer: PreTrainedTokenizerFast,
    batch_size: int | None,
    use_ema: bool | None,
    dtype: str,
) -> list[list[dict]]:
    mesh = sharding.make_mesh()
    if batch_size is not None:
        check_divisible(batch_size, mesh)
    c = config_of(model, dtype)
    graph, abstract_params = abstract_model(c)
    benchmark = Benchmark(tasks, options, tokenizer, graph, c, mesh, batch_size)
    params = on_mesh(model, abstract_params, use_ema, mesh)
    records = benchmark.records(params, progress=functools.partial(bar, doing="scoring"))
    assert records is not None  # nobody asks it to stop
    return records


def _check(n_shots: int, limit: int | None, batch_size: int | None, max_new_tokens: int) -> None:
    at_least = {"--shots": (n_shots, 0), "--limit": (limit, 1), "--batch_size": (batch_size, 1)}
    for flag, (value, least) in (at_least | {"--max_new_tokens": (max_new_tokens, 1)}).items():
        if value is not None and value < least:
            raise UserError(f"{flag}: {value} is invalid (expected at least {least})")
