"""What the model reads of a question, and the answers whose log-likelihoods are compared.

The default prompts are those of lm_eval's tasks ceval-valid, cmmlu, mmlu and arc, so that figures can be compared.
"""

import dataclasses
from string import ascii_uppercase
from typing import Literal

from mateconv_jax.errors import UserError
from mateconv_jax.tasks.questions import Question, Task
from mateconv_jax.tasks.subjects import CEVAL, CMMLU

Score = Literal["letters", "texts"]
Context = str | list[dict]  # a text to continue, or messages to answer
BETWEEN = "\n\n"  # examples


@dataclasses.dataclass(frozen=True)
class Prompt:
    """
    Attributes:
      context: what comes before the answer.
      answers: what may follow, white space included; empty: the model writes it.
      choices: the same without that white space, by whose length acc_norm and acc_bytes divide.
    """

    question: Question
    context: Context
    answers: tuple[str, ...]
    choices: tuple[str, ...]


def prompts(task: Task, n_shots: int, score: Score, chat: bool, key: str) -> list[Prompt]:
    """One for each question, in order.

    Args:
      n_shots: solved examples before each question: the first ones of its subject's dev part.
      score: of an exam, compare the letters of the choices or their texts. Without effect on other kinds.
      chat: put the questions through the chat template, and the examples before them as earlier turns; the answers follow the
        header of the assistant's turn.
      key: the flag or configuration key of n_shots, for error messages.

    Raises:
      UserError: a subject has fewer examples; a choice whose text is scored is empty.
    """
    write = _Writer(task, score, chat)
    found = []
    for question in task.questions:
        shots = task.shots.get(question.subject, ())[:n_shots]
        if len(shots) < n_shots:
            raise UserError(
                f"{key}: {n_shots}, but there are {len(shots)} examples of {question.subject or task.name!r} (looked for "
                f"{task.shot_files[question.subject]})"
            )
        found.append(write.prompt(question, shots))
    return found


class _Writer:
    """How questions of a task are written."""

    def __init__(self, task: Task, score: Score, chat: bool):
        self._task, self._chat = task, chat
        self._letters = task.kind == "choice" and score == "letters"
        self._english = task.style == "en"
        # lm_eval puts a space before every answer. Chinese texts have none there.
        has_space = self._letters or task.kind == "choice" and self._english
        self._space = " " if has_space and not chat else ""

    def prompt(self, question: Question, shots: tuple[Question, ...]) -> Prompt:
        choices = tuple(ascii_uppercase[: len(question.choices)]) if self._letters else self._choices(question)
        answers = tuple(self._space + choice for choice in choices)
        if not all(choices):
            raise UserError(f"{question.where}: an empty choice cannot be scored by its text (score the letters)")
        return Prompt(question, self._context(question, shots), answers, choices)

    def _choices(self, question: Question) -> tuple[str, ...]:
        return tuple(choice + question.after for choice in question.choices)

    def _context(self, question: Question, shots: tuple[Question, ...]) -> Context:
        description = self._description(question.subject)
        messages = question.record.get("messages")
        if self._chat or messages:
            turns = [] if not description else [{"role": "system", "content": description}]
            for shot in shots:
                turns += [*self._turns(shot), {"role": "assistant", "content": self._answer(shot)}]
            return turns + self._turns(question)
        examples = "".join(self._text(shot) + self._space_before_answer() + self._answer(shot) + BETWEEN for shot in shots)
        return description + examples + self._text(question)

    def _turns(self, question: Question) -> list[dict]:
        """The question as a dialogue that the assistant is to answer."""
        messages = question.record.get("messages")
        if messages:
            return messages[:-1] if messages[-1].get("role") == "assistant" else messages
        text = self._text(question) if self._task.kind == "choice" else question.text
        return [{"role": "user", "content": text}]

    def _text(self, question: Question) -> str:
        if self._task.kind in ("cloze", "continuation") or "prompt" in question.record:
            return question.text
        text = question.text.strip()
        if self._letters:
            lines = [f"{letter}. {choice}\n" for letter, choice in zip(ascii_uppercase, question.choices, strict=False)]
            return f"{text}\n{''.join(lines)}{'Answer:' if self._english else '答案：'}"
        return f"Question: {text}\nAnswer:" if self._english else f"问题：{text}\n答案："

    def _answer(self, question: Question) -> str:
        """Of a solved example."""
        if self._task.kind == "generation":
            answer = question.record.get("answer") or (question.record.get("messages") or [{}])[-1].get("content")
            if answer is None:
                raise UserError(f'{question.where}: "answer": missing (an example needs one)')
            return str(answer)
        return ascii_uppercase[question.answer] if self._letters else self._choices(question)[question.answer]

    def _space_before_answer(self) -> str:
        return " " if self._task.kind == "generation" and self._english else self._space

    def _description(self, subject: str) -> str:
        if not self._letters:
            return ""
        if self._task.style == "ceval" and subject in CEVAL:
            return f"以下是中国关于{CEVAL[subject]}的单项选择题，请选出其中的正确答案。\n\n"
        if self._task.style == "cmmlu" and subject in CMMLU:
            return f"以下是关于{CMMLU[subject]}的单项选择题，请直接给出正确答案的选项。\n\n"
        if self._english and subject:
            return f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        return ""
