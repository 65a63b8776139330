"""What is learned of a dialogue: exactly what the assistant has to write."""

import pytest
from tokenizers import processors

from mateconv_jax.data.tokenizer import bpe, tokenizer as tokenizer_lib
from tests.data.tokenizer.chat_cases import (
    CALLING,
    CONTROL,
    EACH,
    PROMPT,
    TALK,
    THINKING,
    WEATHER,
    WITH_SYSTEM,
    assistant,
    call,
    encode,
    learned_texts,
    system,
    tokenizer_of,
    tool,
    transformers_ids,
    user,
    with_template,
)

# ---- what is learned, by hand ----------------------------------------------------------------------------------------

PLAIN = [" 你好！\n{end}", "Bye{end}"]
TRIMMED = ["你好！{end}", "Bye{end}"]
EXPECTED = [
    ("ours", WITH_SYSTEM, None, PLAIN, "</s>"),
    ("mateconv", WITH_SYSTEM, None, PLAIN, "</s>"),
    ("mateconv", [assistant("欢迎"), *TALK], None, ["欢迎{end}", *PLAIN], "</s>"),
    ("chatml", WITH_SYSTEM, None, PLAIN, "<|im_end|>"),
    ("chatml", [assistant("欢迎"), *TALK, assistant("?")], None, ["欢迎{end}", *PLAIN, "?{end}"], "<|im_end|>"),
    (
        "chatml",
        [user("user"), assistant("assistant"), user('"'), assistant("")],
        None,
        ["assistant{end}", "{end}"],
        "<|im_end|>",
    ),
    ("chatml_generation", WITH_SYSTEM, None, PLAIN, "<|im_end|>"),
    ("chatml_generation", [user("你好"), assistant("")], None, ["{end}"], "<|im_end|>"),
    ("chatml_generation_line", WITH_SYSTEM, None, PLAIN, "<|im_end|>"),
    ("llama3", WITH_SYSTEM, None, TRIMMED, "<|eot_id|>"),
    (
        "llama3",
        CALLING,
        WEATHER,
        ['{"name": "get_weather", "parameters": {"city": "北京"}}{end}', "是晴天。{end}"],
        "<|eot_id|>",
    ),
    ("mistral", WITH_SYSTEM, None, ["  你好！\n{end}", " Bye{end}"], "</s>"),
    ("gemma", TALK, None, TRIMMED, "<end_of_turn>"),
    ("several_ends", WITH_SYSTEM, None, PLAIN, "</s>"),
    (
        "several_ends",
        [user("?"), assistant("看看", tool_calls=[call("f", {}), call("g", {})]), tool("晴"), assistant("晴天")],
        None,
        ["看看<|call|>f\n{}<|call_end|><|call|>g\n{}<|call_end|><|calls_end|></s>", "晴天</s>"],
        "",
    ),
    # The reasoning of the first answer is not in the rendering, and the last answer has a think block in any case.
    ("qwen3", THINKING, None, ["2{end}", "<think>\n二\n</think>\n\n4{end}"], "<|im_end|>"),
    ("qwen3", WITH_SYSTEM, None, [PLAIN[0], "<think>\n\n</think>\n\nBye{end}"], "<|im_end|>"),
    (
        "qwen3",
        [system("你很友好。"), *CALLING],
        WEATHER,
        [
            '<tool_call>\n{"name": "get_weather", "arguments": {"city": "北京"}}\n</tool_call>{end}',
            "<think>\n\n</think>\n\n是晴天。{end}",
        ],
        "<|im_end|>",
    ),
    # The generation prompt has the beginning of the think block, and all of an empty one.
    ("thinks_first", THINKING, None, ["一\n</think>\n\n2{end}", "二\n</think>\n\n4{end}"], "<|im_end|>"),
    ("thinks_first", WITH_SYSTEM, None, PLAIN, "<|im_end|>"),
    ("shared/mateconv", WITH_SYSTEM, None, PLAIN, "</s>"),
    ("shared/minimind", WITH_SYSTEM, None, PLAIN, "<|im_end|>"),
    ("shared/minimind", THINKING, None, ["一\n</think>\n\n2{end}", "二\n</think>\n\n4{end}"], "<|im_end|>"),
    (
        "shared/minimind",
        [system("你很友好。"), *CALLING],
        WEATHER,
        ['<tool_call>\n{"name": "get_weather", "arguments": {"city": "北京"}}\n</tool_call>{end}', "是晴天。{end}"],
        "<|im_end|>",
    ),
]


