"""Dialogues as tokens: transformers' ids, whatever the template does, and exactly what the assistant has to write is learned."""

import copy
import functools
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from transformers import AddedToken

from mateconv_jax.data.text.dialogue import Dialogue
from mateconv_jax.data.tokenizer import bpe, tokenizer as tokenizer_lib
from mateconv_jax.data.tokenizer.chat import CHAT_TEMPLATE, ChatEncoder, encode_chat

SHARED = Path(os.environ.get("MATECONV_SHARED", Path(__file__).parents[4] / "shared")) / "tokenizers"
TEMPLATES = {path.stem: path.read_text() for path in (Path(__file__).parent / "templates").glob("*.jinja")}
TEMPLATES["ours"] = CHAT_TEMPLATE
NAMES = sorted(TEMPLATES)
CONTROL = """<|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> <start_of_turn> <end_of_turn> [INST] [/INST]
    <|User|> <|Assistant|> <|call|> <|call_end|> <|calls_end|> <|output|>""".split()
ANY_CONTROL = "|".join(map(re.escape, [*CONTROL, "<s>", "</s>"]))
ADDED = "<think> </think> <tool_call> </tool_call> <tool_response> </tool_response>".split()


@functools.cache
def small_tokenizer():
    texts = [
        "user assistant system\n你好，世界。\n",
        '{"name": "get_weather", "arguments": {"city": "北京"}}',
        "hello world  \n\n",
    ]
    trained = bpe.train(texts * 5, 400, special_tokens=CONTROL)
    trained.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED])
    return trained


@functools.cache
def tokenizer_of(name):
    """The small tokenizer with one of the templates, or one that users have. (No fixture: Hypothesis would print it.)"""
    if not name.startswith("shared/"):
        return with_template(TEMPLATES[name])
    folder = SHARED / name.removeprefix("shared/")
    if not folder.is_dir():
        pytest.skip("the tokenizers that users have are not here")
    return tokenizer_lib.load(folder, "")


def with_template(template, tokenizer=None):
    tokenizer = copy.deepcopy(tokenizer or small_tokenizer())
    tokenizer.chat_template = template
    return tokenizer


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def system(content):
    return {"role": "system", "content": content}


def tool(content):
    return {"role": "tool", "content": content}


def call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def transformers_ids(tokenizer, messages, tools=None, **options):
    return tokenizer.apply_chat_template(messages, tools=tools, return_dict=False, **options)


def encode(tokenizer, messages, tools=None, learn="assistant"):
    return ChatEncoder(tokenizer, learn).encode(Dialogue(messages, tools))


def learned_texts(tokenizer, encoded):
    """The stretches of learned tokens, decoded."""
    stretches, before = [], False
    for token, learned in zip(encoded.ids, encoded.learned, strict=True):
        if learned:
            stretches = [*stretches[:-1], [*stretches[-1], token]] if before else [*stretches, [token]]
        before = learned
    return [tokenizer.decode(stretch) for stretch in stretches]


# ---- what is learned, by hand ---------------------------------------------------------------------------------------

WEATHER = [{"type": "function", "function": {"name": "get_weather", "description": "天气", "parameters": {"type": "object"}}}]
TALK = [user("你好"), assistant(" 你好！\n"), user("再见"), assistant("Bye")]
WITH_SYSTEM = [system("你很友好。"), *TALK]
CALLING = [
    user("北京天气？"),
    assistant("", tool_calls=[call("get_weather", {"city": "北京"})]),
    tool("晴"),
    assistant("是晴天。"),
]
THINKING = [
    user("1+1"),
    assistant("<think>\n一\n</think>\n\n2"),
    user("2+2"),
    assistant("4", reasoning_content="二"),
]
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
    last = encode(tokenizer, messages, tools, learn="last")
    assert last.ids == encoded.ids
    assert learned_texts(tokenizer, last) == expected[-1:]


# ---- equal to transformers ------------------------------------------------------------------------------------------

PIECES = [
    *ADDED, "你好", "hello", " ", "\n", "\n\n", '"', "\\", "{}", "'", "user", "assistant", "system\n", "\t", "\u3000", "é", "𠮷",
    "\ue0000\ue001", "\U000f0000", "\U0010ffff", "<", "<|", "</s", "im_start|>", "1", "tool",
]  # fmt: skip
texts = st.lists(st.sampled_from(PIECES), max_size=8).map("".join).filter(lambda text: not re.search(ANY_CONTROL, text))
said = st.one_of(texts, texts.map(lambda text: f"<think>\n{text}\n</think>\n\n{text}"))
turns = st.tuples(texts, said).map(lambda turn: [user(turn[0]), assistant(turn[1])])
dialogues = st.lists(turns, min_size=1, max_size=3).map(lambda turns: [message for turn in turns for message in turn])


names = texts.map(lambda text: f"f{text}")
answers = st.builds(str.__add__, said, st.sampled_from(["。", '"好"\n', " ok"]))


@st.composite
def dialogues_with_all_fields(draw):
    """(messages, tools) with everything that the Qwen3 and MiniMind templates know. No answer is empty."""
    messages = draw(st.lists(st.builds(system, texts), max_size=1))
    for _ in range(draw(st.integers(1, 3))):
        messages.append(user(draw(texts)))
        for _ in range(draw(st.integers(0, 2))):
            calls = draw(st.lists(st.builds(call, names, st.dictionaries(texts, texts, max_size=2)), min_size=1, max_size=2))
            messages += [assistant(draw(said), tool_calls=calls), *[tool(draw(texts)) for _ in calls]]
        messages.append(assistant(draw(answers), **({"reasoning_content": draw(texts)} if draw(st.booleans()) else {})))
    tools = [
        {"type": "function", "function": {"name": draw(texts), "description": draw(texts), "parameters": {draw(texts): 1}}}
    ]
    return messages, draw(st.sampled_from([None, tools]))


@pytest.mark.parametrize("name", [*NAMES, "shared/mateconv", "shared/minimind"])
@settings(max_examples=25)
@given(messages=dialogues)
def test_ids_are_those_of_transformers(name, messages):
    tokenizer = tokenizer_of(name)
    assert encode(tokenizer, messages).ids == transformers_ids(tokenizer, messages)
    prompt = messages[:-1]
    assert encode_chat(tokenizer, prompt, True) == transformers_ids(tokenizer, prompt, add_generation_prompt=True)


@pytest.mark.parametrize("name", ["qwen3", "shared/minimind"])
@settings(max_examples=40)
@given(dialogue=dialogues_with_all_fields())
def test_ids_are_those_of_transformers_with_tools_and_reasoning(name, dialogue):
    tokenizer, (messages, tools) = tokenizer_of(name), dialogue
    theirs = transformers_ids(tokenizer, messages, tools)
    assert encode_chat(tokenizer, messages, False, tools) == theirs
    assert encode(tokenizer, messages, tools).ids == theirs
