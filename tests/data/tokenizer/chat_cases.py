"""Tokenizers, messages and templates that the tests of dialogues share."""

import copy
import functools
import itertools
import os
import re
from pathlib import Path

import pytest
from transformers import AddedToken

from mateconv_jax.data.text.dialogue import Dialogue
from mateconv_jax.data.tokenizer import bpe, tokenizer as tokenizer_lib
from mateconv_jax.data.tokenizer.chat import CHAT_TEMPLATE, ChatEncoder

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
    stretches = itertools.groupby(zip(encoded.ids, encoded.learned, strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in stretch]) for learned, stretch in stretches if learned]


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
# Of one turn, and of the answer to be.
EACH = "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ CONTENT ~ '<|im_end|>\\n' }}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
