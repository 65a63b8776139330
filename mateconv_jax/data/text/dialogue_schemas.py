"""Records in the shapes that dialogues have elsewhere, as messages. A schema is one function that turns a record into messages.

OpenAI's messages, MiniMind's and ShareGPT's conversations, Alpaca, and pairs of a question and an answer.
"""

import ast
import functools
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import orjson

from mateconv_jax.data.dialogue import Dialogue
from mateconv_jax.data.text.rejected import Rejected

CHAT_KEYS = ("messages", "conversations")  # a record that has one of them is a dialogue, whatever else it holds
ROLES = {
    "system": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant", "function_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip
_OTHER_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")  # developer, model, …: the chat template has the last word

# Fields that say something about a message and are no part of what was said. Any other that holds something is a reject: what
# it holds would be lost, or (a training weight of 0) learned against the author's will.
_METADATA = {
    "id", "message_id", "parent_id", "index", "turn", "timestamp", "create_time", "date", "model", "source", "lang", "language",
    "meta", "metadata", "score", "rating",
}  # fmt: skip
_WEIGHTS = ("weight", "loss", "train")  # OpenAI, ms-swift, axolotl: whether a message is learned; 1 is what happens anyway
_TOOLS = ("tools", "functions")  # MiniMind's and OpenAI's older name is functions

_LONGEST_TEXT_OF_A_LIST = 200_000  # characters; Python's parser takes up to 500 bytes of memory for each
_DEEPEST = 64  # levels of lists and objects in a tool; Python gives up at about 1,000


class Schema(NamedTuple):
    """One shape. `messages` turns a record that has all of `keys` into messages, as `Dialogue` has them; one may also hold
    "tools", which become the dialogue's.
    """

    name: str
    keys: tuple[str, ...]
    messages: Callable[[dict], list[dict]]


def parse(record: dict) -> tuple[str, Dialogue] | None:
    """The record's schema, and its dialogue; None where no schema has these keys. A key whose value is null is not there.

    Of the schemas whose keys are there the first in SCHEMAS is taken.

    Raises:
      Rejected: what is wrong, with the number of the message.
    """
    for schema in SCHEMAS:
        if all(record.get(key) is not None for key in schema.keys):
            messages = schema.messages(record)
            if system := system_of(record):
                if messages[0]["role"] == "system" and messages[0]["content"] != system:
                    raise Rejected("unsupported_field", "both 'system' and a first message of the system")
                if messages[0]["role"] != "system":
                    messages.insert(0, {"role": "system", "content": system})
            name = "sharegpt" if schema.keys[0] in CHAT_KEYS and "from" in record[schema.keys[0]][0] else schema.name
            return name, Dialogue(messages, all_tools(record, messages))
    return None


def drop_fields(record: dict, fields: tuple[str, ...]) -> set[str]:
    """Drop fields from a record, its messages and their parts; those of them that held something."""
    dropped = set()

    def drop(holder):
        if isinstance(holder, dict):
            dropped.update(field for field in fields if not _is_empty(holder.pop(field, None)))
            drop(holder.get("content"))
        elif isinstance(holder, list):
            for item in holder:
                if isinstance(item, dict):
                    drop(item)

    drop(record)
    for key in CHAT_KEYS:
        if isinstance(record.get(key), str):
            record[key] = _list_of(record, key)
        drop(record.get(key))
    for key in ("chosen", "rejected", "prompt"):
        drop(record.get(key))
    return dropped


# ---- lists of messages --------------------------------------------------------------------------------------------


def messages_of(record: dict, key: str) -> list[dict]:
    """The messages under this key."""
    record[key] = given = _list_of(record, key)
    if not given:
        raise Rejected("no_text", f"{key!r} is empty")
    if not _is_empty(record.get("history")):
        raise _unsupported(f"'history' beside {key!r}, where it would be lost")
    return [_message(number, message) for number, message in enumerate(given, 1)]


def system_of(record: dict) -> str:
    """What the record's own key says that the system says; empty: it has none."""
    return _optional_text(record, "system")


def _message(number: int, given) -> dict:
    """One message of any chat schema: {"role", "content", …}, or ShareGPT's {"from", "value"}."""
    if not isinstance(given, dict):
        raise Rejected("no_text", f"message {number} is not an object but {_kind(given)}")
    role_field, content_field = ("from", "value") if "from" in given and "role" not in given else ("role", "content")
    said, content = given.get(role_field), given.get(content_field)
    if not isinstance(said, str):
        raise Rejected("no_text", f"message {number}: {role_field!r} is not text but {_kind(said)}")
    if len(given) == 2 and said in ROLES and isinstance(content, str) and said != "function_call":
        return {"role": ROLES[said], "content": content}  # nearly all: twice as fast
    if said not in ROLES and not _OTHER_ROLE.fullmatch(said):
        raise Rejected("unknown_role", f"message {number} has the role {said[:40]!r} (expected {', '.join(ROLES)})")
    role = ROLES.get(said, said)
    fields = {field: value for field, value in given.items() if not _is_empty(value)}
    more = _more_fields(number, role, fields, (role_field, content_field))
    if said == "function_call":
        calls = _function_calls(number, content)
        return {"role": role, "content": "", **more, "tool_calls": calls + more.get("tool_calls", [])}
    if content is None and "tool_calls" in more:
        content = ""  # OpenAI's: the assistant says nothing and calls a function
    return {"role": role, "content": _content(number, content_field, content), **more}


def _more_fields(number: int, role: str, fields: dict, known: tuple[str, ...]) -> dict:
    """The fields of a message but its role and content, as `Dialogue` has them, and its tools."""
    more: dict[str, Any] = {}
    for field, value in fields.items():
        if field in known or field in _METADATA:
            continue
        if field in ("reasoning_content", "tool_calls") and role != "assistant":
            raise Rejected("unsupported_field", f"message {number} of the {role} has {field!r}, which only an assistant's can")
        if field in ("reasoning_content", "tool_call_id", "name"):
            if not isinstance(value, str):
                raise Rejected("no_text", f"message {number}: {field!r} is not text but {_kind(value)}")
            more[field] = value
        elif field == "tool_calls":
            more |= {field: calls} if (calls := _tool_calls(number, value)) else {}
        elif field in _TOOLS and "tools" not in more:
            more["tools"] = _tools(f"message {number}: {field!r}", value)
        elif field in _WEIGHTS:
            if value != 1:
                raise _unsupported(f"message {number} has {field!r}: {str(value)[:20]}, but would be learned")
        else:
            raise _unsupported(f"message {number} has {field[:40]!r}, which would be lost")
    return more


def _unsupported(reason: str) -> Rejected:
    return Rejected("unsupported_field", f"{reason} (--ignore_fields drops it)")


def _content(number: int, field: str, content) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Rejected("no_text", f"message {number}: {field!r} is not text but {_kind(content)}")
    texts = []
    for i, part in enumerate(content, 1):
        what = f"message {number}, part {i} of {field!r}"
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, dict):
            raise Rejected("no_text", f"{what} is not an object but {_kind(part)}")
        if part.get("type") != "text":
            raise Rejected("unsupported_part", f"{what} is of type {str(part.get('type'))[:40]!r} (expected 'text')")
        if not isinstance(part.get("text"), str):
            raise Rejected("no_text", f"{what}: 'text' is not text but {_kind(part.get('text'))}")
        if more := [key for key, value in part.items() if key not in ("type", "text") and not _is_empty(value)]:
            raise _unsupported(f"{what} has {more[0][:40]!r}, which would be lost")
        texts.append(part["text"])
    return "".join(texts)


