"""Questions from JSONL, in the shapes that MMLU, ARC, GSM8K, LAMBADA and their kind have on the Hugging Face hub.

choice        {"question": …, "choices": […], "answer": 1}                      MMLU; the answer: index, letter or text
              {"question": …, "choices": {"text": […], "label": […]}, "answerKey": "B"}     ARC
              {"question": …, "A": …, "B": …, "answer": "B"}                    C-Eval, CMMLU
cloze         {"text": "他把____吃了。", "choices": ["苹果", "天空"], "answer": 0}
continuation  {"context": …, "continuation": …}
              {"text": "中国的首都是____", "answer": "北京"}
              {"text": …}                                                       LAMBADA: the last word
generation    {"question": … or "prompt": … or "messages": […], "answer": …}
"""

import json
import re
from pathlib import Path
from string import ascii_uppercase

from mateconv_jax.errors import UserError
from mateconv_jax.tasks.csv_questions import read_utf8
from mateconv_jax.tasks.questions import Kind, Question, Style

GAP = re.compile("_{2,}|＿{2,}")
SHAPES = '{"question", "choices", "answer"}, {"text", "choices", "answer"}, {"context", "continuation"} or {"prompt", "answer"}'


class _Wrong(Exception):
    """What is wrong with a line."""


def read(path: Path, subject: str, key: str) -> tuple[Kind, Style | None, list[Question]]:
    """The questions of a file.

    Args:
      subject: of lines without a field "subject".

    Raises:
      UserError: the file cannot be read, or a line is no question or of another kind than the first; with the line.
    """
    questions, kind = [], None
    for number, line in enumerate(read_utf8(path, key).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise _Wrong(f"not a JSON object but {type(record).__name__}")
            found, fields = _parse(record)
            if kind not in (None, found):
                raise _Wrong(f"a question of the kind {found}, and those before it are {kind} (expected one kind a file)")
        except json.JSONDecodeError as error:
            raise UserError(f"{key}: {path}:{number}: not JSON ({error})") from error
        except _Wrong as error:
            raise UserError(f"{key}: {path}:{number}: {error}") from None
        kind = found
        own = str(record.get("subject") or subject), str(record.get("id", len(questions)))
        questions.append(Question(f"{path}:{number}", own[1], own[0], **fields))
    if kind is None:
        raise UserError(f"{key}: no questions in {str(path)!r} (expected a JSON object a line: {SHAPES})")
    return kind, None, questions


def _parse(record: dict) -> tuple[Kind, dict]:
    """The kind of question, and its fields."""
    choices, labels = _choices(record)
    if choices and isinstance(record.get("text"), str):
        before, after = _around_gap(record["text"])
        return "cloze", {"text": before, "choices": choices, "answer": _index(record, choices, labels), "after": after}
    if choices:
        text = _text(record, "question")
        return "choice", {"text": text, "choices": choices, "answer": _index(record, choices, labels)}
    if "continuation" in record:
        return "continuation", {"text": _text(record, "context"), "choices": (_text(record, "continuation"),)}
    if "text" in record:
        return "continuation", _end_of(record)
    if not {"question", "prompt", "messages"} & set(record):
        raise _Wrong(f"no question (expected {SHAPES}; there are: {', '.join(list(record)[:8])})")
    name = next(name for name in ("messages", "prompt", "question") if name in record)
    if not isinstance(record[name], str) and name == "question":
        raise _Wrong(f'"question": {record[name]!r} is not a text')
    if not {"answer", "pattern", "messages"} & set(record):
        raise _Wrong('"answer": missing')
    return "generation", {"text": record[name] if isinstance(record[name], str) else "", "record": record}


def _choices(record: dict) -> tuple[tuple[str, ...], list[str]]:
    """Texts of the choices and their labels in the file; both empty where it has none."""
    question = record.get("question")
    found = question.get("choices") if isinstance(question, dict) else record.get("choices", record.get("options"))
    if found is None:
        labels = [letter for letter in ascii_uppercase if letter in record]
        found = [record[letter] for letter in labels]
        if not found:
            return (), []
    elif isinstance(found, dict) and {"text", "label"} <= set(found):
        found, labels = found["text"], [str(label) for label in found["label"]]
    elif isinstance(found, dict):  # {"A": …, "B": …}
        labels, found = list(found), list(found.values())
    elif isinstance(found, list) and all(isinstance(choice, dict) for choice in found):
        labels, found = [str(choice.get("label")) for choice in found], [choice.get("text") for choice in found]
    else:
        labels = []
    if not isinstance(found, list) or not all(isinstance(choice, str) for choice in found):
        raise _Wrong(f'"choices": {found!r} is invalid (expected a list of texts)')
    if len(found) < 2 or len(found) > len(ascii_uppercase):
        raise _Wrong(f'"choices": there are {len(found)} (expected 2 to {len(ascii_uppercase)})')
    return tuple(found), labels


def _index(record: dict, choices: tuple[str, ...], labels: list[str]) -> int:
    """Of the right choice. A text is, whichever of these it is first: a label of the file, a letter, one of the choices, a
    number from 0.
    """
    name = next((name for name in ("answer", "answerKey", "label", "gold") if name in record), None)
    if name is None:
        raise _Wrong('"answer": missing')
    answer = record[name]
    if isinstance(answer, str):
        letters = list(ascii_uppercase[: len(choices)])
        for known in (labels, letters, list(choices)):
            if answer.strip() in known:
                return known.index(answer.strip())
        answer = int(answer) if re.fullmatch("[0-9]+", answer) else answer
    if type(answer) is int and 0 <= answer < len(choices):
        return answer
    raise _Wrong(
        f'"{name}": {record[name]!r} is invalid (expected an index from 0 to {len(choices) - 1}, a letter or a choice)'
    )


def _end_of(record: dict) -> dict:
    """A continuation whose context is the "text": up to the gap, which "answer" fills, or up to the last word."""
    text = _text(record, "text")
    if "answer" in record:
        return {"text": _around_gap(text)[0], "choices": (_text(record, "answer"),)}
    context, space, word = text.rstrip().rpartition(" ")
    if not space:
        raise _Wrong('"text": no gap (____) with an "answer", and no last word behind a space')
    return {"text": context, "choices": (space + word,)}


def _around_gap(text: str) -> tuple[str, str]:
    gaps = list(GAP.finditer(text))
    if len(gaps) != 1:
        raise _Wrong(f'"text": {len(gaps)} gaps (expected one, written ____)')
    return text[: gaps[0].start()], text[gaps[0].end() :]


def _text(record: dict, name: str) -> str:
    value = record.get(name)
    if isinstance(value, dict) and isinstance(value.get("stem"), str):  # ARC as published: {"stem": …, "choices": […]}
        value = value["stem"]
    if not isinstance(value, str) or not value.strip():
        raise _Wrong(f'"{name}": {"missing" if value is None else f"{value!r} is invalid (expected a text)"}')
    return value
