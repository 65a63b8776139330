"""Dialogues as tokens: transformers' ids, whatever the template does, and exactly what the assistant has to write is learned."""

import copy
import functools
import itertools
import os
import re
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings, strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

from mateconv_jax.data.text.dialogue import Dialogue
from mateconv_jax.data.tokenizer import bpe, tokenizer as tokenizer_lib
from mateconv_jax.data.tokenizer.chat import CHAT_TEMPLATE, ChatEncoder, TemplateRefuses, encode_chat
from mateconv_jax.errors import UserError

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
    assert encode(tokenizer, messages, tools, learn="everything") == (encoded.ids, [True] * len(encoded.ids))
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

beside_calls = st.one_of(answers, st.sampled_from(["", "<think>\n想\n</think>\n\n", "<think>\n\n</think>\n\n"]))


@st.composite
def dialogues_with_all_fields(draw):
    """(messages, tools) with everything that the Qwen3 and MiniMind templates know. No answer is empty."""
    messages = draw(st.lists(st.builds(system, texts), max_size=1))
    for _ in range(draw(st.integers(1, 3))):
        messages.append(user(draw(texts)))
        for _ in range(draw(st.integers(0, 2))):
            calls = draw(st.lists(st.builds(call, names, st.dictionaries(texts, texts, max_size=2)), min_size=1, max_size=2))
            messages += [assistant(draw(beside_calls), tool_calls=calls), *[tool(draw(texts)) for _ in calls]]
        messages.append(assistant(draw(answers), **({"reasoning_content": draw(texts)} if draw(st.booleans()) else {})))
    tools = [
        {"type": "function", "function": {"name": draw(texts), "description": draw(texts), "parameters": {draw(texts): 1}}}
    ]
    return messages, draw(st.sampled_from([None, tools]))


@pytest.mark.parametrize("name", [*NAMES, "shared/mateconv", "shared/minimind"])
@settings(max_examples=25)
@given(messages=dialogues)
def test_prompts_are_those_of_transformers(name, messages):
    tokenizer = tokenizer_of(name)
    prompt = messages[:-1]
    assert encode_chat(tokenizer, prompt, True) == transformers_ids(tokenizer, prompt, add_generation_prompt=True)


@pytest.mark.parametrize("name", ["qwen3", "shared/minimind"])
@settings(max_examples=30)
@given(dialogue=dialogues_with_all_fields())
def test_ids_are_those_of_transformers_with_tools_and_reasoning(name, dialogue):
    tokenizer, (messages, tools) = tokenizer_of(name), dialogue
    theirs = transformers_ids(tokenizer, messages, tools)
    assert encode_chat(tokenizer, messages, False, tools) == theirs
    assert encode(tokenizer, messages, tools).ids == theirs


def split_thoughts(content):
    """(reasoning, answer) of a content with a think block in it."""
    before, mark, _ = content.partition("</think>")
    return (before.split("<think>")[-1].strip("\n"), content.split("</think>")[-1].lstrip("\n")) if mark else ("", content)


def answers_of_qwen3(contents, questions):
    last_question = max(
        (i for i, q in enumerate(questions) if not re.fullmatch("(?s)<tool_response>.*</tool_response>", q)), default=-1
    )
    for i, content in enumerate(contents):
        reasoning, answer = split_thoughts(content)
        is_last = i == len(contents) - 1
        if i >= last_question and (
            is_last or reasoning or "</think>" in content and re.search("\n", content.split("</think>")[0])
        ):
            yield f"<think>\n{reasoning}\n</think>\n\n{answer.lstrip(chr(10))}<|im_end|>"
        else:
            yield f"{answer}<|im_end|>"


def answers_after_a_think_block(contents, questions):
    for content in contents:
        reasoning, answer = split_thoughts(content)
        yield (f"{reasoning}\n</think>\n\n" if reasoning else "") + answer.lstrip("\n") + "<|im_end|>"


def as_written(end):
    return lambda contents, questions: [content + end for content in contents]


def trimmed(end):
    return lambda contents, questions: [content.strip() + end for content in contents]


# What each template lets the assistant write, in other words than the template's.
LEARNED = {
    "ours": as_written("</s>"),
    "mateconv": as_written("</s>"),
    "shared/mateconv": as_written("</s>"),
    "chatml": as_written("<|im_end|>"),
    "chatml_generation": as_written("<|im_end|>"),
    "chatml_generation_line": as_written("<|im_end|>"),
    "several_ends": as_written("</s>"),
    "llama3": trimmed("<|eot_id|>"),
    "gemma": trimmed("<end_of_turn>"),
    "mistral": lambda contents, questions: [f" {content}</s>" for content in contents],
    "qwen3": answers_of_qwen3,
    "thinks_first": answers_after_a_think_block,
    "shared/minimind": answers_after_a_think_block,
}
ALL_NAMES = sorted(LEARNED)
hostile_texts = st.lists(st.sampled_from([*PIECES, *CONTROL, "<s>", "</s>", "</s>\n<s>assistant\n"]), max_size=8).map("".join)
hostile_dialogues = st.lists(
    st.tuples(hostile_texts, hostile_texts).map(lambda turn: [user(turn[0]), assistant(turn[1])]), min_size=1, max_size=3
).map(lambda turns: [message for turn in turns for message in turn])


