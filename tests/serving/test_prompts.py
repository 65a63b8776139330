"""Dialogues with tools and reasoning through templates that have them: the prompt is transformers', the answer is taken apart."""

from types import SimpleNamespace

import pytest

from mateconv_jax.serving.answer_parts import Part
from mateconv_jax.serving.guard import Refusal
from mateconv_jax.serving.limits import Limits
from mateconv_jax.serving.openai_schema import ChatRequest
from mateconv_jax.serving.prompts import Prompts
from tests.data.tokenizer.chat_cases import tokenizer_of

TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "北京"}'}}
DIALOGUE = [
    {"role": "system", "content": "你是助手。"},
    {"role": "user", "content": "北京天气？"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "晴", "tool_call_id": "call_1"},
]
THINKING = {"qwen3": {"enable_thinking": True}, "shared/minimind": {"open_thinking": True}}


@pytest.fixture(params=sorted(THINKING))
def name(request):
    return request.param


def prompts_of(name):
    generator = SimpleNamespace(tokenizer=tokenizer_of(name), model_config=SimpleNamespace(vocab_size=400))
    return Prompts(generator, context=2000, limits=Limits()), generator.tokenizer


def request_of(**fields):
    return ChatRequest.model_validate({"model": "tiny", "messages": DIALOGUE, **fields})


@pytest.mark.parametrize("thinks", [True, False])
def test_tools_and_thinking_are_written_as_transformers_writes_them(name, thinks):
    prompts, tokenizer = prompts_of(name)
    variables = dict.fromkeys(THINKING[name], thinks)
    ids, parts = prompts.chat(request_of(tools=[TOOL], chat_template_kwargs=variables))
    messages = [*DIALOGUE[:2], {**DIALOGUE[2], "content": ""}, DIALOGUE[3]]
    messages[2]["tool_calls"] = [CALL | {"function": {"name": "get_weather", "arguments": {"city": "北京"}}}]
    expected = tokenizer.apply_chat_template(messages, tools=[TOOL], add_generation_prompt=True, return_dict=False, **variables)
    assert ids == expected
    other = {key: not thinks for key in variables}
    assert prompts.chat(request_of(tools=[TOOL], chat_template_kwargs=other))[0] != ids

    begins_inside = tokenizer.decode(ids).rstrip().endswith("<think>")
    answer = "<think>\n" * (thinks and not begins_inside) + "要查。\n</think>\n\n" * thinks + "稍等。"
    found = [
        *parts.push(answer + '\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "上海"}}\n</tool_call>'),
        *parts.finish(),
    ]
    call = Part("tool_call", '{"city": "上海"}', "get_weather")
    assert found == [Part("reasoning", "要查。")] * thinks + [Part("content", "稍等。"), call]


@pytest.mark.parametrize(
    "variables, problem",
    [
        ({"enable_thinkin": True}, "enable_thinkin"),
        ({"messages": "x"}, "messages"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
    ],
)
def test_a_variable_that_the_template_does_not_have_is_refused_by_name(name, variables, problem):
    prompts, _ = prompts_of(name)
    with pytest.raises(Refusal) as refused:
        prompts.chat(request_of(chat_template_kwargs=variables))
    error = refused.value.body["error"]
    assert (error["param"], refused.value.status_code) == ("chat_template_kwargs", 400) and problem in error["message"]


def test_variables_cannot_bring_in_control_tokens():
    prompts, tokenizer = prompts_of("qwen3")
    tokenizer.chat_template += "{{ note }}"
    assert tokenizer.decode(prompts.chat(request_of(chat_template_kwargs={"note": "今天"}))[0]).endswith("今天")
    with pytest.raises(Refusal, match="control tokens"):
        prompts.chat(request_of(chat_template_kwargs={"note": "<|im_end|>"}))
