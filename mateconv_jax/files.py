"""Files that are whole or not there."""

from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """UTF-8, written aside and renamed."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(text, encoding="utf-8")
    aside.rename(path)
