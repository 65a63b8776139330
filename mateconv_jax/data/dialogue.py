"""What a dialogue is."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

LEARN = ("assistant", "last", "everything")  # of a dialogue: the assistant's turns, the last of them, or every token


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """A conversation, in the shapes that transformers' `apply_chat_template` takes.

    Attributes:
      messages: not empty; each {"role": text, "content": text}, and where there are such: "reasoning_content" (text),
        "tool_calls" (list), "tool_call_id", "name".
      tools: descriptions of the functions that the assistant may call, as JSON schemas.
    """

    messages: list[dict]
    tools: list[dict] | None = None


@dataclasses.dataclass(frozen=True)
class Preference:
    """Two answers to one prompt. Both dialogues begin with the prompt: the messages that they have in common."""

    chosen: Dialogue
    rejected: Dialogue

    @property
    def n_prompt(self) -> int:
        """Messages of the prompt."""
        pairs = zip(self.chosen.messages, self.rejected.messages, strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def texts_in(value: Any) -> Iterator[str]:
    """Every text in nested lists and objects, the keys of objects too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_in(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from texts_in(item)
