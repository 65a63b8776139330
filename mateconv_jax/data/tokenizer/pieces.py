"""Tokens as text."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # its import costs 2 s, and workers of `prepare` import `readable`
    from transformers import PreTrainedTokenizerFast

# GPT-2's: the character that stands for a byte in a byte-level BPE's pieces. Printable bytes stand for themselves.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTES = {chr(byte): byte for byte in _PRINTABLE}
BYTES |= {chr(256 + i): byte for i, byte in enumerate(byte for byte in range(256) if byte not in _PRINTABLE)}


def readable(tokenizer: "PreTrainedTokenizerFast", ids: Iterable[int]) -> list[str]:
    r"""What each token writes.

    In a byte-level vocabulary ä¸ŃåĽ½ reads 中国, and bytes that are only part of a character stay bytes, as in \xe4\xb8. In any
    other it is what the tokenizer makes of the token behind another one.
    """
    return [text for text, _ in read_pieces(tokenizer, ids)]


def is_byte_level(tokenizer: "PreTrainedTokenizerFast") -> bool:
    """Whether pieces are spelt in GPT-2's alphabet for bytes."""
    decoder = tokenizer.backend_tokenizer.decoder
    return decoder is not None and decoder.decode(["ä¸Ń"]) == "中"


def read_pieces(tokenizer: "PreTrainedTokenizerFast", ids: Iterable[int]) -> list[tuple[str, bool]]:
    """(text, whether it is made of whole characters) of each token."""
    byte_level = is_byte_level(tokenizer)
    added = tokenizer.added_tokens_decoder
    before = tokenizer("a", add_special_tokens=False)["input_ids"]
    start = _decode(tokenizer, before)
    result = []
    for token in ids:
        piece = tokenizer.convert_ids_to_tokens(token)
        assert isinstance(piece, str)  # several ids would give several
        if token in added:
            result.append((added[token].content, True))
        elif byte_level and all(character in BYTES for character in piece):
            spelt = bytes(BYTES[character] for character in piece)
            text = spelt.decode("utf-8", "backslashreplace")
            result.append((text, text.encode() == spelt))
        else:
            # Behind another token: a decoder drops the space of the first one.
            together = _decode(tokenizer, [*before, token])
            text = together[len(start) :] if together.startswith(start) else _decode(tokenizer, [token])
            whole = "\ufffd" not in text
            result.append((text if whole and text else piece, whole))
    return result


def _decode(tokenizer: "PreTrainedTokenizerFast", ids: list[int]) -> str:
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)  # several lists of ids would give several
    return text


def visible(text: str) -> str:
    r"""With a mark for each space, and escapes such as \n for what cannot be seen."""
    return "".join(
        "␣" if character == " " else character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )
