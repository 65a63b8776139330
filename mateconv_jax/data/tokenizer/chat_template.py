"""A dialogue through a tokenizer's chat template, with the knowledge of whose each character is.

A template may do anything with the texts that it is given: trim them, split them at `</think>`, index into them, render
them as JSON. So the texts go in as they are, and what they became is read off a second rendering, in which private
characters stand for theirs (all but those that templates look for: white space, quotes, and what this template compares
texts with). If putting the characters back gives the first rendering, each character's origin is known for certain.
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from mateconv_jax.data.dialogue import texts_in
from mateconv_jax.data.tokenizer.stand_ins import STAND_INS, NotAStandIn, Run, StandIns, TooLong
from mateconv_jax.data.tokenizer.tokenizer import encode_with_offsets
from mateconv_jax.errors import UserError

Tools = list[Any] | None  # JSON schemas
ROLES = {"system", "developer", "user", "assistant", "tool"}
# What transformers gives to every template, and what apply_chat_template itself takes.
RESERVED = {
    "messages",
    "strftime_now",
    "raise_exception",
    *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters,
}
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
        quotes, and what the template compares texts with belong to no run. Empty where the origin is not known: the
        template does something with the texts that it did not do with stand-ins.
    """

    text: str
    runs: list[Run]


class ChatTemplate:
    """The chat template of a tokenizer.

    Attributes:
      control_token: matches a control token, that is an added token that is special.
      control_ids: their ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, variables: Mapping[str, Any] | None = None):
        """
        Args:
          variables: the template's own, such as Qwen3's enable_thinking.

        Raises:
          UserError: a variable that the template does not name, or a text with control tokens.
        """
        self.tokenizer = tokenizer
        self._variables = dict(variables or {})
        control = {token: added.content for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        longest_first = sorted(map(re.escape, control.values()), key=len, reverse=True)
        self.control_token = re.compile("|".join(longest_first) or r"(?!)")
        self.control_ids = set(control)
        for name, value in self._variables.items():
            self._check(name, value)

    def _check(self, name: str, value: Any) -> None:
        if name in RESERVED or ("name", name) not in _lexed(self.source(None)):
            raise UserError(f"{name}: the chat template has no such variable (expected one of those that it tests)")
        if not isinstance(value, bool | int | float | str | None):
            raise UserError(f"{name}: {value!r} is invalid (expected a boolean, a number or a text)")
        if isinstance(value, str) and self.is_unsafe(value):
            raise UserError(f"{name}: control tokens are not allowed in it")

    def write(self, messages: list[dict], tools: Tools, add_generation_prompt: bool) -> str:
        """transformers' rendering.

        Raises:
          TemplateRefuses: the template raises an error.
        """
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt, **self._variables
            )
        except Exception as error:  # whatever the template raises
            reason = f"the chat template does not take these messages ({error})"
            raise TemplateRefuses("chat_template", reason) from error
        assert isinstance(text, str)
        return text

    def is_unsafe(self, text: str) -> bool:
        """Whether a text holds control tokens, or private characters, which must not be mistaken for stand-ins."""
        return bool(self.control_token.search(text) or STAND_INS.search(text))

    def source(self, tools: Tools) -> str:
        """The template's text. There may be another one for dialogues with tools."""
        return self.tokenizer.get_chat_template(None, tools)

    def compared(self, tools: Tools) -> "Compared":
        """What the template may look for in the texts that it is given."""
        return _compared(self.source(tools), self.control_token)


class Compared(NamedTuple):
    """What a template may look for in a text, as far as its string constants tell.

    Attributes:
      words: it may compare whole texts with them.
      symbols: a pattern; it may look for them inside of a text, or split it there.
      kept: a pattern, as one group, of these symbols and all that templates look for or change: JSON escapes quotes,
        backslashes and control characters, and white space is trimmed at the ends of a text, and where it is split.
    """

    words: frozenset[str]
    symbols: re.Pattern
    kept: re.Pattern


@functools.lru_cache(32)
def _lexed(source: str) -> list[tuple[str, str]]:
    """(kind, text) of a template's tokens, without white space; none if it is not valid, which rendering says."""
    try:
        return [(kind, text) for _, kind, text in jinja2.Environment().lex(source) if kind != "whitespace"]
    except jinja2.TemplateSyntaxError:
        return []


