"""Tokens as OpenAI's log-probabilities show them: as text, and as the bytes of UTF-8 that they write."""

from transformers import PreTrainedTokenizerFast

from mateconv_jax.data.tokenizer.pieces import BYTES, is_byte_level
from mateconv_jax.inference import detokenizer
from mateconv_jax.inference.engine import TokenLogprob


class TokenTexts:
    """`tokenizer` must not be used by other threads meanwhile."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._tokenizer = tokenizer
        self._is_byte_level = is_byte_level(tokenizer)

    def bytes(self, token: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if self._is_byte_level and piece and all(character in BYTES for character in piece):
            return bytes(BYTES[character] for character in piece)
        return (detokenizer.decode(self._tokenizer, [token]) or piece or "").encode()

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

    def of_completion(self, logprobs: list[TokenLogprob], offset: int) -> dict:
        """`logprobs` of a completion whose earlier tokens wrote `offset` characters."""
        texts = [self.text(one.token) for one in logprobs]
        offsets = [offset + sum(map(len, texts[:i])) for i in range(len(texts))]
        return {
            "tokens": texts,
            "token_logprobs": [_finite(one.logprob) for one in logprobs],
            "top_logprobs": [{self.text(token): _finite(value) for token, value in one.top} for one in logprobs],
            "text_offset": offsets,
        }


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI gives -9999 for what cannot be."""
    return max(logprob, -9999.0)
