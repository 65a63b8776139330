"""What a dialogue is."""

import dataclasses

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
