"""OpenAI's requests as this server takes them, and its answers.

A field that is not here is refused by name, never ignored: what a client asks for is done, or it is told that it is not.
"""

import json
import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Temperature = Annotated[float | None, Field(ge=0, le=2)]
Penalty = Annotated[float | None, Field(ge=-2, le=2)]
TokenBias = Annotated[float, Field(ge=-100, le=100)]
Tokens = Annotated[int, Field(ge=0)]


class Strict(BaseModel):
    """No unknown fields, no conversions ("1" is no number), no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


# ---- sampling -------------------------------------------------------------------------------------------------------


class StreamOptions(Strict):
    include_usage: bool = False


class Sampled(Strict):
    """What both kinds of completion share. None, as if left out: OpenAI's default, or that of --preset."""

    model: str
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int | None, Field(ge=1, le=128)] = 1
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    seed: Annotated[int | None, Field(ge=0, lt=2**32)] = None
    temperature: Temperature = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    presence_penalty: Penalty = None
    frequency_penalty: Penalty = None
    logit_bias: Annotated[dict[str, TokenBias], Field(max_length=300)] | None = None
    user: str | None = Field(None, description="Written into the log.")
    # Not OpenAI's; send them in the client's extra_body.
    top_k: Annotated[int | None, Field(ge=0, description="0: all tokens")] = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    repetition_penalty: Annotated[float | None, Field(gt=0, le=100)] = None
    no_repeat_ngram_size: Annotated[int | None, Field(ge=0, le=2**31 - 1)] = None
    min_tokens: Annotated[int | None, Field(ge=0)] = None

    @model_validator(mode="before")
    @classmethod
    def _is_unicode(cls, values: Any) -> Any:
        """Python reads lone surrogates in JSON; nobody can encode them."""
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            raise ValueError("a text is not valid Unicode, or values are nested too deeply") from None
        return values


# ---- chat -----------------------------------------------------------------------------------------------------------


class TextPart(Strict):
    type: Literal["text"]
    text: str


class CalledFunction(Strict):
    name: str
    arguments: str = Field(description="a JSON object")


class ToolCall(Strict):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


Content = str | list[TextPart]


class SystemMessage(Strict):
    role: Literal["system", "developer"]
    content: Content


class UserMessage(Strict):
    role: Literal["user"]
    content: Content


class AssistantMessage(Strict):
    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    refusal: None = None  # as the client's own objects have it


class ToolMessage(Strict):
    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = Field(None, description="For the client; templates do not show it.")


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(Strict):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class ResponseFormat(Strict):
    type: Literal["text"]


class ChatRequest(Sampled):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    chat_template_kwargs: dict[str, bool | int | float | str | None] | None = Field(
        None, description='The chat template\'s variables, as in vLLM: {"enable_thinking": false}'
    )


class CompletionRequest(Sampled):
    prompt: (
        str | Annotated[list[str], Field(min_length=1)] | Annotated[list[Tokens], Field(min_length=1)] | list[list[Tokens]]
    ) = Field(description="text, several texts, or their token ids")
    max_tokens: Annotated[int | None, Field(ge=0)] = 16
    logprobs: Annotated[int | None, Field(ge=0, le=5)] = None
    best_of: Annotated[int | None, Field(ge=1)] = Field(None, description="must equal n")
    echo: Literal[False] | None = False


def plain_messages(messages: list[Message]) -> list[dict]:
    """As chat templates take them.

    Raises:
      ValueError: the arguments of a tool call are not a JSON object. Its first argument is the field's name.
    """
    plain = []
    for i, message in enumerate(messages):
        values = message.model_dump(exclude_none=True)
        content = values.get("content", "")
        values["content"] = content if isinstance(content, str) else "".join(part["text"] for part in content)
        if values["role"] == "developer":
            values["role"] = "system"  # its newer name
        for j, call in enumerate(values.get("tool_calls", ())):
            field = f"messages.{i}.tool_calls.{j}.function.arguments"
            try:
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
            except (ValueError, RecursionError):
                raise ValueError(field, "not valid JSON") from None
            if not isinstance(call["function"]["arguments"], dict):
                raise ValueError(field, "not a JSON object")
        plain.append(values)
    return plain


# ---- answers --------------------------------------------------------------------------------------------------------

FINISH_REASONS = {"eos": "stop", "stop": "stop", "length": "length", "context": "length"}


def error(message: str, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None) -> dict:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def usage(n_prompt: int, n_new: int, n_cached: int) -> dict:
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_new,
        "total_tokens": n_prompt + n_new,
        "prompt_tokens_details": {"cached_tokens": n_cached},
    }


def envelope(kind: str, prefix: str, model: str) -> dict:
    """The fields that an answer, or all chunks of a stream, begin with."""
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}
