"""From requests to token ids and sampling options."""

import secrets
from typing import Any

from mateconv_jax.data.tokenizer.chat import TemplateRefuses, encode_chat
from mateconv_jax.errors import UserError
from mateconv_jax.generation_config import GenerationConfig
from mateconv_jax.inference.text_generator import TextGenerator
from mateconv_jax.serving import openai_schema
from mateconv_jax.serving.answer_parts import CALL, THINK, AnswerParts
from mateconv_jax.serving.guard import Refusal
from mateconv_jax.serving.limits import Limits
from mateconv_jax.serving.openai_schema import ChatRequest, CompletionRequest, Sampled

OPENAI = GenerationConfig(temperature=1.0, top_k=0, top_p=1.0)
# {in GenerationConfig: in requests}, where they differ.
NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
# Options that have the same name in both, and nothing more to them.
SAME_NAMES = (
    "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "no_repeat_ngram_size",
)  # fmt: skip


class Prompts:
    """Turns requests for one model into what the engine takes. May be used by several threads."""

    def __init__(self, generator: TextGenerator, context: int, limits: Limits, defaults: GenerationConfig = OPENAI):
        """defaults: sampling options that a request leaves out."""
        self._generator, self._context, self._limits, self._defaults = generator, context, limits, defaults
        template = generator.tokenizer.chat_template
        self._template = template if isinstance(template, str) else str(template or "")

    def config(self, request: Sampled, max_tokens: int | None) -> GenerationConfig:
        """max_tokens None: to the end of the context.

        Raises:
          Refusal: 400.
        """
        given = {name: value for name in SAME_NAMES if (value := getattr(request, name)) is not None}
        temperature = self._defaults.temperature if request.temperature is None else request.temperature
        if temperature < 1e-6:
            given |= {"do_sample": False}
        else:
            given |= {"temperature": temperature}
        new_tokens = self._context if max_tokens is None else min(max_tokens, self._context)
        stop = [request.stop] if isinstance(request.stop, str) else request.stop or ()
        try:
            return GenerationConfig(
                **{name: getattr(self._defaults, name) for name in ("top_k", "top_p", "min_p")} | given,
                max_new_tokens=new_tokens,
                min_new_tokens=request.min_tokens or 0,
                stop=tuple(stop),
                seed=secrets.randbits(32) if request.seed is None else request.seed,
                logit_bias=self._logit_bias(request),
            )
        except UserError as error:
            raise refusal(error) from error

    def _logit_bias(self, request: Sampled) -> tuple[tuple[int, float], ...]:
        vocab_size = self._generator.model_config.vocab_size
        pairs: dict[int, float] = {}
        for key, bias in (request.logit_bias or {}).items():
            if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab_size):
                problem = f"logit_bias: {key!r} is no token (expected an id from 0 to {vocab_size - 1})"
                raise Refusal(400, problem, param="logit_bias")
            pairs[int(key)] = bias
        return tuple(pairs.items())

    def chat(self, request: ChatRequest) -> tuple[list[int], AnswerParts]:
        """The dialogue's token ids, and what tells the parts of an answer to it apart.

        Raises:
          Refusal: 400.
        """
        if len(request.messages) > self._limits.max_messages:
            limit = self._limits.max_messages
            raise Refusal(400, f"messages: {len(request.messages)} (expected at most {limit})", param="messages")
        try:
            messages = openai_schema.plain_messages(request.messages)
        except ValueError as error:
            field, problem = error.args
            raise Refusal(400, f"{field}: {problem}", param=field) from error
        tools = None
        if request.tools and request.tool_choice != "none":
            if CALL not in self._template:
                raise Refusal(400, "tools: this model's chat template has none", param="tools")
            tools = [tool.model_dump(exclude_none=True) for tool in request.tools]
        variables = request.chat_template_kwargs
        try:
            ids = encode_chat(self._generator.tokenizer, messages, True, tools, complete=True, variables=variables)
        except TemplateRefuses as error:
            raise Refusal(400, f"messages: {error}", param="messages") from error
        except UserError as error:
            param = "chat_template_kwargs" if variables else "messages"
            raise Refusal(400, f"{param}: {error}", param=param) from error
        self._check_length(ids, "messages")
        tokenizer = self._generator.tokenizer
        ending = tokenizer.convert_tokens_to_string(list(tokenizer.convert_ids_to_tokens(ids[-16:])))
        return ids, AnswerParts(THINK in self._template, ending.rstrip().endswith(THINK), tools is not None)

    def completions(self, request: CompletionRequest) -> list[list[int]]:
        """The token ids of each prompt.

        Raises:
          Refusal: 400.
        """
        given: Any = request.prompt
        prompts = [given] if isinstance(given, str) or given and isinstance(given[0], int) else given
        found = []
        for prompt in prompts:
            if isinstance(prompt, str):
                try:
                    ids = self._generator.document_ids(prompt)
                except UserError as error:
                    raise refusal(error) from error
            else:
                ids = list(prompt)
                vocab_size = self._generator.model_config.vocab_size
                if not ids or max(ids) >= vocab_size:
                    raise Refusal(400, f"prompt: expected token ids from 0 to {vocab_size - 1}, at least one", param="prompt")
            self._check_length(ids, "prompt")
            found.append(ids)
        if not found:
            raise Refusal(400, "prompt: empty (expected a text or token ids)", param="prompt")
        return found

    def _check_length(self, ids: list[int], param: str) -> None:
        if len(ids) >= self._context:
            raise Refusal(
                400,
                f"{param}: {len(ids)} tokens leave no room in the context of {self._context} "
                f"(expected at most {self._context - 1})",
                param=param,
                code="context_length_exceeded",
            )


def refusal(error: UserError) -> Refusal:
    """400 for a UserError, whose message begins with the field's name."""
    name, _, rest = str(error).partition(": ")
    param = NAMES.get(name, name)
    return Refusal(400, f"{param}: {rest}".replace("max_new_tokens", "max_tokens"), param=param)
