"""From token ids to text, piece by piece."""

from transformers import PreTrainedTokenizerFast


def decode(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """Their text; control tokens have none, and bytes that are no UTF-8 become U+FFFD."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)  # several lists of ids would give several
    return text


class Detokenizer:
    """Takes an answer's tokens one by one and gives its text in pieces, which joined are the text of all of them.

    Bytes of a character are held until it is whole, and what could be the beginning of a stop text until it is none. The
    answer ends before the stop text that is complete first (the longest, where several are), wherever tokens have their
    borders.

    n_tokens: how many of the tokens belong to the answer. stopped: a stop text came; later tokens give nothing.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: tuple[str, ...] = ()):
        self._tokenizer, self._stop = tokenizer, stop
        self._ids: list[int] = []  # since the piece before the last: a tokenizer may write a token by what stands before it
        self._n_written = 0  # of them: those whose text is out
        self._held = ""
        self.n_tokens = 0
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that the token completes; often empty."""
        if self.stopped:
            return ""
        self.n_tokens += 1
        self._ids.append(token)
        text = decode(self._tokenizer, self._ids)
        if text.endswith("\ufffd"):  # inside of a character, as a rule
            return ""
        return self._release(text)

    def finish(self) -> str:
        """What was held."""
        if self.stopped:
            return ""
        piece = self._release(decode(self._tokenizer, self._ids))
        if self.stopped:
            return piece
        rest, self._held = self._held, ""
        return piece + rest

    def _release(self, text: str) -> str:
        new = text[len(decode(self._tokenizer, self._ids[: self._n_written])) :]
        self._ids = self._ids[self._n_written :]
        self._n_written = len(self._ids)
        self._held += new
        found = [(self._held.index(stop) + len(stop), -len(stop)) for stop in self._stop if stop in self._held]
        if found:
            end, minus_length = min(found)
            self.stopped = True
            return self._held[: end + minus_length]
        n_safe = len(self._held) - max((self._overlap(stop) for stop in self._stop), default=0)
        piece, self._held = self._held[:n_safe], self._held[n_safe:]
        return piece

    def _overlap(self, stop: str) -> int:
        """How many characters at the end of what is held could begin `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
