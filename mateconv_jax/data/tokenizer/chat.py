"""Dialogues as token ids, through a tokenizer's chat template."""

import bisect
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from mateconv_jax.data.dialogue import LEARN, Dialogue
from mateconv_jax.data.tokenizer import written
from mateconv_jax.data.tokenizer.chat_template import ChatTemplate, DialogueRenderer, TemplateRefuses
from mateconv_jax.data.tokenizer.learned import AnswerFinder
from mateconv_jax.errors import UserError

__all__ = ["CHAT_TEMPLATE", "ChatEncoder", "EncodedDialogue", "TemplateRefuses", "encode_chat"]

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\\n' + message['content'] + '</s>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
)


class EncodedDialogue(NamedTuple):
    """A dialogue's tokens. `learned[i]` says whether `ids[i]` is learned as a target."""

    ids: list[int]
    learned: list[bool]


class ChatEncoder:
    """Encodes dialogues for training with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, learn: str = "assistant"):
        """
        Args:
          learn: what the "assistant" says in every turn, in the "last" one, or "everything".

        Raises:
          UserError: the tokenizer has no chat template.
        """
        if learn not in LEARN:
            raise UserError(f"learn: {learn!r} is invalid (expected {' or '.join(LEARN)})")
        self._template = _template(tokenizer)
        self._answers = AnswerFinder(self._template)
        self._learn = learn

    def encode(self, dialogue: Dialogue, n_prompt: int = 0) -> EncodedDialogue:
        """Token ids as transformers' `apply_chat_template` gives them, and which of them are learned.

        Learned is what the assistant has to write in its turns: all behind the generation prompt, up to and with the end
        token. A token is learned if any of its characters is. Control tokens (added tokens that are special) that a text
        of the dialogue spells out, in whatever field, are plain characters.

        Args:
          n_prompt: of the first messages nothing is learned.

        Raises:
          TemplateRefuses: the template raises an error, leaves out a role or a field, or writes in a way from which
            where answers begin and end cannot be told.
        """
        messages, tools = dialogue.messages, dialogue.tools or None
        renderer = DialogueRenderer(self._template, messages, tools)
        rendering = renderer.whole()
        written.check(renderer, rendering, messages, tools)
        if not rendering.text.strip():
            raise TemplateRefuses("chat_template", "the chat template writes nothing for these messages")
        ids, offsets = renderer.token_ids(rendering.text)
        if self._learn == "everything":
            return EncodedDialogue(ids, len(ids) * [True])
        turns = self._answers.turns(renderer, rendering, messages, tools is not None)
        turns = turns[sum(message["role"] == "assistant" for message in messages[:n_prompt]) :]
        spans = [span for turn in (turns if self._learn == "assistant" else turns[-1:]) for span in turn]
        return EncodedDialogue(ids, _tokens_within(spans, offsets))


def encode_chat(
    tokenizer: PreTrainedTokenizerFast,
    messages: list[dict],
    add_generation_prompt: bool,
    tools: list[dict] | None = None,
    complete: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """A dialogue as a prompt: token ids as transformers' `apply_chat_template` gives them.

    Control tokens that a text of the dialogue spells out are plain characters.

    Args:
      messages: [{"role": …, "content": …}, …].
      add_generation_prompt: end with the header of an assistant's answer.
      complete: refuse what the template leaves out: roles, tools, calls.
      variables: the template's own, such as Qwen3's enable_thinking.

    Raises:
      UserError: the tokenizer has no chat template, or it does not take these messages or variables.
    """
    renderer = DialogueRenderer(_template(tokenizer, variables), messages, tools)
    rendering = renderer.whole(add_generation_prompt)
    if complete:
        written.check(renderer, rendering, messages, tools)
    ids, _ = renderer.token_ids(rendering.text)
    return ids


def _template(tokenizer: PreTrainedTokenizerFast, variables: Mapping[str, Any] | None = None) -> ChatTemplate:
    if not tokenizer.chat_template:
        raise UserError("chat: this tokenizer has no chat template (expected one in tokenizer_config.json)")
    return ChatTemplate(tokenizer, variables)


def _tokens_within(spans: list[tuple[int, int]], offsets: list[tuple[int, int]]) -> list[bool]:
    """Which tokens hold a character of a span.

    Some tokenizers leave white space out of a token's offsets: it belongs to the token behind it. A token of no characters,
    as SentencePiece's prefix, belongs to the character behind it.
    """
    start_of, end_of = operator.itemgetter(0), operator.itemgetter(1)
    learned = [False] * len(offsets)
    for start, end in spans:
        first = bisect.bisect_right(offsets, start, key=end_of)
        while first and offsets[first - 1] == (start, start):
            first -= 1
        last = min(bisect.bisect_left(offsets, end, key=end_of) + 1, len(offsets))
        after = max(first, last, bisect.bisect_left(offsets, end, key=start_of))
        learned[first:after] = [True] * (after - first)
    return learned
