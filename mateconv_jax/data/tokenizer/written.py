"""Whether a chat template writes all that a dialogue says. What it leaves out would be lost without a word."""

from collections.abc import Iterator

from mateconv_jax.data.tokenizer.chat_template import DialogueRenderer, Rendering, TemplateRefuses

# Other fields of a message, such as a tool call's id, are for programs.
FIELDS = ("content", "reasoning_content", "tool_calls")


def check(renderer: DialogueRenderer, rendering: Rendering, messages: list[dict], tools: list[dict] | None) -> None:
    """Raises TemplateRefuses, which names the role or the field, if a text of the dialogue is nowhere in its rendering.

    Reasoning may be left out of the whole if the dialogue up to its turn has it: Qwen3's rule.
    """
    seen = {run.owner for run in rendering.runs}
    for message, field, item in _said(renderer, messages, tools):
        if (message, field, item) not in seen and not renderer.depends_on(message, field, item):
            raise _refusal(messages, message, field)


def _said(renderer: DialogueRenderer, messages: list[dict], tools: list[dict] | None) -> Iterator[tuple[int, str, int]]:
    """(message, field, item) of all that must be written. Message -1 has the tools."""
    fields = [(-1, "tools", tools)]
    fields += [(i, field, message.get(field)) for i, message in enumerate(messages) for field in FIELDS]
    for i, field, value in fields:
        if isinstance(value, list):
            yield from ((i, field, item) for item in range(len(value)))
        elif isinstance(value, str) and not renderer.is_blank(value):
            yield i, field, 0


def _refusal(messages: list[dict], message: int, field: str) -> TemplateRefuses:
    if message < 0:
        return TemplateRefuses("field_not_in_template", "the chat template does not write 'tools'")
    role = messages[message].get("role")
    if field == "content" and not any(messages[message].get(other) for other in FIELDS[1:]):
        names = "'tool' (function, observation)" if role == "tool" else repr(role)  # as which it may have been written
        return TemplateRefuses("role_not_in_template", f"the chat template does not write what the role {names} says")
    return TemplateRefuses(
        "field_not_in_template", f"the chat template does not write {field!r} of message {message + 1} ({role})"
    )
