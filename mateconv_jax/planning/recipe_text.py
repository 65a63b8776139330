"""A recipe as a configuration file, as a table and as JSON."""

import textwrap
from typing import Any

from rich.console import Console
from rich.table import Table

from mateconv_jax.planning.recipe import Recipe
from mateconv_jax.planning.recipe_reasons import Choice, duration, warnings

MADE_BY = "# Made by mateconv_jax.recipe: "  # in the file's first line
WIDTH = 128


def config_file(
    recipe: Recipe, chosen: list[Choice], command: str, path: str, dollars_per_gpu_hour: float | None = None
) -> str:
    """Python code of a file for `train --config`.

    Args:
      command: that made it.
      path: of the file, for its own comment.
    """
    lines = [MADE_BY + one_line(command), "#"]
    for sentence in [*_summary(recipe, dollars_per_gpu_hour), *(f"Warning: {warning}." for warning in warnings(recipe))]:
        lines += [f"# {line}" for line in textwrap.wrap(sentence, WIDTH - 2, break_on_hyphens=False)]
    lines += ["#", f"# python -m mateconv_jax.train --config={one_line(path)}"]
    lines += ["", "from mateconv_jax.config import default_config", "", ""]
    lines += ["def get_config():", "    config = default_config()"]
    section = None
    for choice in chosen:
        if choice.key.partition(".")[0] != section:
            section = choice.key.partition(".")[0]
            lines.append("")
        lines += [f"    # {line}" for line in textwrap.wrap(choice.reason, WIDTH - 6, break_on_hyphens=False)]
        lines.append(f"    config.{choice.key} = {literal(choice.value)}")
    return "\n".join([*lines, "    return config", ""])


def one_line(text: str) -> str:
    """A path may hold a line break, which would end the comment."""
    return text.replace("\n", "\\n").replace("\r", "\\r")


def literal(value: Any) -> str:
    """As ruff would write it: 10_000 with an underscore, texts in double quotes."""
    if isinstance(value, str):
        quoted = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{quoted}"' if value.isprintable() else repr(value)
    return f"{value:_}" if isinstance(value, int) and value >= 10_000 else repr(value)


def print_table(recipe: Recipe, chosen: list[Choice], dollars_per_gpu_hour: float | None, console: Console) -> None:
    table = Table(show_lines=False)
    table.add_column("key", no_wrap=True)
    table.add_column("value", justify="right", overflow="fold")
    table.add_column("why")
    section = None
    for choice in chosen:
        if section not in (None, choice.key.partition(".")[0]):
            table.add_section()
        section = choice.key.partition(".")[0]
        value = f"{choice.value:,}" if isinstance(choice.value, int) else str(choice.value)
        table.add_row(choice.key, value, choice.reason)
    console.print(table)
    print_summary(recipe, dollars_per_gpu_hour, console)


def print_summary(recipe: Recipe, dollars_per_gpu_hour: float | None, console: Console) -> None:
    for sentence in _summary(recipe, dollars_per_gpu_hour):
        console.print(sentence, highlight=False, markup=False)
    for warning in warnings(recipe):
        console.print(f"warning: {warning}", highlight=False, markup=False, style="yellow")


def _summary(recipe: Recipe, dollars_per_gpu_hour: float | None) -> list[str]:
    count = f"{recipe.machine.devices} x {recipe.machine.name}"
    at_best = "" if recipe.hours_at_best is None else f", {duration(recipe.hours_at_best)} at best"
    sentences = [
        f"{recipe.parameters:,} parameters ({recipe.shape.non_embedding:,} without the embedding), {recipe.tokens:,} tokens: "
        f"{recipe.tokens / recipe.parameters:.3g} for each parameter, {recipe.epochs:.2f} epochs over {recipe.data.tokens:,}.",
        f"Expected: {duration(recipe.hours)}{at_best} on {count} ({recipe.cost.seconds_from}); "
        "evaluations and checkpoints come on top.",
    ]
    if dollars_per_gpu_hour is not None:
        dollars = recipe.hours * recipe.machine.devices * dollars_per_gpu_hour
        sentences.append(f"Cost: {dollars:,.2f} dollars at {dollars_per_gpu_hour:g} a GPU hour.")
    return sentences


def as_json(recipe: Recipe, chosen: list[Choice], dollars_per_gpu_hour: float | None) -> dict:
    """In tokens, bytes, hours and dollars."""
    cost = recipe.cost
    return {
        "device": recipe.machine.name,
        "devices": recipe.machine.devices,
        "parameters": recipe.parameters,
        "non_embedding_parameters": recipe.shape.non_embedding,
        "tokens": recipe.tokens,
        "tokens_per_parameter": recipe.tokens / recipe.parameters,
        "unique_tokens": recipe.data.tokens,
        "epochs": recipe.epochs,
        "hours": recipe.hours,
        "hours_at_best": recipe.hours_at_best,
        "hours_from": cost.seconds_from,
        "dollars": None if dollars_per_gpu_hour is None else recipe.hours * recipe.machine.devices * dollars_per_gpu_hour,
        "memory": {"peak": cost.memory, "available": cost.available, "from": cost.memory_from},
        "config": {choice.key: {"value": choice.value, "reason": choice.reason} for choice in chosen},
        "warnings": warnings(recipe),
    }
