"""Cleaning rules, each an option: what is mended, what is split, and which documents are left out."""

import dataclasses
import functools
import itertools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Literal

from mateconv_jax.data.text.dialogue import map_texts, texts
from mateconv_jax.data.text.jsonl import Document
from mateconv_jax.data.text.rejected import Rejected
from mateconv_jax.errors import check_values

CHOICES = {  # of the rules that are words
    "unicode": ("nfc", "nfkc", "keep"),
    "control_characters": ("remove", "reject", "keep"),
    "whitespace": ("normalize", "keep"),
    "too_long": ("split", "drop"),
}


@dataclasses.dataclass(frozen=True)
class CleaningOptions:
    """Every rule with its default.

    unicode: nfc, nfkc (also folds full-width letters and the like) or keep.
    control_characters: remove, reject (the document) or keep; tab and line feed are none.
    strip_control_tokens: remove control tokens, and the chat template's headers, that are written out in the text.
    whitespace: normalize (line feeds alone, no space at the ends of lines and text, at most one empty line) or keep.
    min_chars, max_chars: of a document; a longer one is split or dropped, as too_long says (a dialogue is always dropped).
    max_repetition: share of the text that may repeat itself, see `repetition`; None: any.
    min_han_ratio: share of Chinese characters, see `han_ratio`; None: any.

    Raises:
      UserError: a value out of its range.
    """

    unicode: str = "nfc"
    control_characters: str = "remove"
    strip_control_tokens: bool = False
    whitespace: str = "normalize"
    min_chars: int = 1
    max_chars: int | None = None
    too_long: str = "split"
    max_repetition: float | None = None
    min_han_ratio: float | None = None

    def __post_init__(self):
        words = [(name, getattr(self, name) in choices, " or ".join(choices)) for name, choices in CHOICES.items()]
        shares = [
            (name, getattr(self, name) is None or 0 <= getattr(self, name) <= 1, "a share from 0 to 1")
            for name in ("max_repetition", "min_han_ratio")
        ]
        lengths = [
            ("min_chars", self.min_chars >= 0, "at least 0"),
            ("max_chars", self.max_chars is None or self.max_chars >= max(1, self.min_chars), "at least 1 and min_chars"),
        ]
        check_values(self, words + shares + lengths)


# C0 and C1 without tab, line feed and carriage return; the byte order mark; what is no character.
_CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")
_UNTIDY = re.compile(r"\r|[^\S\n]\n|\n\n\n")
_HAN = re.compile("[\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]")
_REPEATED_LENGTH = 10  # characters of the pieces whose repetition is counted

# A document that is too long is cut behind the last of these that fits: an end of a sentence, else of a clause.
_SENTENCE_END = re.compile(r"""[。！？!?…；;\n]+[”’」』）)"']*|\.\s""")
_CLAUSE_END = re.compile(r"[，、,：:\s]")


def control_token_pattern(special_tokens: Iterable[str]) -> re.Pattern:
    """Control tokens written out in a text, and the chat template's headers (`<s>user` and its line feed)."""
    return re.compile("|".join(["<s>(?:user|assistant|system)\n?", *map(re.escape, sorted(special_tokens, key=len)[::-1])]))


