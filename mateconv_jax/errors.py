"""User errors: one line on standard error and exit code 2, no traceback."""

import io
import os
import select
import sys
from pathlib import Path

from mateconv_jax.terminal import escaped


class UserError(Exception):
    """Invalid input. The message names the key, file or line, the value, and what was expected."""


def check_values(instance, checks: list[tuple[str, bool, str]]) -> None:
    """Raises UserError for the first (attribute, is valid, what was expected) that is not valid."""
    for name, is_valid, expected in checks:
        if not is_valid:
            raise UserError(f"{name}: {getattr(instance, name)!r} is invalid (expected {expected})")


def check_name(path: str | os.PathLike, key: str) -> None:
    """Raises UserError where a path, whole, is not UTF-8: tokenizers, Orbax and ArrayRecord cannot open it."""
    whole = os.path.abspath(path)
    try:
        whole.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{key}: {whole!r} is not a UTF-8 name (choose another one)") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or its host had no more memory. Orbax passes jax's message on in errors of other types."""
    text = str(error)  # TensorStore says RESOURCE_EXHAUSTED of a full disk, too
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text and "os_error_code" not in text


def exit_code(command, *args) -> int:
    """Run `command(*args)` and return its exit code (0 for None). A UserError is printed to standard error and gives 2; Ctrl-C
    gives 130. A reader that closes standard output, as `| head` does, ends the command with 0. A file that cannot be read or
    written, and too little memory, are one line and 2 as well: they are no fault of the program.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # its encoding may lack characters, even of --help
    try:
        code = command(*args) or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        _say(str(error))
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _stdout_is_closed():  # a pipe to a process of ours
            raise
        _drop_output()
        return 0
    except OSError as error:
        if error.errno is None:
            raise
        where = "" if error.filename is None else f"{os.fspath(error.filename)!r}: "
        if error.filename is None and not _can_print():
            _drop_output()
            where = "standard output: "
        _say(f"{where}{error.strerror}")
        return 2
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        _say(f"out of memory{f' ({_first_line(error)})' if str(error) else ''}")
        return 2


def _say(message: str) -> None:
    """Messages quote lines of files, which must not move a terminal's cursor."""
    print(f"error: {escaped(message)}", file=sys.stderr)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")


def _can_print() -> bool:
    """Whether standard output takes another line; not tried on a terminal. A second flush alone would succeed."""
    try:
        print(end="" if sys.stdout.isatty() else "\n", flush=True)
    except OSError:
        return False
    return True


def _drop_output() -> None:
    """Let the flush at exit succeed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _stdout_is_closed() -> bool:
    """Whether standard output is a pipe that nobody reads: an error to Linux, a hang-up to macOS."""
    poll = select.poll()
    poll.register(sys.stdout, select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def program(module: str) -> str:
    """How the command was started, for its usage line: mateconv-NAME or python -m mateconv_jax.MODULE."""
    script = Path(sys.argv[0]).name
    return script if script.startswith("mateconv-") else f"python -m mateconv_jax.{module}"
