"""The texts of a dialogue."""

from collections.abc import Callable

from mateconv_jax.data.dialogue import Dialogue, Preference, texts_in
from mateconv_jax.data.text.rejected import Rejected


def is_dialogue(messages) -> bool:
    """Whether it is a list of {"role": text, "content": text}, not empty; other keys may stand beside them."""

    def is_message(message) -> bool:
        return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))

    return isinstance(messages, list) and bool(messages) and all(map(is_message, messages))


def as_record(dialogue: Dialogue | Preference) -> dict:
    """The line of JSON that is parsed into this dialogue, or preference, again."""
    if isinstance(dialogue, Preference):
        record = {"chosen": dialogue.chosen.messages, "rejected": dialogue.rejected.messages}
        return record | ({"tools": dialogue.chosen.tools} if dialogue.chosen.tools else {})
    return {"messages": dialogue.messages} | ({"tools": dialogue.tools} if dialogue.tools else {})


def texts(dialogue: Dialogue) -> list[str]:
    """Everything that people wrote and a chat template may write, but the roles."""
    return [message["content"] for message in dialogue.messages] + other_texts(dialogue)


def other_texts(dialogue: Dialogue) -> list[str]:
    """Those of the `texts` that are no content: reasoning, names, and the keys and texts in tool calls and tools."""
    return [
        text
        for message in [*dialogue.messages, {"tools": dialogue.tools}]
        if len(message) != 2  # of ordinary ones nothing is looked at
        for field, value in message.items()
        if field not in ("role", "content")
        for text in texts_in(value)
    ]


def map_texts(dialogue: Dialogue, prose: Callable[[str], str], data: Callable[[str], str]) -> Dialogue:
    """The dialogue with every one of its `texts` changed: by `data` in tool calls and tools, by `prose` elsewhere.

    Raises:
      Rejected: two keys of an object have become one.
    """

    def changed(value):
        if isinstance(value, str):
            return data(value)
        if isinstance(value, list):
            return [changed(item) for item in value]
        if isinstance(value, dict):
            result = {data(key): changed(item) for key, item in value.items()}
            if len(result) < len(value):
                raise Rejected("unsupported_field", f"keys that cleaning makes the same ({', '.join(value):.60})")
            return result
        return value

    messages = [{**message, "content": prose(message["content"])} for message in dialogue.messages]
    for message in messages:
        if len(message) > 2:
            for field, value in message.items():
                if field not in ("role", "content"):
                    message[field] = prose(value) if isinstance(value, str) else changed(value)
    return Dialogue(messages, changed(dialogue.tools))