@functools.lru_cache(32)
def _compared(source: str, control_token: re.Pattern) -> Compared:
    words, symbols = set(ROLES), set()
    for constant in _compared_constants(source):
        if re.fullmatch(r"\w+", constant):
            words.add(constant)
        elif not constant.isspace() and not control_token.search(constant):
            symbols.add(constant)
    symbol = "|".join(re.escape(text) for text in sorted(symbols, key=lambda text: -len(text))) or r"(?!)"
    kept = rf"((?:\s{{2,}}|\A\s|\s\Z|[\"\\\x00-\x1f]|\s?(?:{symbol})\s?)+)"
    return Compared(frozenset(words), re.compile(symbol), re.compile(kept))


def _compared_constants(source: str) -> Iterator[str]:
    """String constants of a template that stand beside a comparison, or in brackets: 'a' in x, x == 'a', f('a'), ['a']."""
    comparing = {"==", "!=", "in", "not", "(", ",", "["}
    tokens = _lexed(source)
    around = [("", ""), *tokens, ("", "")]
    for (_, before), (kind, text), (_, after) in zip(around, tokens, around[2:], strict=False):
        if kind == "string" and len(text) > 2 and ({before, after} & comparing):
            yield text[1:-1].encode("ascii", "backslashreplace").decode("unicode-escape")


