"""How a command says that its input is wrong: one line, exit code 2, no traceback."""

import sys
from pathlib import Path


class UserError(Exception):
    """Wrong input. The message names the key, file or line, the value, and what would be right."""


def check_values(instance, checks: list[tuple[str, bool, str]]) -> None:
    """Raises UserError with the first (attribute, holds, what was expected) that does not hold."""
    for name, holds, expected in checks:
        if not holds:
            raise UserError(f"{name}: {getattr(instance, name)!r} is invalid (expected {expected})")


def exit_code(command, *args) -> int:
    """Run `command(*args)`, which returns None or its exit code; a UserError becomes one line on standard error and 2, Ctrl-C
    becomes 130.
    """
    try:
        return command(*args) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def program(module: str) -> str:
    """What was typed to start a command, for its usage line: mateconv-NAME or python -m mateconv_jax.MODULE."""
    typed = Path(sys.argv[0]).name
    return typed if typed.startswith("mateconv-") else f"python -m mateconv_jax.{module}"
