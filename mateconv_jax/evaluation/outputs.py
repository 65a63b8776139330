"""Files that `evaluate` writes. It replaces only those that it wrote itself."""

from pathlib import Path

from mateconv_jax import files
from mateconv_jax.errors import UserError

MADE_BY = "mateconv_jax evaluate"  # in the metadata of images


def check(path: Path | None, flag: str, suffix: str, mark: str) -> None:
    """Raises UserError where the file cannot be what the flag asks for, or is there and not ours: its first 1,000 bytes lack
    `mark`. To be called before anything that takes long.
    """
    if path is None:
        return
    if path.suffix != suffix:
        raise UserError(f"{flag}: {str(path)!r} is invalid (expected a name that ends in {suffix})")
    if path.is_dir():
        raise UserError(f"{flag}: {str(path)!r} is a folder")
    if path.exists():
        with path.open("rb") as file:
            start = file.read(1000)
        if mark.encode() not in start:
            raise UserError(f"{flag}: {str(path)!r} was not written by evaluate and is not replaced (choose another file)")


def write(path: Path, content: bytes) -> None:
    """Atomically; parent folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.aside(path) as written:
        written.write_bytes(content)
