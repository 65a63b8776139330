"""What a model or a file says, made safe for a terminal."""

import re
import sys

# C0 and C1 control characters and DEL, but line break and tab.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def visible(text: str) -> str:
    """`text`, escaped where standard output is a terminal. Files and pipes get it as it is."""
    return escaped(text) if sys.stdout.isatty() else text


def escaped(text: str) -> str:
    """`text` with control characters as escapes such as \\x1b: they could move a terminal's cursor, set its title or write into
    its input. Line breaks and tabs stay.
    """
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def escaped_json(text: str) -> str:
    """JSON that says the same without control characters; `json.dumps` itself leaves U+007F to U+009F as they are."""
    return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