@pytest.mark.parametrize(
    "name, messages, tools, expected, end", EXPECTED, ids=[f"{i}-{row[0]}" for i, row in enumerate(EXPECTED)]
)
def test_exactly_what_the_assistant_has_to_write_is_learned(name, messages, tools, expected, end):
    tokenizer = tokenizer_of(name)
    expected = [text.replace("{end}", end) for text in expected]
    encoded = encode(tokenizer, messages, tools)
    assert encoded.ids == transformers_ids(tokenizer, messages, tools)
    assert learned_texts(tokenizer, encoded) == expected
    assert encode(tokenizer, messages, tools, learn="everything") == (encoded.ids, [True] * len(encoded.ids))
    last = encode(tokenizer, messages, tools, learn="last")
    assert last.ids == encoded.ids
    assert learned_texts(tokenizer, last) == expected[-1:]


# ---- where the answer begins and ends --------------------------------------------------------------------------------


@pytest.mark.parametrize("name, learned_more", [("chatml_generation", ["<|im_end|>"] * 2), ("chatml_generation_line", [])])
def test_blocks_that_a_template_marks_are_learned_with_their_end_token(name, learned_more):
    tokenizer = tokenizer_of(name)
    encoded = encode(tokenizer, WITH_SYSTEM)
    theirs = tokenizer.apply_chat_template(WITH_SYSTEM, return_assistant_tokens_mask=True)["assistant_masks"]
    ours_alone = [i for i, (ours, mark) in enumerate(zip(encoded.learned, theirs, strict=True)) if ours and not mark]
    theirs_alone = [i for i, (ours, mark) in enumerate(zip(encoded.learned, theirs, strict=True)) if mark and not ours]
    assert tokenizer.convert_ids_to_tokens([encoded.ids[i] for i in ours_alone]) == learned_more
    assert tokenizer.decode([encoded.ids[i] for i in theirs_alone]) == ("" if learned_more else "\n\n")


WITHOUT_CALLS = (
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' }}"
    "{% if m.role == 'assistant' and m.content %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}"
    "{% if m.tool_calls %}{{ '<tool_call>' ~ m.tool_calls | tojson ~ '</tool_call>' }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
)


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_a_block_that_leaves_calls_out_is_taken_at_its_word(trim_offsets):
    """The end token is learned all the same; nothing is of a turn that has no block. (And no generation prompt is needed.)"""
    tokenizer = with_template(WITHOUT_CALLS)
    if trim_offsets:
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    messages = [user("?"), assistant("看 ", tool_calls=[call("f", {})]), tool("晴"), assistant("", tool_calls=[call("g", {})])]
    encoded = encode(tokenizer, messages)
    assert encoded.ids == transformers_ids(tokenizer, messages)
    assert learned_texts(tokenizer, encoded) == ["看 ", "<|im_end|>"]


def test_without_a_generation_prompt_the_header_is_learned_too():
    """At inference nobody else writes it."""
    tokenizer = with_template(EACH.replace("CONTENT", "m.content"))
    expected = ["<|im_start|>assistant\n你好<|im_end|>", "<|im_start|>assistant\nBye<|im_end|>"]
    assert learned_texts(tokenizer, encode(tokenizer, [user("?"), assistant("你好"), user("!"), assistant("Bye")])) == expected


def test_a_token_over_the_border_is_learned_if_any_of_it_is():
    merged = bpe.train(["\n\n\n\n" * 9, "你好"] * 9, 300, special_tokens=CONTROL)
    assert len(tokenizer_lib.encode(merged, ["\n\n\n"])[0]) < 3
    tokenizer = with_template(EACH.replace("CONTENT", "m.content") + PROMPT, merged)
    (learned,) = learned_texts(tokenizer, encode(tokenizer, [user("?"), assistant("\n\n\n你好")]))
    assert learned == "\n\n\n\n你好<|im_end|>"  # one of them is the header's


def test_an_end_of_the_whole_is_not_looked_for_behind_each_turn():
    """Phi-3's style."""
    closing = "{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
    turn = "{{ ('<|Assistant|>' if m.role == 'assistant' else '<|User|>') ~ m.content ~ '<|im_end|>' }}"
    tokenizer = with_template("{% for m in messages %}" + turn + "{% endfor %}" + closing)
    encoded = encode(tokenizer, TALK)
    assert learned_texts(tokenizer, encoded) == [" 你好！\n<|im_end|>", "Bye<|im_end|></s>"]
