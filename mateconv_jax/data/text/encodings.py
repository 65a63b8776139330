"""Text in other encodings as UTF-8, block by block; and which one a text that is not UTF-8 seems to be in."""

import codecs
import itertools
from collections.abc import Iterator

from mateconv_jax.data.text.lines import Record

UTF8 = "utf-8"
# As browsers do (WHATWG's encoding standard): GB18030 reads whatever these two can say, and more.
_SUPERSETS = {"gb2312": "gb18030", "gbk": "gb18030", "utf-8-sig": UTF8}
# UTF-32's little-endian mark begins with UTF-16's.
_BYTE_ORDER_MARKS = [
    (codecs.BOM_UTF8, UTF8),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
]
# Stands for bytes that cannot be decoded: UTF-8 never has it, so that the record is rejected.
_UNDECODABLE = b"\xff"
_ERRORS = "mateconv_jax.undecodable"
codecs.register_error(_ERRORS, lambda error: ("\udcff", error.end))  # type: ignore[attr-defined]

# The 40 most frequent characters of modern Chinese that are not the same in both scripts, or common to both.
_FREQUENT = set(
    "的一是不了在人有我他这這个個们們中来來上大为為和国國地到以说說时時要就出会會可也你对對生能而子那得于於着著下自之年，。、"
)
_CANDIDATES = ("gb18030", "big5")


def normal_name(encoding: str) -> str | None:
    """The name by which an encoding goes here; None: Python knows none of that name for text."""
    try:
        "".encode(encoding)
        name = codecs.lookup(encoding).name
    except (LookupError, UnicodeError, ValueError):
        return None
    return _SUPERSETS.get(name, name)


def to_utf8(blocks: Iterator[bytes], encoding: str) -> tuple[str, Iterator[bytes]]:
    """What a file is in, which its byte order mark decides where it has one, and its blocks in UTF-8.

    UTF-8 comes as it is, valid or not.
    """
    head = b""
    while len(head) < 4 and (block := next(blocks, None)) is not None:
        head += block
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if head.startswith(mark)), encoding)
    whole = itertools.chain([head], blocks)
    return encoding, whole if encoding == UTF8 else _recoded(whole, encoding)


def _recoded(blocks: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)(_ERRORS)
    for block in blocks:
        yield decoder.decode(block).encode(errors="surrogateescape")
    yield decoder.decode(b"", final=True).encode(errors="surrogateescape")


def rejecting_undecodable(records: Iterator[tuple[int, Record]], encoding: str) -> Iterator[tuple[int, Record]]:
    """Records of `to_utf8`, without those of which a part could not be decoded."""
    for number, record in records:
        yield number, ("invalid_utf8", f"not {encoding}") if _UNDECODABLE in record else record


def likely(text: bytes) -> str | None:
    """The encoding that bytes seem to be in which are not UTF-8, by the frequent characters that they then have."""
    if (zeros := text.count(0)) * 5 > len(text):
        return "utf-16-le" if text[1::2].count(0) * 2 > zeros else "utf-16-be"
    scores = {}
    for name in _CANDIDATES:
        try:
            decoded = codecs.getincrementaldecoder(name)().decode(text)
        except UnicodeDecodeError:
            continue
        scores[name] = sum(character in _FREQUENT for character in decoded)
    return max(scores, key=lambda name: scores[name], default=None)
