"""Which questions a model gets right, by subject and in all."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mateconv_jax.tasks import statistics
from mateconv_jax.tasks.encoding import Scored
from mateconv_jax.tasks.prompts import Prompt
from mateconv_jax.tasks.questions import Question, Task
from mateconv_jax.tasks.scoring import Scores
from mateconv_jax.tasks.subjects import CEVAL, CMMLU


def records(prompts: list[Prompt], answers: list[list[Scored]], scores: Scores, first: int = 0) -> list[dict]:
    """One for each question: id, subject, answer (index), truncated, log_likelihoods (None if one is not finite), and 0 or 1
    for each metric, all as lm_eval defines them:

      acc        the right choice has the highest log-likelihood
      acc_norm   the highest, divided by its number of characters
      acc_bytes  the highest, divided by its number of UTF-8 bytes

    Of a continuation, acc: every token is the likeliest one at its place.

    Args:
      answers: of each prompt, as encoded.
      first: index in `scores` of the first answer.
    """
    found = []
    for prompt, of_prompt in zip(prompts, answers, strict=True):
        place = slice(first, first + len(of_prompt))
        first = place.stop
        log_likelihoods, question = scores.log_likelihood_N[place], prompt.question
        is_finite = bool(np.isfinite(log_likelihoods).all())  # not of a model that diverged
        record = {
            "id": question.id,
            "subject": question.subject,
            "answer": question.answer,
            "truncated": any(answer.is_truncated for answer in of_prompt),
            "log_likelihoods": log_likelihoods.tolist() if is_finite else None,
        }
        if len(of_prompt) == 1:
            found.append(record | {"acc": int(is_finite and scores.is_likeliest_N[place][0])})
            continue
        characters = np.array([len(choice) for choice in prompt.choices], np.float64)
        n_bytes = np.array([len(choice.encode()) for choice in prompt.choices], np.float64)
        for metric, sizes in (("acc", 1), ("acc_norm", characters), ("acc_bytes", n_bytes)):
            record[metric] = int(is_finite and np.argmax(log_likelihoods / sizes) == question.answer)
        found.append(record)
    return found


def means(task: Task, of_questions: list[dict], metrics: list[str]) -> dict[str, float]:
    """What training logs of a task: each metric over all questions, METRIC_macro over its subjects' means, and the perplexity
    of a continuation. Numbers that there are not are left out.
    """
    found: dict[str, float | None] = {}
    for metric in metrics:
        by_subject: dict[str, list[float | None]] = {subject: [] for subject in task.subjects}
        for record in of_questions:
            by_subject[record["subject"]].append(record[metric])
        found[metric] = _mean([value for values in by_subject.values() for value in values])
        found[f"{metric}_macro"] = _mean([_mean(values) for values in by_subject.values()])
    if task.kind == "continuation":
        found["perplexity"] = _perplexity(of_questions)
    return {name: value for name, value in found.items() if value is not None}


def summary(task: Task, of_questions: list[dict], metrics: list[str]) -> dict:
    """A task's figures. `metrics`: which numbers of the records are averaged.

    Returns:
      name, path, kind, questions, truncated (questions whose context was cut), chance (None: nothing to guess). Under
      `metrics`, over all questions (micro), of each metric its value, stderr, interval (95 %) and p_value (against guessing);
      under `macro` the mean of the subjects' values: value, stderr, interval; under `subjects`, in the order of the files,
      subject, title and the same figures. A continuation also has its perplexity, as lm_eval's: exp of minus the mean
      log-likelihood of an answer.
    """
    pairs = list(zip(task.questions, of_questions, strict=True))
    titles = {"ceval": CEVAL, "cmmlu": CMMLU}.get(task.style, {})
    subjects: list[dict[str, Any]] = [
        {"subject": subject, "title": titles.get(subject, subject)}
        | _figures(task, [pair for pair in pairs if pair[0].subject == subject], metrics)
        for subject in task.subjects
    ]
    macro = {metric: _macro([subject["metrics"][metric] for subject in subjects]) for metric in metrics}
    described = {"name": task.name, "path": str(task.path), "kind": task.kind}
    return described | _figures(task, pairs, metrics) | {"macro": macro, "subjects": subjects}


def _figures(task: Task, pairs: list[tuple[Question, dict]], metrics: list[str]) -> dict:
    """Over some of a task's questions and their records."""
    some = [record for _, record in pairs]
    n_choices = None if task.chance is None else [len(question.choices) for question, _ in pairs]
    found = {
        "questions": len(some),
        "truncated": sum(record["truncated"] for record in some),
        "chance": None if n_choices is None else sum(1 / n for n in n_choices) / len(n_choices),
        "metrics": {metric: _metric([record[metric] for record in some], n_choices) for metric in metrics},
    }
    if task.kind == "continuation":
        found["perplexity"] = _perplexity(some)
    return found


def _perplexity(of_questions: list[dict]) -> float | None:
    """As lm_eval's; None: too large for a float."""
    mean = sum((record["log_likelihoods"] or [-math.inf])[0] for record in of_questions) / len(of_questions)
    return math.exp(-mean) if mean > -700 else None


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]  # a function may give an answer no reward


def _mean(values: Sequence[float | None]) -> float | None:
    return float(np.mean(known)) if (known := _known(values)) else None


def _metric(values: list[float | None], n_choices: list[int] | None) -> dict[str, float | list[float] | None]:
    known = _known(values)
    if not known:
        return {"value": None, "stderr": None, "interval": None, "p_value": None}
    return {
        "value": _mean(known),
        "stderr": statistics.stderr(known),
        "interval": statistics.interval(known),
        "p_value": None if n_choices is None else statistics.p_value(int(sum(known)), n_choices),
    }


def _macro(of_subjects: list[dict]) -> dict[str, float | list[float] | None]:
    values = _known([metric["value"] for metric in of_subjects])
    if not values:
        return {"value": None, "stderr": None, "interval": None}
    mean, error = float(np.mean(values)), statistics.stderr_of_macro([metric["stderr"] for metric in of_subjects])
    interval = statistics.around(mean, error)
    if interval is not None and all(0 <= value <= 1 for value in values):
        interval = [max(0.0, interval[0]), min(1.0, interval[1])]
    return {"value": mean, "stderr": error, "interval": interval}
