"""The parts of an answer: reasoning, content, and tool calls, told apart while the text arrives."""

import dataclasses
import json
from typing import Literal

THINK, END_THINK, CALL, END_CALL = "<think>", "</think>", "<tool_call>", "</tool_call>"


@dataclasses.dataclass(frozen=True)
class Part:
    """More text of one kind. A "tool_call" comes whole: its text is the arguments' JSON, `name` the function's."""

    kind: Literal["content", "reasoning", "tool_call"]
    text: str
    name: str = ""


class AnswerParts:
    """Splits an answer's text, pushed piece by piece, into parts. What may become a tag is held back.

    A model writes `<think>…</think>` before its answer, and calls as `<tool_call>{"name": …, "arguments": {…}}</tool_call>`
    (Qwen's and Hermes' templates). White space around these is not part of the answer. A call that is no such JSON is content.
    """

    def __init__(self, thinks: bool, is_thinking: bool, calls: bool):
        """
        Args:
          thinks: the answer may begin with `<think>`.
          is_thinking: the prompt ended with it.
          calls: the answer may hold tool calls.
        """
        self._state = "thinking" if is_thinking else "start" if thinks else "content"
        self._calls = calls
        self._held = ""
        self._strip_left = is_thinking

    def push(self, text: str) -> list[Part]:
        self._held += text
        parts: list[Part] = []
        while self._advance(parts):
            pass
        return [part for part in parts if part.text or part.name]

    def finish(self) -> list[Part]:
        """What is still held back."""
        kind = "reasoning" if self._state == "thinking" else "content"
        text = (CALL if self._state == "call" else "") + self._held
        self._held = ""
        return [Part(kind, text)] if text else []

    def _advance(self, parts: list[Part]) -> bool:
        """Take what can be taken from the held text. Returns whether the state changed."""
        if self._strip_left:
            self._held = self._held.lstrip()
            self._strip_left = not self._held
        if self._state == "start":
            start = self._held.lstrip()
            if THINK.startswith(start) and start != THINK:
                return False
            if start.startswith(THINK):
                self._enter("thinking", start[len(THINK) :])
            else:
                self._state = "content"
            return True
        if self._state == "thinking":
            if (before := self._take_until(END_THINK, parts, "reasoning")) is None:
                return False
            parts.append(Part("reasoning", before.rstrip()))
            self._enter("content", self._held)
            return True
        if self._state == "call":
            call, tag, rest = self._held.partition(END_CALL)
            if not tag:
                return False
            parts.append(_call(call))
            self._enter("content", rest)
            return True
        if not self._calls:
            parts.append(Part("content", self._held))
            self._held = ""
            return False
        if (before := self._take_until(CALL, parts, "content")) is None:
            return False
        parts.append(Part("content", before.rstrip()))
        self._state = "call"
        return True

    def _enter(self, state: str, held: str) -> None:
        self._state, self._held, self._strip_left = state, held, True

    def _take_until(self, tag: str, parts: list[Part], kind: Literal["content", "reasoning"]) -> str | None:
        """The text before a tag, which is removed with it; None without the tag: then what cannot belong to it, or to the white
        space before it, becomes a part.
        """
        before, found, rest = self._held.partition(tag)
        if found:
            self._held = rest
            return before
        n = next((n for n in range(len(tag) - 1, 0, -1) if self._held.endswith(tag[:n])), 0)
        safe = self._held[: len(self._held) - n].rstrip()
        parts.append(Part(kind, safe))
        self._held = self._held[len(safe) :]
        return None


def _call(text: str) -> Part:
    try:
        call = json.loads(text)
        name, arguments = call["name"], call.get("arguments", {})
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise TypeError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return Part("content", f"{CALL}{text}{END_CALL}")
    return Part("tool_call", json.dumps(arguments, ensure_ascii=False), name)