class Cleaner:
    """Applies the rules to documents; `control_tokens` is used with strip_control_tokens only."""

    def __init__(self, options: CleaningOptions, control_tokens: re.Pattern):
        self.options = options
        self.control_tokens = control_tokens

    def clean(self, document: Document) -> tuple[Document, set[str]]:
        """The document mended, and the names of the rules that changed it.

        Raises:
          Rejected: a rule leaves it out. What is too long and to be split is not: see `pieces`.
        """
        changed: set[str] = set()
        if isinstance(document, str):
            document = text = self._mend(document, changed)
        else:
            document = map_texts(
                document,
                prose=lambda text: self._mend(text, changed),
                data=lambda text: self._mend(text, changed, whitespace=False),  # a separator of " " is not an empty one
            )
            text = "\n".join(texts(document))
        self._check(text, splittable=isinstance(document, str))
        return document, changed

    def pieces(self, document: Document) -> Sequence[Document]:
        """The document, or where it is longer than max_chars its pieces, which join to it again."""
        limit = self.options.max_chars
        if limit is None or not isinstance(document, str) or len(document) <= limit:
            return [document]
        return split_at_sentences(document, limit)

    def _mend(self, text: str, changed: set[str], whitespace: bool = True) -> str:
        options = self.options

        def apply(rule: str, mended: str):
            if mended != text:
                changed.add(rule)
            return mended

        if options.control_characters != "keep" and (found := _CONTROL_CHARACTERS.search(text)):
            if options.control_characters == "reject":
                raise Rejected("control_characters", f"control character U+{ord(found[0]):04X} at {found.start()}")
            text = apply("control_characters", _CONTROL_CHARACTERS.sub("", text))
        if options.strip_control_tokens:
            text = apply("control_tokens", self.control_tokens.sub("", text))
        if options.unicode != "keep":  # last: what stood between two characters that combine may be gone now
            form = "NFKC" if options.unicode == "nfkc" else "NFC"
            ordered = _in_canonical_order(text, form)
            normal = ordered if unicodedata.is_normalized(form, ordered) else unicodedata.normalize(form, ordered)
            text = apply("unicode", normal)
        if options.whitespace == "normalize" and whitespace:
            tidy = text
            if _UNTIDY.search(text):  # line feeds alone, none behind spaces, at most one empty line
                tidy = re.sub(r"\r\n?", "\n", tidy)
                # Begun only where a run of spaces begins: from each of its spaces on, 80,000 of them take 45 s.
                tidy = re.sub(r"(?<![^\S\n])[^\S\n]+\n", "\n", tidy)
                tidy = re.sub(r"\n{3,}", "\n\n", tidy)
            text = apply("whitespace", tidy.strip())
        return text

    def _check(self, text: str, splittable: bool) -> None:
        options = self.options
        if not text.strip():
            raise Rejected("empty", "nothing is left after cleaning")
        if len(text) < options.min_chars:
            raise Rejected("too_short", f"{len(text)} characters (at least {options.min_chars})")
        if options.max_chars is not None and len(text) > options.max_chars and not (splittable and options.too_long == "split"):
            raise Rejected("too_long", f"{len(text)} characters (at most {options.max_chars})")
        if options.max_repetition is not None and (share := repetition(text)) > options.max_repetition:
            raise Rejected("repetition", f"{share:.0%} repeats itself (at most {options.max_repetition:.0%})")
        if options.min_han_ratio is not None and (share := han_ratio(text)) < options.min_han_ratio:
            raise Rejected("low_han_ratio", f"{share:.0%} Chinese characters (at least {options.min_han_ratio:.0%})")


@functools.cache
def _marks() -> tuple[re.Pattern, re.Pattern]:
    """One character, and 32 or more, that normalisation may move past each other: combining ones, and what decomposes to some.

    Above the basic plane one range, with others in it: `re` tries such ranges one after the other at every character.
    """
    marks = [chr(i) for i in range(0x300, 0x10000) if unicodedata.combining(unicodedata.normalize("NFKD", chr(i))[0])]
    mark = f"[{''.join(marks)}\U000101fd-\U0001e94a]"
    return re.compile(mark), re.compile(mark + "{32,}")


def _in_canonical_order(text: str, form: Literal["NFC", "NFKC"]) -> str:
    """The text, long runs of combining marks sorted as normalisation does; it sorts by insertion: 40,000 take 12 s."""
    mark, long_run = _marks()
    if text.isascii() or not mark.search(text[::32]):  # 2 ns a character; all of them would take 60
        return text

    def in_order(run: re.Match) -> str:
        decomposed = "".join(unicodedata.normalize("NFKD" if form == "NFKC" else "NFD", mark) for mark in run[0])
        by_class = (sorted(group, key=unicodedata.combining) for _, group in itertools.groupby(decomposed, _is_mark))
        return "".join(itertools.chain.from_iterable(by_class))  # stable, as normalisation is

    return long_run.sub(in_order, text)


def _is_mark(character: str) -> bool:
    return unicodedata.combining(character) > 0


def repetition(text: str) -> float:
    """Share of the text's pieces of 10 characters, one starting at each character, that occurred in it before."""
    n = len(text) - _REPEATED_LENGTH + 1
    if n < 1:
        return 0.0
    return 1 - len({text[i : i + _REPEATED_LENGTH] for i in range(n)}) / n


def han_ratio(text: str) -> float:
    """Share of Chinese characters among all that are not whitespace."""
    return len(_HAN.findall(text)) / max(1, len("".join(text.split())))


def split_at_sentences(text: str, max_chars: int) -> list[str]:
    """Pieces of at most max_chars characters that join to `text`, cut behind the last sentence end that fits; where there is
    none, behind a clause; where there is none either, anywhere.
    """
    pieces, start = [], 0
    while len(text) - start > max_chars:
        window = text[start : start + max_chars]
        end = _last_end(_SENTENCE_END, window) or _last_end(_CLAUSE_END, window) or max_chars
        pieces.append(window[:end])
        start += end
    return [*pieces, text[start:]]


def _last_end(pattern: re.Pattern, text: str) -> int | None:
    end = None
    for found in pattern.finditer(text):
        end = found.end()
    return end
