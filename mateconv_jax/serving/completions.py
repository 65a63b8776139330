"""The answers of /v1/chat/completions and /v1/completions, whole or streamed."""

import abc
import dataclasses
import json
import uuid
from collections.abc import AsyncIterator, Iterator

from mateconv_jax.inference.request import Finished, Piece, TokenLogprob
from mateconv_jax.serving import openai_schema
from mateconv_jax.serving.answer_parts import AnswerParts, Part
from mateconv_jax.serving.openai_schema import FINISH_REASONS
from mateconv_jax.serving.scheduler import Answers
from mateconv_jax.serving.token_texts import TokenTexts, Written


@dataclasses.dataclass
class Delta:
    """What is new in one answer.

    Attributes:
      index: of the answer.
      parts: of its text.
      logprobs: of its tokens.
      reason: OpenAI's finish_reason; None: the answer goes on.
    """

    index: int
    parts: list[Part]
    logprobs: list[TokenLogprob]
    reason: str | None = None


class Completion(abc.ABC):
    """One request's answers as OpenAI's JSON; subclasses know the two shapes.

    Attributes:
      n_new: tokens of all answers that are finished.
      texts: what each answer wrote, for the log.
    """

    kind: str
    prefix: str

    def __init__(self, model: str, n_prompt: int, parts: list[AnswerParts], token_texts: TokenTexts | None, stream: bool):
        """
        Args:
          n_prompt: tokens of all prompts.
          parts: of each answer.
          token_texts: None: no log-probabilities.
        """
        self._envelope = openai_schema.envelope(self.kind + ".chunk" * self._has_chunk_kind(stream), self.prefix, model)
        self._n_prompt, self._parts, self._token_texts = n_prompt, parts, token_texts
        self.n_new = 0
        self.reasons: list[str] = []
        self.texts = [""] * len(parts)

    def _has_chunk_kind(self, stream: bool) -> bool:
        return stream and self.kind == "chat.completion"

    async def whole(self, answers: Answers) -> dict:
        """The response without streaming."""
        deltas: list[list[Delta]] = [[] for _ in self._parts]
        async for index, event in answers.events():
            deltas[index] += self._deltas(index, event)
        choices = [self._choice(index, of_answer) for index, of_answer in enumerate(deltas)]
        return self._envelope | {"choices": choices, "usage": self._usage(answers)}

    async def chunks(self, answers: Answers, include_usage: bool) -> AsyncIterator[dict]:
        """The stream's objects. With include_usage each has a usage, all but the last null, as OpenAI's."""
        empty = {"usage": None} if include_usage else {}
        for choice in self._first():
            yield self._envelope | {"choices": [choice]} | empty
        async for index, event in answers.events():
            for delta in self._deltas(index, event):
                for choice in self._chunk_choices(delta):
                    yield self._envelope | {"choices": [choice]} | empty
        if include_usage:
            yield self._envelope | {"choices": [], "usage": self._usage(answers)}

    def _deltas(self, index: int, event: Piece | Finished) -> Iterator[Delta]:
        parts = self._parts[index]
        if isinstance(event, Piece):
            self.texts[index] += event.text
            found = parts.push(event.text)
            if found or event.logprobs:
                yield Delta(index, found, event.logprobs)
            return
        rest = parts.finish()
        self.n_new += len(event.generation.token_ids)
        self.reasons.append(event.generation.finish_reason)
        yield Delta(index, rest, [], FINISH_REASONS[event.generation.finish_reason])

    def _usage(self, answers: Answers) -> dict:
        return openai_schema.usage(self._n_prompt, self.n_new, answers.n_reused)

    def _first(self) -> list[dict]:
        return []

    @abc.abstractmethod
    def _choice(self, index: int, deltas: list[Delta]) -> dict:
        """A whole answer as an entry of `choices`."""

    @abc.abstractmethod
    def _chunk_choices(self, delta: Delta) -> Iterator[dict]:
        """What is new in an answer as entries of `choices`."""


class ChatCompletion(Completion):
    kind, prefix = "chat.completion", "chatcmpl"

    def __init__(self, *args):
        super().__init__(*args)
        self._n_calls = [0] * len(self._parts)

    def _logprobs(self, logprobs: list[TokenLogprob]) -> dict | None:
        return self._token_texts.of_chat(logprobs) if self._token_texts else None

    def _choice(self, index: int, deltas: list[Delta]) -> dict:
        parts = [part for delta in deltas for part in delta.parts]
        texts = {kind: "".join(part.text for part in parts if part.kind == kind) for kind in ("content", "reasoning")}
        calls = [_tool_call(part) for part in parts if part.kind == "tool_call"]
        message: dict = {"role": "assistant", "content": texts["content"] or (None if calls else "")}
        if texts["reasoning"]:
            message["reasoning_content"] = texts["reasoning"]
        if calls:
            message["tool_calls"] = calls
        reason = "tool_calls" if calls and deltas[-1].reason == "stop" else deltas[-1].reason
        logprobs = self._logprobs([one for delta in deltas for one in delta.logprobs])
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _first(self) -> list[dict]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": i, "delta": delta, "logprobs": None, "finish_reason": None} for i in range(len(self._parts))]

    def _chunk_choices(self, delta: Delta) -> Iterator[dict]:
        def choice(delta_fields: dict, logprobs: list[TokenLogprob], reason: str | None) -> dict:
            shown = self._logprobs(logprobs) if logprobs else None
            return {"index": delta.index, "delta": delta_fields, "logprobs": shown, "finish_reason": reason}

        logprobs = delta.logprobs
        for part in delta.parts:
            if part.kind == "tool_call":
                number, self._n_calls[delta.index] = self._n_calls[delta.index], self._n_calls[delta.index] + 1
                fields = {"tool_calls": [{"index": number} | _tool_call(part)]}
            else:
                fields = {"reasoning_content" if part.kind == "reasoning" else "content": part.text}
            yield choice(fields, logprobs, None)
            logprobs = []
        if logprobs:  # of tokens that have written nothing yet
            yield choice({}, logprobs, None)
        if delta.reason is not None:
            reason = "tool_calls" if self._n_calls[delta.index] and delta.reason == "stop" else delta.reason
            yield choice({}, [], reason)


class TextCompletion(Completion):
    kind, prefix = "text_completion", "cmpl"

    def __init__(self, *args):
        super().__init__(*args)
        self._written = [Written() for _ in self._parts]

    def _logprobs(self, index: int, logprobs: list[TokenLogprob]) -> dict | None:
        if self._token_texts is None:
            return None
        return self._token_texts.of_completion(logprobs, self._written[index])

    def _choice(self, index: int, deltas: list[Delta]) -> dict:
        text = "".join(part.text for delta in deltas for part in delta.parts)
        logprobs = self._logprobs(index, [one for delta in deltas for one in delta.logprobs])
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": deltas[-1].reason}

    def _chunk_choices(self, delta: Delta) -> Iterator[dict]:
        text = "".join(part.text for part in delta.parts)
        logprobs = self._logprobs(delta.index, delta.logprobs) if delta.logprobs else None
        yield {"index": delta.index, "text": text, "logprobs": logprobs, "finish_reason": delta.reason}


def _tool_call(part: Part) -> dict:
    function = {"name": part.name, "arguments": part.text}
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}


def server_sent(value: dict) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