# ---- tools --------------------------------------------------------------------------------------------------------


def _objects(what: str, value) -> list[dict]:
    """A list of objects, or its text in JSON as MiniMind has it."""
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise Rejected("unsupported_field", f"{what} is text, but not JSON ({error})") from error
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise Rejected("unsupported_field", f"{what} is not a list of objects")
    if _is_deeper(value, _DEEPEST):
        raise Rejected("unsupported_field", f"{what} has more than {_DEEPEST} levels")
    return value


def _is_deeper(value, levels: int) -> bool:
    """Whether lists and objects are nested in more levels than these."""
    if not isinstance(value, list | dict):
        return False
    return not levels or any(_is_deeper(item, levels - 1) for item in (value.values() if isinstance(value, dict) else value))


def _tool_calls(number: int, value) -> list[dict]:
    calls = _objects(f"message {number}: 'tool_calls'", value)
    for i, call in enumerate(calls, 1):
        function = call.get("function", call)  # OpenAI's {"function": {"name", "arguments"}}, or without that level
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Rejected("unsupported_field", f"message {number}: call {i} of 'tool_calls' names no function")
    return calls


def _function_calls(number: int, value) -> list[dict]:
    """ShareGPT's function_call: the text, in JSON, of {"name", "arguments"} or of a list of such."""
    calls = _objects(f"message {number}: the function_call", value)
    for call in calls:
        if not isinstance(call.get("name"), str) or call.keys() - {"name", "arguments"}:
            raise Rejected("unsupported_field", f"message {number}: the function_call is not {{'name', 'arguments'}}")
    if not calls:
        raise Rejected("no_text", f"message {number}: the function_call is empty")
    return [{"type": "function", "function": {"arguments": {}, **call}} for call in calls]


