"""Cleaning rules, one option each: what is fixed, what is split and which documents are rejected."""

import dataclasses
import functools
import itertools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Literal

from mateconv_jax.data.dialogue import Dialogue, Preference
from mateconv_jax.data.text import preference_schemas
from mateconv_jax.data.text.dialogue import map_texts, texts
from mateconv_jax.data.text.jsonl import Document
from mateconv_jax.data.text.rejected import Rejected
from mateconv_jax.errors import check_values

CHOICES = {  # values of the rules that take a word
    "unicode": ("nfc", "nfkc", "keep"),
    "control_characters": ("remove", "reject", "keep"),
    "whitespace": ("normalize", "keep"),
    "too_long": ("split", "drop"),
}


@dataclasses.dataclass(frozen=True)
class CleaningOptions:
    """Every rule with its default.

    Attributes:
      unicode: nfc, nfkc (also folds full-width letters and the like) or keep.
      control_characters: remove, reject (the document) or keep. Tab and line feed are not control characters here.
      strip_control_tokens: remove control tokens and chat template headers that the text spells out.
      whitespace: normalize (line feeds only, no trailing spaces, no space around the text, at most one empty line in a row) or
        keep.
      min_chars, max_chars: document length. too_long says whether a longer text is split or dropped; a longer dialogue is
        always dropped.
      max_repetition: largest share of repeated text, see `repetition`; None: no limit.
      min_han_ratio: smallest share of Chinese characters, see `han_ratio`; None: no limit.

    Raises:
      UserError: a value is out of range.
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


# C0 and C1 except tab, line feed and carriage return; the byte order mark; noncharacters.
_CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")
_UNTIDY = re.compile(r"\r|[^\S\n]\n|\n\n\n")
_HAN = re.compile("[\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]")
_REPEATED_LENGTH = 10  # characters per n-gram

# A long document is cut after the last sentence end that fits, else after the last clause end.
_SENTENCE_END = re.compile(r"""[。！？!?…；;\n]+[”’」』）)"']*|\.\s""")
_CLAUSE_END = re.compile(r"[，、,：:\s]")


# Between which the documents of pretraining corpora stand that a tokenizer without these tokens may be trained on, too:
# MiniMind's pretrain_hq.jsonl has lines of "<|im_start|>…<|im_end|> <|im_start|>…<|im_end|>".
DOCUMENT_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_ROLE_LINE = "(?:(?:system|user|assistant)\n)?"


def split_at_tokens(text: str, tokens: Sequence[str]) -> list[str]:
    """The texts between control tokens, without these, a role behind one of them, and white space around; not empty ones."""
    pieces = _token_pattern(tuple(tokens)).split(text)
    return [piece for piece in map(str.strip, pieces) if piece]


@functools.lru_cache(8)
def _token_pattern(tokens: tuple[str, ...]) -> re.Pattern:
    return re.compile(f"(?:{'|'.join(map(re.escape, sorted(tokens, key=len)[::-1]))}){_ROLE_LINE}")


def control_token_pattern(special_tokens: Iterable[str]) -> re.Pattern:
    """Matches control tokens spelt out in a text, and chat template headers (`<s>user` and its line feed)."""
    return re.compile("|".join(["<s>(?:user|assistant|system)\n?", *map(re.escape, sorted(special_tokens, key=len)[::-1])]))


