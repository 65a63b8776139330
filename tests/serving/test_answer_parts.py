import json

import pytest

from mateconv_jax.serving.answer_parts import AnswerParts, Part


def parts_of(text, size, **kinds):
    """The parts of a text that arrives `size` characters at a time, those of one kind in a row joined."""
    splitter = AnswerParts(**dict(thinks=False, is_thinking=False, calls=False) | kinds)
    found = [part for start in range(0, len(text), size) for part in splitter.push(text[start : start + size])]
    joined = []
    for part in [*found, *splitter.finish()]:
        if joined and joined[-1].kind == part.kind != "tool_call":
            joined[-1] = Part(part.kind, joined[-1].text + part.text)
        else:
            joined.append(part)
    return joined


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_parts_do_not_depend_on_how_the_text_arrives(size):
    call = {"name": "查", "arguments": {"城市": "北京"}}
    text = (
        f"<think>\n先想 a<b\n</think>\n\n好的 <tool> \n<tool_call>\n{json.dumps(call)}\n</tool_call>\n<tool_call>x</tool_call>"
    )
    reasoning, content, first, broken = parts_of(text, size, thinks=True, calls=True)
    assert reasoning == Part("reasoning", "先想 a<b") and content == Part("content", "好的 <tool>")
    assert first == Part("tool_call", '{"城市": "北京"}', "查") and broken == Part("content", "<tool_call>x</tool_call>")
    assert parts_of("想完</think>好", size, thinks=True, is_thinking=True) == [Part("reasoning", "想完"), Part("content", "好")]
    assert parts_of("没想完", size, is_thinking=True) == [Part("reasoning", "没想完")]
    assert parts_of("好 <think>", size, thinks=True) == [Part("content", "好 <think>")]
    assert parts_of("<tool_call>{", size, calls=True) == [Part("content", "<tool_call>{")]


@pytest.mark.parametrize("size", [1, 5])
def test_a_model_without_these_says_what_it_says(size):
    text = " <think>x</think> <tool_call>{}</tool_call> \n"
    assert parts_of(text, size) == [Part("content", text)]
    assert parts_of("  好 \n", size, thinks=True, calls=True) == [Part("content", "  好 \n")]
