"""`evaluate --tasks`: one model's results, or several models' on the same questions."""

from collections.abc import Callable

import numpy as np

from mateconv_jax.evaluation import benchmark, benchmark_table, outputs
from mateconv_jax.evaluation.comparison import Measure, Paired

SHOWN = 20  # questions of each task that the models answer differently

print_result = benchmark_table.print_table


def evaluator(args) -> Callable[[str], dict]:
    """Of the command line; see evaluate.py."""
    outputs.check(args.csv, "--csv", ".csv", ",".join(benchmark_table.CSV_COLUMNS))
    outputs.check(args.plot, "--plot", ".png", outputs.MADE_BY)
    options = benchmark.AskOptions(args.shots or 0, args.score or "letters", args.chat)
    is_alone = len(args.model_path) == 1 and args.output is None

    def evaluate(path: str) -> dict:
        result = benchmark.evaluate_tasks(
            path,
            args.tasks,
            options,
            args.limit,
            args.batch_size,
            args.reward,
            64 if args.max_new_tokens is None else args.max_new_tokens,
            args.use_ema,
            args.dtype,
            args.tokenizer,
        )
        _write_files(result, args)
        if is_alone and not args.records:
            result["tasks"] = [{key: value for key, value in task.items() if key != "records"} for task in result["tasks"]]
        return result

    return evaluate


def _write_files(result: dict, args) -> None:
    if args.csv is not None:
        benchmark_table.write_csv(result, args.csv)
    if args.plot is not None:
        from mateconv_jax.evaluation import benchmark_plot  # matplotlib takes 1 s

        benchmark_plot.write_plot(result, args.plot)


def described(result: dict) -> list[str]:
    """Lines on the model, what it was asked, and how."""
    tasks = ", ".join(f"{task['name']} ({task['questions']:,} questions)" for task in result["tasks"])
    asked = f"{result['shots']} examples, {result['score']} scored{', through the chat template' * result['chat']}"
    return [result["model_path"], tasks, asked]


def paired(results: list[dict]) -> list[Measure]:
    """The models' metrics of each question, by subject; see comparison.py."""
    measures: list[Measure] = []
    for of_models in zip(*(result["tasks"] for result in results), strict=True):
        groups = [record["subject"] for record in of_models[0]["records"]]
        for metric in of_models[0]["metrics"]:
            rows = [[record[metric] for record in task["records"]] for task in of_models]
            name = f"{of_models[0]['name']} {metric}"
            measures.append(Paired(name, groups, np.array(rows, float), None, False, ".1%", "questions"))
    return measures


def side_by_side(results: list[dict]) -> list[dict]:
    """The first questions that not all models answer alike, see reporting/compare_page.py."""
    sections = []
    for of_models in zip(*(result["tasks"] for result in results), strict=True):
        metric = next(iter(of_models[0]["metrics"]))
        items = []
        for records in zip(*(task["records"] for task in of_models), strict=True):
            if len({record[metric] for record in records}) > 1:
                turns = [(records[0]["subject"], f"question {records[0]['id']}")]
                items.append({"turns": turns, "cells": [[_answer(record, metric)] for record in records]})
        about = f"{len(items):,} of {len(of_models[0]['records']):,} questions" + f"; the first {SHOWN}" * (len(items) > SHOWN)
        title = {"title": f"{of_models[0]['name']}: answered differently", "chinese": "回答不同的题目", "note": about}
        if items:
            sections.append(title | {"items": items[:SHOWN]})
    return sections


def _answer(record: dict, metric: str) -> dict:
    """What a model answers: its text, or the log-likelihoods of the choices."""
    scores = record.get("log_likelihoods")
    text = record["text"] if "text" in record else "" if scores is None else "  ".join(f"{score:.2f}" for score in scores)
    return {"text": text, "note": f"{metric} {record[metric]}"}
