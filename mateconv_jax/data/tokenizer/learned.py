"""Which characters of a rendered dialogue are learned: what the model has to write itself.

That is, in each of the assistant's turns, everything from the end of the generation prompt to the control token that ends
the turn. Both ends are read off the template: the dialogue up to the turn, with the generation prompt, and the dialogue up
to and with the turn are rendered and compared with the whole. Templates may write earlier turns differently in the whole
(Qwen3 drops their reasoning), so the comparison begins at the last character of the dialogue in front of the place, which
must be the same one in both. Where a template marks the answers itself, with {% generation %}, its marks are taken.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from mateconv_jax.common_prefix import common_prefix
from mateconv_jax.data.tokenizer.chat_template import ChatTemplate, DialogueRenderer, Rendering, TemplateRefuses
from mateconv_jax.data.tokenizer.stand_ins import Run

LONGEST_GAP = 500  # characters; longer ones are not remembered
MOST_GAPS = 10_000
Span = tuple[int, int]  # start, end
DIFFERENT = "the template writes the dialogue up to it differently from the whole"


class AnswerFinder:
    """Finds the learned characters of dialogues. What stands between two texts is looked up in renderings once, then known."""

    def __init__(self, template: ChatTemplate):
        self._template = template
        self._known: dict[tuple, int] = {}

    def turns(
        self, renderer: DialogueRenderer, rendering: Rendering, messages: list[dict], has_tools: bool
    ) -> list[list[Span]]:
        """Of each of the assistant's turns, the learned characters (start, end) of the whole dialogue's rendering, in order.

        Raises:
          TemplateRefuses: where an answer begins or ends does not follow from the template's renderings.
        """
        search = _Search(self._template, renderer, rendering, len(messages))
        blocks = renderer.generation_blocks()
        shapes = [(message["role"], *message) for message in messages]
        turns: list[list[Span]] = []
        end = 0
        for i in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
            gap = search.gap(i)
            end_before = end
            around = (gap.before and gap.before.owner[0], gap.last is gap.before, *shapes[: i + 2], has_tools)
            end = gap.tail_start + self._remembered(search.ending, i, gap, (gap.tail, i == len(messages) - 1, *around))
            if blocks is not None:
                own = [(start, min(stop, end)) for start, stop in blocks if end_before <= start < end]
                turns.append(_with_end_token(own, end, rendering.text, self._template.control_token) if own else [])
                continue
            start = gap.head_start + self._remembered(search.header, i, gap, (gap.head, *around))
            if start >= end:
                raise search.unclear(i, "its end token is not behind the generation prompt")
            turns.append([(start, end)])
        return turns

    def _remembered(self, find: Callable[[int, "_Gap"], int], message: int, gap: "_Gap", key: tuple) -> int:
        """`find(message, gap)`, which is the same wherever messages of these shapes have this text between them."""
        key = (find.__name__, *key)
        if key not in self._known:
            found = find(message, gap)
            if len(key[1]) > LONGEST_GAP or len(self._known) == MOST_GAPS:
                return found
            self._known[key] = found
        return self._known[key]


def _with_end_token(blocks: list[Span], end: int, text: str, control_token: re.Pattern) -> list[Span]:
    """{% generation %} blocks of a turn, and the control token that ends it at `end`. More behind the last block if it is all
    control tokens."""
    last = blocks[-1][1]
    if control_token.sub("", text[last:end]):
        last = max(found.start() for found in control_token.finditer(text, last, end))
    return [*blocks, (last, end)]


class _Gap(NamedTuple):
    """What stands around an assistant's texts: the template's, white space, and quotes.

    Attributes:
      before: the last run in front of the message.
      last: its own last run, or `before` where it has none.
      head, head_start: the text between `before` and its first run, and where it starts.
      tail, tail_start: the text between `last` and the next message's first run, and where it starts.
    """

    before: Run | None
    last: Run | None
    head: str
    head_start: int
    tail: str
    tail_start: int


class _Search:
    """In the renderings of one dialogue."""

    def __init__(self, template: ChatTemplate, renderer: DialogueRenderer, rendering: Rendering, n_messages: int):
        self._control_token = template.control_token
        self._template = template
        self._renderer = renderer
        self._text, self._runs = rendering
        self._n_messages = n_messages
        self._own: dict[int, list[int]] = {}  # of each message: its runs' numbers
        for i, run in enumerate(self._runs):
            self._own.setdefault(run.owner[0], []).append(i)

    def gap(self, message: int) -> _Gap:
        own = self._own.get(message)
        if own:
            first, last = own[0], own[-1] + 1
            in_one_piece = last - first == len(own)
        else:
            first = last = sum(len(runs) for other, runs in self._own.items() if other < message)
            in_one_piece = all(run.owner[0] > message for run in self._runs[first:])
        if not in_one_piece:
            raise self.unclear(message, "its text is not in one piece, or not where it is in the dialogue")
        before = self._runs[first - 1] if first else None
        own_last = self._runs[last - 1] if last else None
        next_start = self._runs[last].start if last < len(self._runs) else len(self._text)
        head_start = before.end if before else 0
        tail_start = own_last.end if own_last else 0
        head = self._text[head_start : self._runs[first].start if own else next_start]
        return _Gap(before, own_last, head, head_start, self._text[tail_start:next_start], tail_start)

    def header(self, message: int, gap: _Gap) -> int:
        """How much of the head the generation prompt has already."""
        if message == 0:
            return self._first_header(gap)
        prompt = self._after(message, gap.before, message, add_generation_prompt=True)
        n = common_prefix(prompt, gap.head)
        if any(found.end() > n for found in self._control_token.finditer(prompt)):
            raise self.unclear(message, f"it does not begin as the generation prompt ends, {prompt[-80:]!r}")
        return n

    def ending(self, message: int, gap: _Gap) -> int:
        """Where in the tail the control token that ends the message ends.

        In the dialogue up to the message others may follow, which end the whole: Phi-3 writes `<|end|>` behind a turn, and
        `<|endoftext|>` behind the last one.
        """
        if message == self._n_messages - 1:
            tail = gap.tail
        else:
            tail = self._after(message, gap.last, message + 1, add_generation_prompt=False)
        if not self._control_token.search(tail):
            raise self.unclear(message, f"no control token ends it (the template writes {tail[:80]!r} behind it)")
        common = tail[: common_prefix(tail, gap.tail)]
        end = max((found.end() for found in self._control_token.finditer(common)), default=0)
        if not end or self._control_token.sub("", tail[end:]).strip():
            raise self.unclear(message, DIFFERENT)
        return end

    def _after(self, message: int, last: Run | None, n_messages: int, add_generation_prompt: bool) -> str:
        """What stands behind `last` in the rendering of the first messages, in which it must be the last run, too."""
        text, runs = self._renderer.beginning(n_messages, add_generation_prompt)
        if (runs[-1].after if runs else None) != (last.after if last else None):
            raise self.unclear(message, DIFFERENT)
        return text[runs[-1].end if runs else 0 :]

    def _first_header(self, gap: _Gap) -> int:
        """Of a dialogue that the assistant begins: what the generation prompt adds to another dialogue."""
        question = [{"role": "user", "content": "?"}]
        before, prompt = (self._template.write(question, None, prompt) for prompt in (False, True))
        header = prompt[len(before) :] if prompt.startswith(before) else ""
        found = self._control_token.search(header)
        start = gap.head.find(header[: found.end()] if found else header)
        n = common_prefix(header, gap.head[max(0, start) :])
        if start < 0 or any(found.end() > n for found in self._control_token.finditer(header)):
            raise self.unclear(0, f"it does not begin as the generation prompt has it, {header!r}")
        return start + n if header else 0

    def unclear(self, message: int, reason: str) -> TemplateRefuses:
        where = f"which part of message {message + 1} the assistant writes is unclear in this chat template"
        return TemplateRefuses("learned_unclear", f"{where}: {reason}")
