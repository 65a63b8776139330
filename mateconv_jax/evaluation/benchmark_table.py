"""What `evaluate_tasks` found, as a table on the terminal and as CSV."""

import csv
import io
import sys
from pathlib import Path

from mateconv_jax.evaluation import outputs

CSV_COLUMNS = (
    "task", "subject", "metric", "questions", "value", "stderr", "low", "high", "chance", "p_value", "truncated",
)  # fmt: skip
MICRO, MACRO = "(all, micro)", "(all, macro)"


def rows(result: dict) -> list[dict]:
    """A row with CSV_COLUMNS for each task, subject and metric; then the task's own, over all questions (micro) and over the
    subjects' values (macro).
    """
    found = []
    for task in result["tasks"]:
        parts = [(subject["subject"], subject, subject["metrics"]) for subject in task["subjects"]]
        if len(parts) == 1:
            parts = []
        parts.append((MICRO, task, task["metrics"]))
        if len(task["subjects"]) > 1:
            parts.append((MACRO, task, task["macro"]))
        for subject, part, metrics in parts:
            for metric, figures in metrics.items():
                low, high = figures["interval"] or (None, None)
                found.append(
                    dict(task=task["name"], subject=subject, metric=metric, questions=part["questions"], low=low, high=high)
                    | {name: figures.get(name) for name in ("value", "stderr", "p_value")}
                    | {"chance": part["chance"], "truncated": part["truncated"]}
                )
    return found


def write_csv(result: dict, path: Path) -> None:
    """UTF-8 with a byte order mark, without which Excel shows Chinese as garbage."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows(result))
    outputs.write(path, ("\ufeff" + text.getvalue()).encode())


# ---- table --------------------------------------------------------------------------------------------------------


def print_table(result: dict) -> None:
    """Print the result of `evaluate_tasks` to standard output: a task's subjects, then the task in all."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)  # a file has no 80 columns
    step = "" if result["step"] is None else f", step {result['step']:,}"
    n = sum(task["questions"] for task in result["tasks"])
    how = f"{result['shots']} shots, {result['score']} scored" + ", chat template" * result["chat"]
    speed = f"{n:,} questions in {result['seconds']:.1f} s ({n / result['seconds']:,.1f} questions/s)"
    console.print(f"[bold]{escape(result['model_path'])}[/bold]{step}: {how}\n{speed}", soft_wrap=True, highlight=False)
    for task in result["tasks"]:
        table = Table(
            box=box.SIMPLE, padding=(0, 1, 0, 0), title=f"{escape(task['name'])}  {task['kind']}", title_justify="left"
        )
        names = list(task["metrics"])
        if task["kind"] == "choice" and result["score"] == "letters":
            names = names[:1]  # letters have the same length
        for heading in ("subject", "questions", "chance", names[0], "95 %", "p", *names[1:]):
            table.add_column(heading, justify="left" if heading == "subject" else "right")
        subjects = task["subjects"] if len(task["subjects"]) > 1 else []
        for subject in subjects:
            table.add_row(*_cells(titled(subject), subject, subject["metrics"], names))
        if subjects:
            table.add_section()
        table.add_row(*_cells("all (micro)" if subjects else task["name"], task, task["metrics"], names), style="bold")
        if subjects:
            table.add_row(*_cells("all (macro)", task, task["macro"], names), style="bold")
        console.print(table)
        for line in notes(task):
            console.print(line, soft_wrap=True, highlight=False)


def notes(task: dict) -> list[str]:
    """What a reader of the figures has to know."""
    found = []
    metric, figures = next(iter(task["metrics"].items()))
    if figures["p_value"] is not None:
        better = figures["value"] > task["chance"]
        differs = figures["p_value"] < 0.05
        verdict = f"{'better' if better else 'worse'} than guessing" if differs else "not distinguishable from guessing"
        found.append(f"{metric} {figures['value']:.1%} is {verdict} ({task['chance']:.1%}; p = {figures['p_value']:.2g})")
        n_subjects = len(task["subjects"])
        if n_subjects > 1:
            n = sum(subject["metrics"][metric]["p_value"] < 0.05 for subject in task["subjects"])
            found.append(f"{n} of {n_subjects} subjects have p < 0.05; of models that guess, up to {0.05 * n_subjects:.1f} do")
    if task.get("perplexity") is not None:
        found.append(f"perplexity of the continuations {task['perplexity']:,.2f}")
    if task["truncated"]:
        n = f"{task['truncated']:,} of {task['questions']:,}"
        found.append(f"{n} prompts are longer than the model's context and lost their beginning")
    return found


def titled(subject: dict) -> str:
    name, title = subject["subject"] or "-", subject["title"]
    return name if title == subject["subject"] else f"{name} {title}"


def _cells(name: str, part: dict, metrics: dict, names: list[str]) -> list[str]:
    """Of the first metric also its error, interval and p: eight columns fit a terminal. JSON and CSV have those of all."""
    chance = "-" if part["chance"] is None else f"{part['chance']:.1%}"
    first = metrics[names[0]]
    low_high = "-" if first["interval"] is None else "{:.1f}–{:.1f}".format(*(100 * x for x in first["interval"]))
    p = first.get("p_value")
    values = ["-" if metrics[name]["value"] is None else f"{100 * metrics[name]['value']:.1f}" for name in names]
    error = "" if first["stderr"] is None else f" ± {100 * first['stderr']:.1f}"
    return [name, f"{part['questions']:,}", chance, values[0] + error, low_high, "-" if p is None else f"{p:.2g}", *values[1:]]
