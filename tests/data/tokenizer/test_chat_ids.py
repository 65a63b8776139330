"""A dialogue's ids are transformers', whatever the template does, and no text smuggles in a control token."""

import copy
import re

import pytest
import tokenizers
from hypothesis import given, settings, strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib
from mateconv_jax.data.tokenizer.chat import TemplateRefuses, encode_chat
from tests.data.tokenizer.chat_cases import (
    ADDED,
    ANY_CONTROL,
    CONTROL,
    EACH,
    NAMES,
    PROMPT,
    TEMPLATES,
    assistant,
    call,
    encode,
    learned_texts,
    small_tokenizer,
    system,
    tokenizer_of,
    tool,
    transformers_ids,
    user,
    with_template,
)

# ---- equal to transformers -------------------------------------------------------------------------------------------

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


# ---- templates that look into contents -------------------------------------------------------------------------------


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
