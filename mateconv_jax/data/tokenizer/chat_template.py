"""A dialogue through a tokenizer's chat template, with the knowledge of whose each character is.

A template may do anything with the texts that it is given: trim them, split them at `</think>`, index into them, render
them as JSON. So the texts go in as they are, and what they became is read off a second rendering, in which private
characters stand for theirs (all but those that templates look for: white space, quotes, and what this template compares
texts with). If putting the characters back gives the first rendering, each character's origin is known for certain.
"""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from mateconv_jax.data.tokenizer.stand_ins import STAND_INS, NotAStandIn, Run, StandIns, TooLong
from mateconv_jax.errors import UserError

ROLES = {"system", "developer", "user", "assistant", "tool"}
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")  # where a template says itself what the assistant writes


class TemplateRefuses(UserError):
    """A dialogue that the chat template cannot express. `rule` is a word to count it by, `reason` says it to people."""

    def __init__(self, rule: str, reason: str):
        super().__init__(f"chat: {reason}")
        self.rule = rule
        self.reason = reason


class Rendering(NamedTuple):
    """What the template made of a dialogue.

    Attributes:
      text: with private characters in place of control tokens that the dialogue's texts spell out.
      runs: the stretches that come from the dialogue's texts, in order; owners are (message, field, item). White space,
        quotes, and what the template compares texts with belong to no run. Empty where `is_traced` is false.
    """

    text: str
    runs: list[Run]
    is_traced: bool


class ChatTemplate:
    """The chat template of a tokenizer.

    Attributes:
      control_token: matches a control token, that is an added token that is special.
      control_ids: their ids.
      unsafe: matches a control token or private characters, as its one group.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer
        control = {token: added.content for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        longest_first = sorted(map(re.escape, control.values()), key=len, reverse=True)
        self.control_token = re.compile("|".join(longest_first) or r"(?!)")
        self.control_ids = set(control)
        # The private characters themselves, too: what the dialogue holds of them must not be mistaken for stand-ins.
        self.unsafe = re.compile(f"({self.control_token.pattern}|{STAND_INS.pattern})")

    def write(self, messages: list[dict], tools: list[dict] | None, add_generation_prompt: bool) -> str:
        """transformers' rendering.

        Raises:
          TemplateRefuses: the template raises an error.
        """
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # whatever the template raises
            reason = f"the chat template does not take these messages ({error})"
            raise TemplateRefuses("chat_template", reason) from error
        assert isinstance(text, str)
        return text

    def source(self, tools: list[dict] | None) -> str:
        """The template's text. There may be another one for dialogues with tools."""
        return self.tokenizer.get_chat_template(None, tools)

    def compared(self, tools: list[dict] | None) -> tuple[re.Pattern, frozenset[str]]:
        """What the template may look for in a text: a pattern, and words that it may compare whole texts with."""
        return _compared(self.source(tools), self.control_token)


@functools.lru_cache(32)
def _compared(source: str, control_token: re.Pattern) -> tuple[re.Pattern, frozenset[str]]:
    symbols, words = set(), set(ROLES)
    for constant in _compared_constants(source):
        if re.fullmatch(r"\w+", constant):
            words.add(constant)
        elif not constant.isspace() and not control_token.search(constant):
            symbols.add(constant)
    alternatives = sorted(map(re.escape, symbols), key=len, reverse=True)
    # JSON escapes quotes, backslashes and control characters.
    return re.compile("(" + "|".join([*alternatives, r'[\s"\\\x00-\x1f]+']) + ")"), frozenset(words)


def _compared_constants(source: str) -> Iterator[str]:
    """String constants of a template that stand beside a comparison, or in brackets: 'a' in x, x == 'a', f('a'), ['a']."""
    try:
        tokens = [(kind, text) for _, kind, text in jinja2.Environment().lex(source) if kind != "whitespace"]
    except jinja2.TemplateSyntaxError:
        return  # rendering says so
    comparing = {"==", "!=", "in", "not", "(", ",", "["}
    around = [("", ""), *tokens, ("", "")]
    for (_, before), (kind, text), (_, after) in zip(around, tokens, around[2:], strict=False):
        if kind == "string" and len(text) > 2 and ({before, after} & comparing):
            yield text[1:-1].encode("ascii", "backslashreplace").decode("unicode-escape")


