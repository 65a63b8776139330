"""Whether a chat template writes all that a dialogue says. What it leaves out would be lost without a word."""

from mateconv_jax.data.tokenizer.chat_template import DialogueRenderer, Rendering, TemplateRefuses

# Other fields of a message, such as a tool call's id, are for programs.
FIELDS = ("content", "reasoning_content", "tool_calls")


def check(renderer: DialogueRenderer, rendering: Rendering, messages: list[dict], tools: list[dict] | None) -> None:
    """Raises TemplateRefuses, which names the role or the field, if a text of the dialogue is nowhere in its rendering.

    Reasoning may be left out of the whole if the dialogue up to its turn has it: Qwen3's rule.
    """
    seen = {run.owner[:2] for run in rendering.runs}
    seen_items = {run.owner for run in rendering.runs}
    marked = renderer.marked_texts if rendering.is_traced else set()
    for message, field, item in sorted(marked - seen_items):
        if field == "tools" or (field in FIELDS and (field == "tool_calls" or (message, field) not in seen)):
            _check_missing(renderer, messages, message, field, item)
    marked_fields = {owner[:2] for owner in marked}
    for i, message in enumerate(messages):
        for field in FIELDS:
            value = message.get(field)
            if value and (i, field) not in marked_fields and (not isinstance(value, str) or value.strip()):
                _check_without(renderer, rendering, messages, i, field)
    if tools and (-1, "tools") not in marked_fields:
        _check_without(renderer, rendering, messages, -1, "tools")


def _check_missing(renderer: DialogueRenderer, messages: list[dict], message: int, field: str, item: int) -> None:
    if message >= 0 and field != "content":
        up_to_it = renderer.beginning(message + 1, add_generation_prompt=False)
        if any(run.owner == (message, field, item) for run in up_to_it.runs):
            return
    raise _refusal(messages, message, field)


def _check_without(renderer: DialogueRenderer, rendering: Rendering, messages: list[dict], message: int, field: str) -> None:
    """By comparing with the rendering of the dialogue without that field."""
    try:
        without = renderer.without(message, None if field == "content" else field)
    except TemplateRefuses:
        return  # it does matter
    if without == rendering.text:
        raise _refusal(messages, message, field)


def _refusal(messages: list[dict], message: int, field: str) -> TemplateRefuses:
    if message < 0:
        return TemplateRefuses("field_not_in_template", "the chat template does not write 'tools'")
    role = messages[message]["role"]
    if field == "content" and not any(messages[message].get(other) for other in FIELDS[1:]):
        return TemplateRefuses("role_not_in_template", f"the chat template does not write what the role {role!r} says")
    return TemplateRefuses(
        "field_not_in_template", f"the chat template does not write {field!r} of message {message + 1} ({role})"
    )
