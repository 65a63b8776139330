"""Writing a page or an image where only one of the same kind may be replaced."""

from pathlib import Path

from mateconv_jax import files
from mateconv_jax.errors import UserError


def check_ours(path: Path, marks: tuple[str, ...], what: str) -> None:
    """Raises UserError unless `path` is free, or its beginning holds one of the marks of what we write there, `what`."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        start = file.read(1000)
    if not any(mark.encode() in start for mark in marks):
        raise UserError(f"--output: {str(path)!r} is not a {what} and is not replaced (choose another file)")


def write(path: Path, content: bytes) -> None:
    """Write a file atomically, and its folder where there is none.

    Raises:
      UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.aside(path) as written:
            written.write_bytes(content)
    except OSError as error:
        raise UserError(
            f"--output: cannot write {str(path)!r} ({error.strerror}; expected a path that a file can be written to)"
        ) from error
