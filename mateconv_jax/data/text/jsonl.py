"""One record of an input as a document, or the rule that it breaks."""

from codecs import BOM_UTF8
from collections.abc import Set

import orjson

from mateconv_jax.data.dialogue import Dialogue, Preference
from mateconv_jax.data.text import dialogue_schemas, preference_schemas
from mateconv_jax.data.text.dialogue_schemas import text_of
from mateconv_jax.data.text.rejected import Rejected

Document = str | Dialogue | Preference

NOTHING = frozenset()


def parse_line(line: bytes, text_key: str, ignore_fields: tuple[str, ...] = ()) -> tuple[Document, str, Set[str]]:
    """One JSONL line as a document.

    A line with "messages" or "conversations" is a dialogue; otherwise one with `text_key` is text; otherwise one with two
    answers is a preference; otherwise it is a dialogue in the first of `dialogue_schemas.SCHEMAS` whose keys it has. Other keys
    of the line are metadata.

    Args:
      ignore_fields: dropped from the line, its messages and their parts before anything else.

    Returns:
      The document; "text", or the name of its schema; those of ignore_fields that it had.

    Raises:
      Rejected: what is wrong with the line.
    """
    try:
        record = orjson.loads(line.removeprefix(BOM_UTF8))
    except orjson.JSONDecodeError as error:
        parse_text(line)
        rule = "lone_surrogate" if "surrogate" in str(error) else "invalid_json"
        raise Rejected(rule, f"not JSON ({error})") from error
    if not isinstance(record, dict):
        raise Rejected("not_an_object", f"not a JSON object but {type(record).__name__}")
    dropped = dialogue_schemas.drop_fields(record, ignore_fields) if ignore_fields else NOTHING
    is_chat = "messages" in record and record["messages"] is not None
    if not is_chat and ("conversations" not in record or record["conversations"] is None) and record.get(text_key) is not None:
        return text_of(record, text_key), "text", dropped
    is_chat = is_chat or record.get("conversations") is not None
    if found := (None if is_chat else preference_schemas.parse(record)) or dialogue_schemas.parse(record):
        schema, document = found
        return document, schema, dropped
    keys = ", ".join(f"{key[:40]!r}" + " (null)" * (record[key] is None) for key in list(record)[:8]) or "none"
    raise Rejected("no_text", f"no key {text_key!r} or those of a dialogue (there are: {keys})")


def parse_text(record: bytes) -> str:
    """A record of a text file.

    Raises:
      Rejected: it is not UTF-8.
    """
    try:
        return record.removeprefix(BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise Rejected("invalid_utf8", f"not UTF-8 ({error.reason} at byte {error.start})") from error