def _tools(what: str, value) -> list[dict] | None:
    return None if _is_empty(value) else _objects(what, value) or None


def all_tools(record: dict, messages: list[dict]) -> list[dict] | None:
    """The tools that stand beside the messages, or in one of them, from which they are taken out."""
    found = [_tools(f"{key!r}", record[key]) for key in _TOOLS if key in record]
    found += [message.pop("tools") for message in messages if "tools" in message]
    found = [tools for tools in found if tools]
    if any(tools != found[0] for tools in found):
        raise Rejected("unsupported_field", "different 'tools' in one dialogue")
    return found[0] if found else None


# ---- questions and answers ----------------------------------------------------------------------------------------


def _pair(question: str, answer: str) -> Callable[[dict], list[dict]]:
    def messages(record: dict) -> list[dict]:
        return [*history_of(record), *_turns(text_of(record, question), text_of(record, answer))]

    return messages


def _alpaca(record: dict) -> list[dict]:
    """The question is the instruction, the input, or both; deepctrl-sft-data has it in the input."""
    parts = [_optional_text(record, key) for key in ("instruction", "input")]
    question = "\n".join(part for part in parts if part.strip())
    if not question:
        raise Rejected("empty", "'instruction' and 'input' are empty")
    return [*history_of(record), *_turns(question, text_of(record, "output"))]


def _turns(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def history_of(record: dict) -> list[dict]:
    """Earlier turns: a list of [question, answer], or the text of that list."""
    messages = []
    for i, pair in enumerate([] if _is_empty(record.get("history")) else _list_of(record, "history"), 1):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise Rejected("bad_history", f"turn {i} of 'history' is not [question, answer]")
        if not all(text.strip() for text in pair):
            raise Rejected("bad_history", f"turn {i} of 'history' has an empty question or answer")
        messages += _turns(*pair)
    return messages


# ---- values -------------------------------------------------------------------------------------------------------


def text_of(record: dict, key: str) -> str:
    """The text under this key. Raises Rejected: it is empty, or no text."""
    text = record[key]
    if not isinstance(text, str):
        raise Rejected("no_text", f"{key!r} is not text but {_kind(text)}")
    if not text.strip():
        raise Rejected("empty", f"{key!r} is empty")
    return text


def _optional_text(record: dict, key: str) -> str:
    text = record.get(key)
    if not isinstance(text, str | None):
        raise Rejected("no_text", f"{key!r} is not text but {_kind(text)}")
    return text or ""


def _list_of(record: dict, key: str) -> list:
    """A list, or the text of one in JSON or Python: data, never evaluated."""
    value = record[key]
    if isinstance(value, str):
        value = _parse_list(key, value)
    if not isinstance(value, list):
        raise Rejected("no_text", f"{key!r} is not a list but {_kind(value)}")
    return value


def _parse_list(key: str, text: str):
    if len(text) > _LONGEST_TEXT_OF_A_LIST:
        raise Rejected("no_text", f"{key!r} is a text of {len(text):,} characters (at most {_LONGEST_TEXT_OF_A_LIST:,})")
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        pass
    try:
        with warnings.catch_warnings(action="ignore"):  # of backslashes that escape nothing, which stay
            value = ast.literal_eval(text.strip())
        orjson.dumps(value)  # refuses what JSON has not: sets, bytes, and half a surrogate pair, which "\ud800" makes in Python
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        reason = " ".join(str(error).split())[:80] or type(error).__name__
        raise Rejected("no_text", f"{key!r} is text, but not that of a list in JSON or Python ({reason})") from error
    return value


def _is_empty(value) -> bool:
    return value is None or value == "" or value == [] or value == {}


def _kind(value) -> str:
    return "null" if value is None else type(value).__name__


SCHEMAS = [
    *(Schema(key, (key,), functools.partial(messages_of, key=key)) for key in CHAT_KEYS),
    *(Schema("/".join(keys), keys, _pair(*keys)) for keys in [("prompt", "response"), ("prompt", "completion")]),
    *(Schema("alpaca", keys, _alpaca) for keys in [("instruction", "output"), ("input", "output")]),
    *(Schema("/".join(keys), keys, _pair(*keys)) for keys in [("q", "a"), ("query", "response"), ("question", "answer")]),
]
KEYS = {"system", "history", "instruction", *_TOOLS, *(key for schema in SCHEMAS for key in schema.keys)}  # all that are read
