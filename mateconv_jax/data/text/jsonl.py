"""One record of an input as a document, or the rule that it breaks."""

import orjson

from mateconv_jax.data.text.dialogue import Dialogue

Document = str | Dialogue

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Rejected(ValueError):
    """A record that cannot be used: the rule that it breaks, as statistics count it, and the reason in words."""

    def __init__(self, rule: str, reason: str):
        super().__init__(reason)
        self.rule = rule


def parse_line(line: bytes, text_key: str) -> Document:
    """One JSONL line as a document.

    A line holds {text_key: text}, or a dialogue in one of the common shapes: {"messages": [{role, content}, …]},
    {"prompt", "response"} or {"instruction", "input", "output"} (the input may be missing or empty).

    Raises:
      Rejected: what is wrong with the line.
    """
    try:
        record = orjson.loads(line.removeprefix(BYTE_ORDER_MARK))
    except orjson.JSONDecodeError as error:
        parse_text(line)
        rule = "lone_surrogate" if "surrogate" in str(error) else "invalid_json"
        raise Rejected(rule, f"not JSON ({error})") from error
    if not isinstance(record, dict):
        raise Rejected("not_an_object", f"not a JSON object but {type(record).__name__}")
    if "messages" in record:
        messages = record["messages"]
        if not is_dialogue(messages):
            raise Rejected("no_text", '"messages" is not a list of {"role": text, "content": text}')
        return Dialogue([{"role": message["role"], "content": message["content"]} for message in messages])
    if text_key in record:
        return _text(record, text_key)
    if "prompt" in record and "response" in record:
        return _exchange(_text(record, "prompt"), _text(record, "response"))
    if "instruction" in record and "output" in record:
        more = record.get("input") or ""
        question = _text(record, "instruction") + ("\n" + _text(record, "input") if more else "")
        return _exchange(question, _text(record, "output"))
    keys = ", ".join(map(repr, list(record)[:8])) or "none"
    raise Rejected("no_text", f"no key {text_key!r} (there are: {keys})")


def parse_text(record: bytes) -> str:
    """A record of a text file.

    Raises:
      Rejected: it is not UTF-8.
    """
    try:
        return record.removeprefix(BYTE_ORDER_MARK).decode()
    except UnicodeDecodeError as error:
        raise Rejected("invalid_utf8", f"not UTF-8 ({error.reason} at byte {error.start})") from error


def _exchange(question: str, answer: str) -> Document:
    return Dialogue([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def _text(record: dict, key: str) -> str:
    text = record[key]
    if not isinstance(text, str):
        raise Rejected("no_text", f"{key!r} is not text but {type(text).__name__}")
    if not text.strip():
        raise Rejected("empty", f"{key!r} is empty")
    return text


def is_dialogue(messages) -> bool:
    """Whether it is a list of {"role": text, "content": text}, not empty; other keys may stand beside them."""

    def is_message(message) -> bool:
        return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))

    return isinstance(messages, list) and bool(messages) and all(map(is_message, messages))
