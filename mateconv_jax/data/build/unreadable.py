"""Stop for inputs that would silently vanish, mostly rejected or not readable to their end, and for those that cannot be in one
dataset.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from mateconv_jax.data.build.chunk_reader import InputCounts
from mateconv_jax.errors import UserError

HOPELESS = 1000  # give up on a file after this many records, all unreadable

_MAGIC = [
    ("\x1f\x8b", "it is compressed: give it the suffix .gz"),
    ("BZh", "it is compressed: give it the suffix .bz2"),
    ("\xfd7zXZ", "it is compressed: give it the suffix .xz"),
    ("\x28\xb5\x2f\xfd", "it is compressed: give it the suffix .zst"),
    ("PK\x03\x04", "it is a zip archive: give it the suffix .zip"),
    ("PAR1", "it is a parquet file: give it the suffix .parquet"),
]


class UnreadableInputs:
    """Sums each input's counts over chunks, and raises as soon as an input is known to be unusable.

    Args:
      keep_going: never raise.
      one_document_files: each .txt file is one document. All .txt files are then judged together, because one bad file is
        only one bad document.
    """

    def __init__(self, keep_going: bool, one_document_files: bool):
        self._keep_going = keep_going
        self._one_document_files = one_document_files
        self._found: dict[str, InputCounts] = {}
        self._waiting: Counter[str] = Counter()  # chunks in progress, by input
        self._newest = ""
        self._document = self._pair = ""  # FILE:LINE of the first of each

    def begin(self, paths: Iterable[str]) -> None:
        """A chunk with records of these inputs is in progress. All but the last of them have been read to their end."""
        names = [self._name(path) for path in paths]
        self._waiting.update(names)
        self._newest = names[-1]

    def done(self, inputs: Iterable[InputCounts]) -> None:
        """Count a finished chunk. Raises UserError if an input is known to be mostly rejected or broken."""
        for counts in inputs:
            name = self._name(counts.path)
            found = self._found.setdefault(name, InputCounts(counts.path))
            found.records += counts.records
            found.unreadable += counts.unreadable
            found.broken |= counts.broken
            if counts.first and not found.first:
                found.path, found.first, found.head, found.encoding = counts.path, counts.first, counts.head, counts.encoding
            self._check_together(counts)
            self._waiting[name] -= 1
            if name != self._newest and not self._waiting[name] or found.records == found.unreadable >= HOPELESS:
                self._check(found)

    def finish(self) -> None:
        """Check all inputs, after the last chunk. Raises UserError like `done`."""
        for counts in self._found.values():
            self._check(counts)

    def _check_together(self, counts: InputCounts) -> None:
        """Raises UserError where there are both texts and preferences: rows of one kind cannot be learned as the other."""
        if counts.first_document is not None:
            self._document = self._document or f"{counts.path}:{counts.first_document}"
        if counts.first_pair is not None:
            self._pair = self._pair or f"{counts.path}:{counts.first_pair}"
        if self._document and self._pair:
            raise UserError(
                f"--input: preferences ({self._pair!r}) and texts or dialogues ({self._document!r}) cannot be in one dataset "
                "(prepare each of them alone: the model is trained on one dataset after the other)"
            )

    def _name(self, path: str) -> str:
        return "*.txt" if self._one_document_files and ".txt" in Path(path.lower()).suffixes else path

    def _check(self, counts: InputCounts) -> None:
        if self._keep_going or not counts.broken and 2 * counts.unreadable <= counts.records:
            return
        hint = next((hint for magic, hint in _MAGIC if counts.head.startswith(magic)), "")
        if not hint and counts.encoding:
            hint = f"it looks like {counts.encoding}: --encoding {counts.encoding}"
        elif not hint and "not UTF-8" in counts.first:
            hint = "if it is GB18030: --encoding gb18030"
        what = "could not be read to its end" if counts.broken else "is mostly unusable"
        raise UserError(
            f"--input: {counts.path!r} {what}: {counts.unreadable:,} of {counts.records:,} records rejected, the first at line "
            f"{counts.first}{f' ({hint})' if hint else ''}. Fix it or leave it out (--keep_going uses what is readable)"
        )
