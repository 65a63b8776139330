"""Encode dialogues into at most one row each."""

import array
import dataclasses
import functools
import gc
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mateconv_jax.data.build.options import PrepareOptions
from mateconv_jax.data.dialogue import Dialogue, Preference
from mateconv_jax.data.text.rejected import Rejected
from mateconv_jax.errors import UserError


class RowDialogue(NamedTuple):
    """A dialogue's tokens.

    Attributes:
      ids: (n,) uint32.
      learned: (n,) bool, which tokens contribute to the loss as targets.
      n_dropped: number of oldest turns left out.
    """

    ids: np.ndarray
    learned: np.ndarray
    n_dropped: int = 0


class RowPair(NamedTuple):
    """The tokens of a preference's two dialogues, of which only the answers are learned."""

    chosen: RowDialogue
    rejected: RowDialogue


class RowDialogues:
    """Encodes dialogues. The tokenizer is loaded with the first dialogue, because importing transformers takes 2 s."""

    def __init__(self, tokenizer_folder: Path, options: PrepareOptions):
        self._tokenizer_folder = tokenizer_folder
        self._options = options
        self._encoder = None

    @functools.cached_property
    def _tokenizer(self):  # without a chat template every dialogue is refused, but the tokenizer is loaded once
        from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib

        return tokenizer_lib.load(self._tokenizer_folder, "--tokenizer")

    def encode(self, dialogue: Dialogue) -> RowDialogue:
        """The dialogue's tokens. A dialogue longer than a row loses its oldest turns, or is rejected if too_long_dialogue is
        "drop". With options.learn "everything" it keeps its length and is cut like a text later.

        Raises:
          Rejected: the chat template refuses it, it has no token to learn, or even its last turn does not fit a row.
        """
        encoded = self._encode(dialogue)
        most = self._options.seq_len + 1
        if self._options.learn == "everything":
            return encoded
        if len(encoded.ids) > most:
            encoded = self._shortened(dialogue, most, len(encoded.ids))
        if not encoded.learned[1:].any():
            raise Rejected("nothing_to_learn", "no turn of the assistant")
        return encoded

    def encode_pair(self, preference: Preference) -> RowPair:
        """The tokens of both dialogues, each at most a row: a prompt that lost its beginning would be another prompt.

        Raises:
          Rejected: the chat template refuses a dialogue, or it is too long for a row; or options.learn says "everything".
        """
        if self._options.learn == "everything":
            raise Rejected("learn_everything", "of a preference only the answers can be learned (expected --learn assistant)")
        pair = RowPair(*(self._encode(dialogue, preference.n_prompt) for dialogue in (preference.chosen, preference.rejected)))
        longest, most = max(len(encoded.ids) for encoded in pair), self._options.seq_len + 1
        if longest > most:
            raise Rejected("too_long_pair", f"{longest} tokens in the longer dialogue (a row holds {most} of each)")
        if not all(encoded.learned[1:].any() for encoded in pair):
            raise Rejected("nothing_to_learn", "an answer has no token")
        return pair

    def _encode(self, dialogue: Dialogue, n_prompt: int = 0) -> RowDialogue:
        from mateconv_jax.data.tokenizer.chat import ChatEncoder, TemplateRefuses

        if self._encoder is None:
            tokenizer = self._tokenizer
            try:
                self._encoder = ChatEncoder(tokenizer, self._options.learn)
            except UserError as error:  # no chat template
                raise Rejected("chat_template", str(error).removeprefix("chat: ")) from error
            gc.freeze()  # what was imported for it would be searched for garbage every few dialogues, a sixth of the time
        try:
            ids, learned = self._encoder.encode(dialogue, n_prompt)
        except TemplateRefuses as error:
            raise Rejected(error.rule, error.reason) from error
        return RowDialogue(np.frombuffer(array.array("I", ids), np.uint32), np.frombuffer(bytes(learned), bool))

    def _shortened(self, dialogue: Dialogue, most: int, length: int) -> RowDialogue:
        if self._options.too_long_dialogue == "drop":
            raise Rejected("too_long_dialogue", f"{length} tokens (a row holds {most})")
        head, turns = split_turns(dialogue.messages)

        def without(n: int) -> RowDialogue:
            messages = head + [message for turn in turns[n:] for message in turn]
            return self._encode(dataclasses.replace(dialogue, messages=messages))._replace(n_dropped=n)

        shortest = without(len(turns) - 1) if turns else None
        if shortest is None or len(shortest.ids) > most:
            n_tokens = length if shortest is None else len(shortest.ids)
            raise Rejected("too_long_dialogue", f"{n_tokens} tokens in the last turn alone (a row holds {most})")
        too_few, enough, fitting = 0, len(turns) - 1, shortest  # numbers of turns to leave out
        while enough - too_few > 1:
            middle = (too_few + enough) // 2
            if len((encoded := without(middle)).ids) <= most:
                enough, fitting = middle, encoded
            else:
                too_few = middle
        return fitting


def split_turns(messages: list[dict]) -> tuple[list[dict], list[list[dict]]]:
    """(leading system messages, turns). A turn is a user message with everything up to the next user message."""
    n_head = next((i for i, message in enumerate(messages) if message["role"] not in ("system", "developer")), len(messages))
    turns: list[list[dict]] = []
    for message in messages[n_head:]:
        if not turns or message["role"] == "user" and turns[-1][-1]["role"] != "user":
            turns.append([])
        turns[-1].append(message)
    return messages[:n_head], turns