class Cleaner:
    """Applies the rules to documents. `control_tokens` is only used with strip_control_tokens."""

    def __init__(self, options: CleaningOptions, control_tokens: re.Pattern):
        self.options = options
        self.control_tokens = control_tokens

    def clean(self, document: Document) -> tuple[Document, set[str]]:
        """The cleaned document, and the names of the rules that changed it.

        Raises:
          Rejected: a rule rejects the document. A long text with too_long "split" is not rejected, see `pieces`.
        """
        changed: set[str] = set()
        if isinstance(document, str):
            document = text = self._mend(document, changed)
        elif isinstance(document, Dialogue):
            document = self._mend_dialogue(document, changed)
            text = "\n".join(texts(document))
        else:
            chosen, rejected = (self._mend_dialogue(dialogue, changed) for dialogue in (document.chosen, document.rejected))
            document = Preference(chosen, rejected)
            preference_schemas.check(document)
            text = "\n".join(texts(chosen) + texts(rejected))
        self._check(text, splittable=isinstance(document, str))
        return document, changed

    def _mend_dialogue(self, dialogue: Dialogue, changed: set[str]) -> Dialogue:
        return map_texts(
            dialogue,
            prose=lambda text: self._mend(text, changed),
            data=lambda text: self._mend(text, changed, whitespace=False),  # a separator " " must not become an empty one
        )

    def pieces(self, document: Document) -> Sequence[Document]:
        """The document, or, if it is longer than max_chars, pieces that concatenate to it."""
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
        if options.unicode != "keep":  # last: removals may have brought combining characters together
            form = "NFKC" if options.unicode == "nfkc" else "NFC"
            ordered = _in_canonical_order(text, form)
            normal = ordered if unicodedata.is_normalized(form, ordered) else unicodedata.normalize(form, ordered)
            text = apply("unicode", normal)
        if options.whitespace == "normalize" and whitespace:
            tidy = text
            if _UNTIDY.search(text):  # CRLF, trailing spaces or more than one empty line
                tidy = re.sub(r"\r\n?", "\n", tidy)
                # The lookbehind anchors the match at the start of a run of spaces; without it 80,000 spaces take 45 s.
                tidy = re.sub(r"(?<![^\S\n])[^\S\n]+\n", "\n", tidy)
                tidy = re.sub(r"\n{3,}", "\n\n", tidy)
            text = apply("whitespace", tidy.strip())
        return text

    def _check(self, text: str, splittable: bool) -> None:
        options = self.options
        if not text.strip():
            raise Rejected("empty", "empty after cleaning")
        if len(text) < options.min_chars:
            raise Rejected("too_short", f"{len(text)} characters (at least {options.min_chars})")
        if options.max_chars is not None and len(text) > options.max_chars and not (splittable and options.too_long == "split"):
            raise Rejected("too_long", f"{len(text)} characters (at most {options.max_chars})")
        if options.max_repetition is not None and (share := repetition(text)) > options.max_repetition:
            raise Rejected("repetition", f"{share:.0%} of the text repeats earlier text (at most {options.max_repetition:.0%})")
        if options.min_han_ratio is not None and (share := han_ratio(text)) < options.min_han_ratio:
            raise Rejected("low_han_ratio", f"{share:.0%} Chinese characters (at least {options.min_han_ratio:.0%})")


@functools.cache
def _marks() -> tuple[re.Pattern, re.Pattern]:
    """Patterns of one, and of 32 or more, characters that normalisation may reorder: combining marks and what decomposes to
    them.

    Above the basic plane this is one wide range that includes others, because `re` tests ranges there one by one.
    """
    marks = [chr(i) for i in range(0x300, 0x10000) if unicodedata.combining(unicodedata.normalize("NFKD", chr(i))[0])]
    mark = f"[{''.join(marks)}\U000101fd-\U0001e94a]"
    return re.compile(mark), re.compile(mark + "{32,}")


def _in_canonical_order(text: str, form: Literal["NFC", "NFKC"]) -> str:
    """Sort long runs of combining marks as normalisation would. Python's insertion sort takes 12 s for a run of 40,000."""
    mark, long_run = _marks()
    if text.isascii() or not mark.search(text[::32]):  # every 32nd: 2 ns per character instead of 60
        return text

    def in_order(run: re.Match) -> str:
        decomposed = "".join(unicodedata.normalize("NFKD" if form == "NFKC" else "NFD", mark) for mark in run[0])
        by_class = (sorted(group, key=unicodedata.combining) for _, group in itertools.groupby(decomposed, _is_mark))
        return "".join(itertools.chain.from_iterable(by_class))  # stable, as normalisation is

    return long_run.sub(in_order, text)


def _is_mark(character: str) -> bool:
    return unicodedata.combining(character) > 0


def repetition(text: str) -> float:
    """Share of the text's overlapping 10-character n-grams that occurred earlier in it."""
    n = len(text) - _REPEATED_LENGTH + 1
    if n < 1:
        return 0.0
    return 1 - len({text[i : i + _REPEATED_LENGTH] for i in range(n)}) / n


def han_ratio(text: str) -> float:
    """Share of Chinese characters among all non-whitespace characters."""
    return len(_HAN.findall(text)) / max(1, len("".join(text.split())))


def split_at_sentences(text: str, max_chars: int) -> list[str]:
    """Pieces of at most max_chars characters that concatenate to `text`. Cuts after the last sentence end that fits, else after
    the last clause end, else at max_chars.
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