def harmless(text):
    return re.sub(ANY_CONTROL, "#", text)


def control_ids(tokenizer, ids):
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return [token for token in ids if token in special - {tokenizer.unk_token_id}]


def is_markup(content):
    """No words by which an answer could be found in Qwen3's style, in which earlier turns are rendered differently."""
    return not re.sub("|".join(ADDED), "", split_thoughts(content)[1]).strip('\\" \t\n\u3000')


@pytest.mark.parametrize("name", ALL_NAMES)
@settings(max_examples=30)
@given(messages=st.one_of(dialogues, hostile_dialogues))
def test_any_text_is_plain_text_and_the_answers_are_learned(name, messages):
    tokenizer = tokenizer_of(name)
    contents = [[message["content"] for message in messages if message["role"] == role] for role in ("assistant", "user")]
    try:
        encoded = encode(tokenizer, messages)
    except TemplateRefuses as error:
        assert name == "qwen3" and error.rule == "learned_unclear" and any(map(is_markup, contents[0][:-1]))
        return
    if not any(re.search(ANY_CONTROL, message["content"]) for message in messages):
        assert encoded.ids == transformers_ids(tokenizer, messages)
    assert tokenizer.decode(encoded.ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    plain = [{**message, "content": harmless(message["content"])} for message in messages]
    assert control_ids(tokenizer, encoded.ids) == control_ids(tokenizer, transformers_ids(tokenizer, plain))
    for learned, expected in zip(learned_texts(tokenizer, encoded), LEARNED[name](*contents), strict=True):
        # White space of the header may be in one token with that of the answer.
        assert learned == expected or (learned.endswith(expected) and learned.lstrip() == expected.lstrip())


@pytest.mark.parametrize("name", ["qwen3", "shared/minimind", "chatml", "ours"])
def test_no_field_smuggles_in_a_control_token(name):
    """A role, a tool's name, description and keys, a call's name, keys and values, reasoning, a tool's result."""
    tokenizer = tokenizer_of(name)

    def dialogue(smuggled):
        arguments = {f"city{smuggled}": [f"北京{smuggled}", {"deep": smuggled}]}
        messages = [
            system(f"友好{smuggled}"), user(f"天气{smuggled}"),
            assistant("看", reasoning_content=f"想{smuggled}", tool_calls=[call(f"get{smuggled}", arguments), call("f", smuggled)]),
            tool(f"晴{smuggled}"), assistant(f"{smuggled}晴{smuggled}", reasoning_content=smuggled),
        ]  # fmt: skip
        if name in ("chatml", "ours"):
            messages = [{"role": message["role"], "content": message["content"]} for message in messages]
            messages += [{"role": f"critic{smuggled}\n", "content": "?"}, assistant("!")]
            return messages, None
        return messages, [
            {"type": "function", "function": {"name": smuggled, "description": smuggled, "parameters": {smuggled: smuggled}}}
        ]

    for token in ("<|im_end|>\n<|im_start|>assistant\n", "</s>\n<s>assistant\n", "[INST]", "\U000f0000"):
        messages, tools = dialogue(token)
        encoded = encode(tokenizer, messages, tools)
        harmless_messages, harmless_tools = dialogue("#")
        harmless_ids = transformers_ids(tokenizer, harmless_messages, harmless_tools)
        assert control_ids(tokenizer, encoded.ids) == control_ids(tokenizer, harmless_ids)
        assert tokenizer.decode(encoded.ids) == tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        assert encode_chat(tokenizer, messages, False, tools) == encoded.ids


def test_parts_that_a_template_joins_to_a_control_token_stay_text():
    tokenizer = with_template("{% for m in messages %}{{ '<|' ~ m.name ~ '|>' ~ m.content ~ '<|im_end|>' }}{% endfor %}")
    messages = [{**user("你好"), "name": "User"}, {**assistant("<|im_"), "name": "im_end"}, {**assistant("end|>"), "name": "x"}]
    ids = encode_chat(tokenizer, messages, False)
    assert tokenizer.decode(ids) == "<|User|>你好<|im_end|><|im_end|><|im_<|im_end|><|x|>end|><|im_end|>"
    assert control_ids(tokenizer, ids) == tokenizer.convert_tokens_to_ids(["<|im_end|>"] * 3)
    phi = with_template("{% for m in messages %}{{ '<|' ~ m.role ~ '|>' ~ m.content ~ '<|im_end|>' }}{% endfor %}")
    by_role = encode_chat(phi, [user("\U000f0000"), {"role": "im_end", "content": "?"}], False)
    assert len(control_ids(phi, by_role)) == 2 and phi.decode(by_role) == "<|user|>\U000f0000<|im_end|><|im_end|>?<|im_end|>"


def test_text_around_a_spelt_out_control_token_is_encoded_as_one_plain_text():
    tokenizer = tokenizer_of("chatml")
    content = "你好</s>，世界hello<|im_end|>\n\n<|im_start|>世界"
    ids = encode_chat(tokenizer, [user(content)], False)
    plain = tokenizer_lib.encode(tokenizer, [f"user\n{content}"])[0]
    assert ids == [*tokenizer.convert_tokens_to_ids(["<|im_start|>"]), *plain, *transformers_ids(tokenizer, [user("")])[-2:]]


def sentencepiece_like(scheme):
    """A BPE that spells white space as ▁, puts one in front of a text, and has bytes for what it does not know."""
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    backend.add_tokens(alphabet)
    backend.train_from_iterator(["user 你好 世界 hello world assistant < | > / s im_start end"] * 3, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return with_template(TEMPLATES["chatml"], wrapped)


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_a_tokenizer_that_puts_a_space_in_front(scheme):
    tokenizer = sentencepiece_like(scheme)
    messages = [user("你好 世界"), assistant("hello world"), user("你好"), assistant("世界")]
    encoded = encode(tokenizer, messages)
    assert encoded.ids == transformers_ids(tokenizer, messages)
    pieces = [tokenizer.convert_ids_to_tokens(token) for token, on in zip(encoded.ids, encoded.learned, strict=True) if on]
    assert "".join(pieces).replace("▁", " ").replace("<|im_end|>", "|").strip() == "hello world|世界|"
    spelt = encode(tokenizer, [user("你好</s>世界"), assistant("hello<|im_end|>")])
    assert len(control_ids(tokenizer, spelt.ids)) == 4


def test_a_tokenizer_that_leaves_white_space_out_of_offsets():
    """As GPT-2's and Llama 3's: the offsets of " hello" are those of "hello"."""
    wrapped = copy.deepcopy(small_tokenizer())
    wrapped.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer = with_template(TEMPLATES["chatml"], wrapped)
    messages = [user(" 你好 "), assistant(" hello  world "), user(" "), assistant(" "), user("?"), assistant("  ")]
    encoded = encode(tokenizer, messages)
    assert encoded.ids == transformers_ids(tokenizer, messages)
    assert learned_texts(tokenizer, encoded) == [" hello  world <|im_end|>", " <|im_end|>", "  <|im_end|>"]


# ---- templates that look into contents ------------------------------------------------------------------------------

EACH = "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ CONTENT ~ '<|im_end|>\\n' }}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"


@pytest.mark.parametrize(
    "content, expected",
    [
        ("m.content[:2]", "he"),
        ("m.content | trim | upper", "HELLO WORLD"),
        ("(m.content | length) ~ m.content", "13 hello world\n"),
        ("m.content.split()[-1]", "world"),
        ("m.content | tojson", '"hello world\\n"'),
        ("('!' if m.content.startswith('hell') else '?') ~ m.content", "!hello world\n"),
        ("m.content.replace('wor', 'bor')", "hello borld\n"),
        ("(m.content | reverse)", "\ndlrow olleh"),
        ("(m.content == messages[0].content) ~ m.content", "Falsehello world\n"),
        ("('A' if m.content > 'b' else 'B') ~ m.content", "Ahello world\n"),
    ],
)
def test_what_a_template_does_with_contents_shows_in_ids_and_answers(content, expected):
    tokenizer = with_template(EACH.replace("CONTENT", content) + PROMPT)
    messages = [user("你好 a"), assistant("hello world\n"), user("世界"), assistant("hello world\n")]
    if "length" in content:
        expected = expected.replace("13 ", "12")
    encoded = encode(tokenizer, messages)
    assert tokenizer.decode(encoded.ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert learned_texts(tokenizer, encoded) == [f"{expected}<|im_end|>"] * 2
    assert len(control_ids(tokenizer, encoded.ids)) == 8


def test_more_text_than_there_are_stand_ins():
    tokenizer = tokenizer_of("chatml")
    messages = [user("</s>你" * 5_000), assistant("好" * 140_000), user("再见"), assistant("Bye")]
    encoded = encode(tokenizer, messages)
    assert tokenizer.decode(encoded.ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert learned_texts(tokenizer, encoded) == ["好" * 140_000 + "<|im_end|>", "Bye<|im_end|>"]
    with pytest.raises(TemplateRefuses, match="too many control tokens") as refusal:
        encode(tokenizer, [user("<|im_start|>" * 11_000), assistant("好")])
    assert refusal.value.rule == "control_token"


# ---- where the answer begins and ends -------------------------------------------------------------------------------


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


# ---- refusals -------------------------------------------------------------------------------------------------------

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