class DialogueRenderer:
    """Renders one dialogue, whole or its beginnings, and tokenizes the result."""

    def __init__(self, template: ChatTemplate, messages: list[dict], tools: list[dict] | None):
        self._template = template
        self._spelt_out = StandIns()  # for control tokens that the dialogue spells out
        self._marks = StandIns()  # for everything else that it says
        self._messages, self._tools = messages, tools
        if any(template.unsafe.search(text) for text in _texts([messages, tools])):
            self._messages, self._tools = _map_texts([messages, tools], self._hide_control_tokens)
        self._marked: tuple[list[dict], list[dict] | None] | None = None

    def whole(self, add_generation_prompt: bool = False) -> Rendering:
        """The whole dialogue.

        Raises:
          TemplateRefuses: the template raises an error.
        """
        text = self._template.write(self._messages, self._tools, add_generation_prompt)
        try:
            self._marked = self._mark()
            marked = self._template.write(*self._marked, add_generation_prompt)
            restored, runs = self._marks.restore(marked)
        except (TooLong, NotAStandIn, TemplateRefuses):
            restored, runs = "", []
        if restored != text:
            self._marked = None
            return Rendering(text, [], is_traced=False)
        control_token = self._template.control_token
        if len(control_token.findall(text)) != len(control_token.findall(marked)):
            text = self._hide_joined_control_tokens(text, runs)
        return Rendering(text, runs, is_traced=True)

    def beginning(self, n_messages: int, add_generation_prompt: bool) -> Rendering:
        """The first messages alone. Stand-ins have the numbers that they have in the whole, which was rendered before.

        Raises:
          TemplateRefuses: the template raises an error.
        """
        if self._marked is None:
            return Rendering(self._template.write(self._messages[:n_messages], self._tools, add_generation_prompt), [], False)
        messages, tools = self._marked
        text, runs = self._marks.restore(self._template.write(messages[:n_messages], tools, add_generation_prompt))
        return Rendering(text, runs, True)

    def without(self, message: int, field: str | None = None) -> str:
        """The text of the dialogue without a message, or without one field of it; without `tools` for message -1.

        Raises:
          TemplateRefuses: the template raises an error.
        """
        if message < 0:
            return self._template.write(self._messages, None, False)
        rest = {key: value for key, value in self._messages[message].items() if key != field}
        between = [rest] if field else []
        return self._template.write([*self._messages[:message], *between, *self._messages[message + 1 :]], self._tools, False)

    def generation_blocks(self) -> list[tuple[int, int]] | None:
        """Characters (start, end) of the whole that stand in {% generation %}, in order; None without such blocks.

        Raises:
          TemplateRefuses: rendered with these blocks the dialogue is another.
        """
        source = self._template.source(self._tools)
        if not GENERATION.search(source):
            return None
        messages = [{key: value for key, value in message.items() if value is not None} for message in self._messages]
        (text,), (blocks,) = render_jinja_template(
            [messages],
            tools=self._tools,
            chat_template=source,
            return_assistant_tokens_mask=True,
            **self._template.tokenizer.special_tokens_map,
        )
        if text != self._template.write(self._messages, self._tools, False):
            raise TemplateRefuses("learned_unclear", "the chat template writes another text with its {% generation %} blocks")
        return blocks

    @property
    def marked_texts(self) -> set[tuple]:
        """(message, field, item) of the texts that have characters by which they can be found in a traced rendering."""
        return self._marks.owners()

    def token_ids(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a rendering's text, and the characters (start, end) of each token.

        Raises:
          TemplateRefuses: the tokenizer makes a control token of plain text.
        """
        ids, offsets = self._encode(text, False)
        spelt_out, runs = self._spelt_out.restore(text) if len(self._spelt_out) else (text, [])
        if not runs:
            return ids, offsets
        control = self._template.control_ids
        found_ids, found_offsets = [], []
        start, first = 0, 0
        for i, token in enumerate([*ids, None]):
            if token is not None and not (token in control and self._template.control_token.search(text[slice(*offsets[i])])):
                continue
            end = len(text) if token is None else offsets[i][0]
            if any(start <= run.start < end for run in runs):
                plain_ids, plain_offsets = self._encode(spelt_out[start:end], True)
                found_ids += plain_ids
                found_offsets += [(a + start, b + start) for a, b in plain_offsets]
            else:
                found_ids += ids[first:i]
                found_offsets += offsets[first:i]
            if token is not None:
                found_ids.append(token)
                found_offsets.append(offsets[i])
                start, first = offsets[i][1], i + 1
        return found_ids, found_offsets

    def _encode(self, text: str, plain: bool) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self._template.tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=plain,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=True,
        )
        ids = encoding["input_ids"]
        tokenizer = self._template.tokenizer
        if plain and (control := self._template.control_ids.intersection(ids) - {tokenizer.unk_token_id}):
            token = tokenizer.convert_ids_to_tokens(control.pop())
            raise TemplateRefuses("control_token", f"the tokenizer makes {token!r} of plain text")
        return ids, encoding["offset_mapping"]

    def _hide_control_tokens(self, text: str) -> str:
        return self._spelt_out.replace(self._template.unsafe.split(text), 1, ())

    def _hide_joined_control_tokens(self, text: str, runs: list[Run]) -> str:
        """The text with stand-ins for control tokens that the template joined from parts, any of which the dialogue wrote."""
        pieces, end = [], 0
        for found in self._template.control_token.finditer(text):
            if any(run.start < found.end() and found.start() < run.end for run in runs):
                pieces += [text[end : found.start()], found[0]]
                end = found.end()
        return self._spelt_out.replace([*pieces, text[end:]], 1, ())

    def _mark(self) -> tuple[list[dict], list[dict] | None]:
        compared, words = self._template.compared(self._tools)

        def mark(value, owner: tuple):
            whole_words = () if owner[1] in ("content", "reasoning_content") else words
            return _map_texts(
                value,
                lambda text: text if text in whole_words else self._marks.replace(compared.split(text), 0, owner),
                keys=False,
            )

        def mark_each(value, message: int, field: str):
            if isinstance(value, list):
                return [mark(item, (message, field, i)) for i, item in enumerate(value)]
            return mark(value, (message, field, 0))

        messages = [{key: mark_each(value, i, key) for key, value in m.items()} for i, m in enumerate(self._messages)]
        return messages, mark_each(self._tools, -1, "tools")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _map_texts(value: Any, change: Callable[[str], str], keys: bool = True) -> Any:
    """The same nested lists and dicts with every text changed; keys of dicts, too, unless told."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key) if keys else key: _map_texts(item, change, keys) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_texts(item, change, keys) for item in value]
    return value
