"""Documents out of JSONL files."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

# Plain text, or a dialogue: [{"role": "user" | "assistant" | "system", "content": text}, …]
Document = str | list[dict[str, str]]


def read_documents(
    paths: Iterable[Path], text_key: str, on_line: Callable[[int], None], on_reject: Callable[[Path, int, str], None]
) -> Iterator[Document]:
    """Every usable document of the files, in order. A line holds {text_key: text} or {"messages": [{role, content}, …]}.

    Args:
      paths: JSONL files in UTF-8.
      text_key: the key that holds a plain text.
      on_line: called with the bytes of each line, for a progress bar.
      on_reject: called with file, line number (from 1) and reason for each line that is skipped; nothing else stops.
    """
    for path in paths:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                on_line(len(line))
                try:
                    yield parse_line(line, text_key)
                except ValueError as error:
                    on_reject(path, number, str(error))


def parse_line(line: bytes, text_key: str) -> Document:
    """One JSONL line as a document.

    Raises:
      ValueError: what is wrong with the line, in words.
    """
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start})") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"not a JSON object but {type(record).__name__}")
    if "messages" in record:
        messages = record["messages"]
        if not (isinstance(messages, list) and messages and all(_is_message(message) for message in messages)):
            raise ValueError('"messages" is not a list of {"role": text, "content": text}')
        return [{"role": _text(message["role"]), "content": _text(message["content"])} for message in messages]
    if text_key not in record:
        raise ValueError(f"no key {text_key!r} (there are: {', '.join(map(repr, record)) or 'none'})")
    text = record[text_key]
    if not isinstance(text, str):
        raise ValueError(f"{text_key!r} is not text but {type(text).__name__}")
    if not text.strip():
        raise ValueError("empty text")
    return _text(text)


def _is_message(message) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _text(text: str) -> str:
    """JSON can spell half a character (a lone surrogate), which no UTF-8 text can hold."""
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("lone surrogate")
    return text
