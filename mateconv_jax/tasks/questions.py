"""Benchmark questions in memory."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Literal

Kind = Literal["choice", "cloze", "continuation", "generation"]
Style = Literal["ceval", "cmmlu", "zh", "en"]


@dataclasses.dataclass(frozen=True)
class Question:
    """One question of a task.

    Attributes:
      where: "FILE:LINE", for error messages.
      id: its id in the file, otherwise its number there, from 0.
      subject: "" if the file names none.
      text: the question; of a cloze the text before the gap; of a continuation its context.
      choices: the texts to choose from; of a continuation only the right one; of a generation none.
      answer: index of the right choice.
      after: of a cloze, the text behind the gap.
      record: the line of a generation, from which a function checks the answer.
    """

    where: str
    id: str
    subject: str
    text: str
    choices: tuple[str, ...] = ()
    answer: int = 0
    after: str = ""
    record: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Task:
    """Questions of one kind that are reported together.

    Attributes:
      kind: choice (an exam), cloze (choose what fills a gap), continuation (is this text the likeliest one?), generation
        (the model writes an answer, which is checked).
      style: which prompt is the default, see prompts.py.
      shots: {subject: solved examples from the files' dev part, in the file's order}.
      shot_files: {subject: where they were looked for}.
    """

    name: str
    path: Path
    kind: Kind
    style: Style
    questions: tuple[Question, ...]
    shots: dict[str, tuple[Question, ...]]
    shot_files: dict[str, str]

    @property
    def subjects(self) -> list[str]:
        """In order of appearance."""
        return list(dict.fromkeys(question.subject for question in self.questions))

    @property
    def chance(self) -> float | None:
        """Expected accuracy of guessing, the mean of 1 / choices; None: there is nothing to choose from."""
        if self.kind not in ("choice", "cloze"):
            return None
        return sum(1 / len(question.choices) for question in self.questions) / len(self.questions)

    def limited(self, n: int | None) -> "Task":
        """With the first n questions of every subject; None: all of them."""
        if n is None:
            return self
        kept, seen = [], dict.fromkeys(self.subjects, 0)
        for question in self.questions:
            seen[question.subject] += 1
            if seen[question.subject] <= n:
                kept.append(question)
        return dataclasses.replace(self, questions=tuple(kept))

    def fingerprint(self) -> str:
        """Of what is asked, wherever the files are."""
        content = [
            [question.subject, question.text, question.choices, question.answer, question.after, question.record]
            for questions in (self.questions, *self.shots.values())
            for question in questions
        ]
        return hashlib.sha256(json.dumps([self.kind, self.style, content]).encode()).hexdigest()[:16]
