"""What a model writes, made safe for a terminal."""

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
