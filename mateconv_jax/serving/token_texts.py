"""Tokens as OpenAI's log-probabilities show them: as text, and as the bytes of UTF-8 that they write."""

import codecs
import re

from transformers import PreTrainedTokenizerFast

from mateconv_jax.data.tokenizer.pieces import BYTES, is_byte_level
from mateconv_jax.inference import detokenizer
from mateconv_jax.inference.request import TokenLogprob


class TokenTexts:
    """`tokenizer` must not be used by other threads meanwhile."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._tokenizer = tokenizer
        self._is_byte_level = is_byte_level(tokenizer)

    def bytes(self, token: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if self._is_byte_level and piece and all(character in BYTES for character in piece):
            return bytes(BYTES[character] for character in piece)
        text = detokenizer.continuation(self._tokenizer, [token], [token])  # as behind another token: with its space
        if text == "\ufffd" and (byte := re.fullmatch("<0x([0-9A-F]{2})>", str(piece))):
            return bytes.fromhex(byte[1])
        return (text or str(piece)).encode()

    def text(self, token: int) -> str:
        return self.bytes(token).decode(errors="replace")

    def of_chat(self, logprobs: list[TokenLogprob]) -> dict:
        """`logprobs` of a chat completion."""

        def entry(token: int, logprob: float) -> dict:
            return {"token": self.text(token), "logprob": _finite(logprob), "bytes": list(self.bytes(token))}

        return {
            "content": [
                entry(one.token, one.logprob) | {"top_logprobs": [entry(*other) for other in one.top]} for one in logprobs
            ],
            "refusal": None,
        }

    def of_completion(self, logprobs: list[TokenLogprob], written: "Written") -> dict:
        """`logprobs` of a completion; `written` is what its earlier tokens wrote."""
        return {
            "tokens": [self._readable(one.token) for one in logprobs],
            "token_logprobs": [_finite(one.logprob) for one in logprobs],
            "top_logprobs": [{self._readable(token): _finite(value) for token, value in one.top} for one in logprobs],
            "text_offset": [written.add(self.bytes(one.token)) for one in logprobs],
        }

    def _readable(self, token: int) -> str:
        r"""A token's text; "bytes:\xe4" for a part of a character, as OpenAI has it."""
        written = self.bytes(token)
        try:
            return written.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in written)


class Written:
    """How many characters the bytes of an answer's tokens have made so far."""

    def __init__(self):
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._n = 0

    def add(self, more: bytes) -> int:
        """Returns the number before."""
        before = self._n
        self._n += len(self._decoder.decode(more))
        return before


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI gives -9999 for what cannot be."""
    return max(logprob, -9999.0)