class DialogueRenderer:
    """Renders one dialogue, whole or its beginnings, and tokenizes the result."""

    def __init__(self, template: ChatTemplate, messages: list[dict], tools: Tools):
        self._template = template
        self._spelt_out = StandIns()  # for control tokens that the dialogue spells out
        self._marks = StandIns()  # for everything else that it says
        self._messages, self._tools = messages, tools
        if any(map(template.is_unsafe, texts_in([messages, tools]))):
            self._messages, self._tools = _map_texts([messages, tools], self._hide_control_tokens, self._hide_control_tokens)
        self._marked: tuple[list[dict], Tools] | None = None
        self._written = ""  # the whole

    def whole(self, add_generation_prompt: bool = False) -> Rendering:
        """The whole dialogue.

        Raises:
          TemplateRefuses: the template raises an error.
        """
        text = self._written = self._template.write(self._messages, self._tools, add_generation_prompt)
        try:
            self._marked = self._mark()
            marked = self._template.write(*self._marked, add_generation_prompt)
            restored, runs = self._marks.restore(marked)
        except (TooLong, NotAStandIn, TemplateRefuses):
            restored, runs, marked = "", [], ""
        if restored != text:
            self._marked = None
            return Rendering(text, [])
        control_token = self._template.control_token
        if len(control_token.findall(text)) != len(control_token.findall(marked)):
            text = self._hide_joined_control_tokens(text, runs)
        return Rendering(text, runs)

    def beginning(self, n_messages: int, add_generation_prompt: bool) -> Rendering:
        """The first messages alone. Stand-ins have the numbers that they have in the whole, which was rendered before.

        Raises:
          TemplateRefuses: the template raises an error.
        """
        if self._marked is None:
            return Rendering(self._template.write(self._messages[:n_messages], self._tools, add_generation_prompt), [])
        messages, tools = self._marked
        text, runs = self._marks.restore(self._template.write(messages[:n_messages], tools, add_generation_prompt))
        return Rendering(text, runs)

    def is_blank(self, text: str) -> bool:
        """Whether a text says nothing: white space and what the template looks for, such as an empty think block."""
        return not self._template.compared(self._tools).symbols.sub("", text).strip()

    def depends_on(self, message: int, field: str, item: int) -> bool:
        """Whether the dialogue is rendered differently without an item of a field. Message -1 has the tools.

        Of a content that is all there is, this asks for the dialogue without the message. Of reasoning, which may be in an
        assistant's content, it asks for the dialogue up to its message, too: Qwen3's template leaves it out later.
        """
        messages, tools = self._without(message, field, item)
        may_be_reasoning = field == "reasoning_content" or field == "content" and self._messages[message]["role"] == "assistant"
        for n_left_out in [0, len(self._messages) - message - 1] if may_be_reasoning else [0]:
            shorter = messages[: len(messages) - n_left_out]
            try:
                text = self._template.write(shorter, tools, False) if shorter else ""
            except TemplateRefuses:  # it cannot do without
                return True
            if text != self._template.write(self._messages[: len(self._messages) - n_left_out], self._tools, False):
                return True
        return False

    def _without(self, message: int, field: str, item: int) -> tuple[list[dict], Tools]:
        if message < 0:
            return self._messages, [tool for i, tool in enumerate(self._tools or []) if i != item] or None
        rest = dict(self._messages[message])
        value = rest.pop(field)
        if isinstance(value, list) and len(value) > 1:
            rest[field] = [value[i] for i in range(len(value)) if i != item]
        elif field == "content":
            rest[field] = ""
        is_gone = field == "content" and not any(rest.get(key) for key in rest if key != "role")
        return [*self._messages[:message], *([] if is_gone else [rest]), *self._messages[message + 1 :]], self._tools

    def generation_blocks(self) -> list[tuple[int, int]] | None:
        """Characters (start, end) of the whole that stand in {% generation %}, in order; None without such blocks.

        Raises:
          TemplateRefuses: rendered with these blocks the dialogue is another.
        """
        source = self._template.source(self._tools)
        if not GENERATION.search(source):
            return None
        messages = [{key: value for key, value in message.items() if value is not None} for message in self._messages]
        variables: dict[str, Any] = self._template.tokenizer.special_tokens_map
        rendered: Any = render_jinja_template(
            [messages], self._tools, chat_template=source, return_assistant_tokens_mask=True, **variables
        )
        (text,), (blocks,) = rendered
        if text != self._written:
            raise TemplateRefuses("learned_unclear", "the chat template writes another text with its {% generation %} blocks")
        return blocks

    def token_ids(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a rendering's text, and the characters (start, end) of each token.

        Raises:
          TemplateRefuses: the tokenizer makes a control token of plain text.
        """
        ids, offsets = self._encode(text, False)
        try:
            spelt_out, runs = self._spelt_out.restore(text) if len(self._spelt_out) else (text, [])
        except NotAStandIn as error:
            raise TemplateRefuses("chat_template", f"the chat template itself writes {error}") from error
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
        ids, offsets = encode_with_offsets(self._template.tokenizer, text, plain)
        tokenizer = self._template.tokenizer
        if plain and (control := self._template.control_ids.intersection(ids) - {tokenizer.unk_token_id}):
            token = tokenizer.convert_ids_to_tokens(control.pop())
            raise TemplateRefuses("control_token", f"the tokenizer makes {token!r} of plain text")
        return ids, offsets

    def _hide_control_tokens(self, text: str) -> str:
        unsafe = f"({self._template.control_token.pattern}|{STAND_INS.pattern})"
        return self._hide(re.split(unsafe, text))

    def _hide(self, pieces: list[str]) -> str:
        """The pieces joined, the odd ones hidden."""
        try:
            return self._spelt_out.replace(pieces, 1, ())
        except TooLong:
            raise TemplateRefuses("control_token", "the texts spell out too many control tokens") from None

    def _hide_joined_control_tokens(self, text: str, runs: list[Run]) -> str:
        """The text with stand-ins for control tokens that the template joined from parts, any of which the dialogue wrote."""
        pieces, end = [], 0
        for found in self._template.control_token.finditer(text):
            if any(run.start < found.end() and found.start() < run.end for run in runs):
                pieces += [text[end : found.start()], found[0]]
                end = found.end()
        return self._hide([*pieces, text[end:]])

    def _mark(self) -> tuple[list[dict], Tools]:
        compared = self._template.compared(self._tools)

        def mark(value, owner: tuple):
            words = () if owner[1] in ("content", "reasoning_content") else compared.words
            return _map_texts(
                value,
                lambda text: text if text in words else self._marks.replace(compared.kept.split(text), 0, owner),
                # Templates ask for keys by name; but for the stand-ins that are there already they stay.
                lambda key: self._marks.replace(re.split(f"({STAND_INS.pattern})", key), 1, owner),
            )

        def mark_each(value, message: int, field: str):
            if isinstance(value, list):
                return [mark(item, (message, field, i)) for i, item in enumerate(value)]
            return mark(value, (message, field, 0))

        messages = [{key: mark_each(value, i, key) for key, value in m.items()} for i, m in enumerate(self._messages)]
        return messages, mark_each(self._tools, -1, "tools")


def _map_texts(value: Any, change: Callable[[str], str], change_key: Callable[[str], str]) -> Any:
    """The same nested lists and dicts with every text and every key changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change_key(key): _map_texts(item, change, change_key) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_texts(item, change, change_key) for item in value]
    return value
