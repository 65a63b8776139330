"""Dialogues and templates that are refused, by name."""

import pytest

from mateconv_jax.data.text.dialogue import Dialogue
from mateconv_jax.data.tokenizer.chat import ChatEncoder, TemplateRefuses, encode_chat
from mateconv_jax.errors import UserError
from tests.data.tokenizer.chat_cases import (
    CALLING,
    EACH,
    PROMPT,
    TALK,
    TEMPLATES,
    THINKING,
    WEATHER,
    WITH_SYSTEM,
    assistant,
    call,
    encode,
    system,
    tokenizer_of,
    tool,
    transformers_ids,
    user,
    with_template,
)

NO_END = (
    "{% for m in messages %}{{ '<|User|>' if m.role == 'user' else '<|Assistant|>' }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"
)
LAST_ONLY = "{{ '<|User|>' ~ messages[-1].content ~ '<|im_end|>' }}"
OTHER_PROMPT = EACH.replace("CONTENT", "m.content") + "{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"
SYSTEM_AGAIN = EACH.replace("CONTENT", "m.content") + PROMPT.replace("{{ '", "{{ messages[0].content ~ '")
GOODBYE = EACH.replace("CONTENT", "m.content").replace(
    "<|im_end|>\\n' }}", "<|im_end|>' ~ ('bye<|output|>' if loop.last else '') }}"
)
NUMBERED = "{{ messages | length }}" + EACH.replace("CONTENT", "m.content | upper") + PROMPT


@pytest.mark.parametrize(
    "template, messages, tools, rule, reason",
    [
        ("mateconv", [{"role": "human", "content": "你好"}, assistant("好")], None, "role_not_in_template", "the role 'human' says"),
        ("mateconv", [user("?"), tool("晴"), assistant("晴")], None, "role_not_in_template", r"the role 'tool' \(function, observation\) says"),
        ("mateconv", [user("?"), system("晴"), assistant("晴")], None, "role_not_in_template", "the role 'system' says"),
        ("ours", CALLING, WEATHER, "field_not_in_template", "does not write 'tools'"),
        ("ours", CALLING, None, "field_not_in_template", r"'tool_calls' of message 2 \(assistant\)"),
        ("ours", [user("?"), assistant("!", reasoning_content="想")], None, "field_not_in_template", "'reasoning_content' of message 2"),
        ("llama3", [user("?"), assistant("看", tool_calls=[call("f", {})]), tool("!")], None, "field_not_in_template", "'content' of message 2"),
        ("llama3", [user("?"), assistant("", tool_calls=[call("f", {})] * 2)], None, "chat_template", "one call at a time"),
        ("mistral", [assistant("好"), user("你好")], None, "chat_template", "roles must alternate"),
        ("gemma", WITH_SYSTEM, None, "chat_template", "there is no system here"),
        ("{{ 1 / 0 }}", TALK, None, "chat_template", "division by zero"),
        ("{% if %}", TALK, None, "chat_template", "does not take these messages"),
        ("{{ '' }}", [user(""), assistant(" ")], None, "chat_template", "writes nothing"),
        (LAST_ONLY, TALK, None, "role_not_in_template", "the role 'user' says"),
        (NO_END, TALK, None, "learned_unclear", "message 2 .* no control token ends it"),
        (NO_END, [user("?"), assistant("")], None, "learned_unclear", "message 2 "),
        (OTHER_PROMPT, TALK, None, "learned_unclear", r"message 2 .* does not begin as the generation prompt ends, '<\|im_end\|>\\n<\|Assistant\|>'"),
        (NUMBERED, TALK, None, "learned_unclear", "message 2 "),
        (SYSTEM_AGAIN, WITH_SYSTEM, None, "learned_unclear", "message 3 .* differently from the whole"),
        (GOODBYE, TALK, None, "learned_unclear", "message 2 .* differently from the whole"),
    ],
)  # fmt: skip
def test_what_a_template_cannot_express_is_refused_by_name(template, messages, tools, rule, reason):
    tokenizer = with_template(TEMPLATES.get(template, template))
    with pytest.raises(TemplateRefuses, match=f"^chat: .*{reason}") as refusal:
        encode(tokenizer, messages, tools)
    assert refusal.value.rule == rule


def test_a_system_prompt_that_says_what_the_template_does_is_no_refusal():
    tokenizer = tokenizer_of("qwen3")
    messages = [system("# Tools\n<tools>"), user("user"), assistant("assistant"), user('""'), assistant("<think>")]
    assert encode(tokenizer, messages).ids == transformers_ids(tokenizer, messages)


def test_a_tokenizer_without_a_template_and_unknown_settings_are_errors():
    for make in (ChatEncoder, lambda tokenizer: encode_chat(tokenizer, TALK, False)):
        with pytest.raises(UserError, match="chat: this tokenizer has no chat template"):
            make(with_template(None))
    with pytest.raises(UserError, match="learn: 'first' is invalid"):
        ChatEncoder(tokenizer_of("ours"), "first")


def test_an_encoder_gives_the_same_whatever_it_encoded_before():
    """It remembers what stands between texts."""
    tokenizer = tokenizer_of("qwen3")
    encoder = ChatEncoder(tokenizer)
    both = [user(""), assistant(""), user(""), assistant("")]
    several = [
        THINKING,
        WITH_SYSTEM,
        CALLING,
        both,
        [*CALLING, *THINKING],
        [*WITH_SYSTEM, *CALLING],
        both[:2],
        [*TALK, *both[:2]],
    ]

    def outcome(encoder, messages):
        try:
            return encoder.encode(Dialogue(messages))
        except TemplateRefuses as error:
            return error.rule

    alone = [outcome(ChatEncoder(tokenizer), messages) for messages in several]
    assert [outcome(encoder, messages) for messages in [*several, *several[::-1]]] == [*alone, *alone[::-1]]
