import json

import orjson
import pytest
from hypothesis import given, strategies as st

from mateconv_jax.data.text import duplicates
from mateconv_jax.data.text.cleaning import Cleaner, CleaningOptions, control_token_pattern
from mateconv_jax.data.text.dialogue import Dialogue, as_record, other_texts, texts
from mateconv_jax.data.text.jsonl import parse_line
from mateconv_jax.data.text.rejected import Rejected


def parse(record, ignore=(), text_key="text"):
    line = record if isinstance(record, bytes) else json.dumps(record, ensure_ascii=False).encode()
    return parse_line(line, text_key, ignore)


def dialogue(record, *ignore):
    return parse(record, ignore)[0]


def reject(record, *ignore):
    with pytest.raises(Rejected) as error:
        parse(record, ignore)
    return error.value.rule, str(error.value)


def say(*contents, system=None):
    """Turns of user and assistant."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + turns


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
USER = {"role": "user", "content": "冷吗？"}


# ---- what each schema becomes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("schema, record, messages", [
    ("messages", {"messages": say("你好", "好", system="令"), "id": 7, "source": "网"}, say("你好", "好", system="令")),
    ("messages", {"messages": [{"role": "human", "content": "你好"}, {"role": "gpt", "content": "好"}]}, say("你好", "好")),
    ("conversations", {"conversations": say("你好", "好")}, say("你好", "好")),
    ("sharegpt", {"conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "好"}]}, say("你好", "好")),
    ("sharegpt", {"messages": [{"from": "user", "value": "你好"}, {"from": "bing", "value": "好"}]}, say("你好", "好")),
    ("alpaca", {"instruction": "翻译", "input": "cat", "output": "猫"}, say("翻译\ncat", "猫")),
    ("alpaca", {"instruction": "翻译", "input": "", "output": "猫"}, say("翻译", "猫")),
    ("alpaca", {"instruction": "翻译", "output": "猫", "system": "令"}, say("翻译", "猫", system="令")),
    ("alpaca", {"instruction": "", "input": "李白是谁？", "output": "诗人", "history": []}, say("李白是谁？", "诗人")),
    ("alpaca", {"instruction": None, "input": "李白是谁？", "output": "诗人", "history": None}, say("李白是谁？", "诗人")),
    ("alpaca", {"instruction": "丙", "output": "丁", "history": [["甲", "乙"]], "system": "令"}, say("甲", "乙", "丙", "丁", system="令")),
    ("q/a", {"q": "丙", "a": "丁", "history": [["甲", "乙"], ["子", "丑"]]}, say("甲", "乙", "子", "丑", "丙", "丁")),
    ("q/a", {"q": "丙", "a": "丁", "history": '[["甲", "乙"]]'}, say("甲", "乙", "丙", "丁")),
    ("q/a", {"q": "丙", "a": "丁", "history": "[['甲\\n\"', \"乙's\"], ('子\\\\', '丑')]"}, say("甲\n\"", "乙's", "子\\", "丑", "丙", "丁")),
    ("q/a", {"q": "丙", "a": "丁", "history": "[]"}, say("丙", "丁")),
    ("q/a", {"q": "丙", "a": "丁", "history": ""}, say("丙", "丁")),
    ("prompt/completion", {"prompt": "甲", "completion": "乙"}, say("甲", "乙")),
    ("prompt/response", {"prompt": "丙", "response": "丁", "history": [["甲", "乙"]]}, say("甲", "乙", "丙", "丁")),
    ("query/response", {"query": "甲", "response": "乙", "system": ""}, say("甲", "乙")),
    ("question/answer", {"question": "甲", "answer": "乙", "system": "令"}, say("甲", "乙", system="令")),
    ("conversations", {"conversations": say("甲", "乙"), "system": "令"}, say("甲", "乙", system="令")),  # LLaMA-Factory
])  # fmt: skip
def test_each_schema_becomes_messages(schema, record, messages):
    assert parse(record) == (Dialogue(messages), schema, set())


ROLES = [
    ("human", "user"), ("user", "user"), ("gpt", "assistant"), ("assistant", "assistant"), ("bing", "assistant"),
    ("chatgpt", "assistant"), ("system", "system"), ("tool", "tool"), ("function", "tool"), ("observation", "tool"),
    ("developer", "developer"),
]  # fmt: skip


@pytest.mark.parametrize("role, becomes", ROLES)
def test_roles_are_mapped_in_both_shapes(role, becomes):
    for fields in (("role", "content"), ("from", "value")):
        message = dict(zip(fields, (role, "好"), strict=True))
        assert dialogue({"conversations": [message]}).messages == [{"role": becomes, "content": "好"}]


def test_openai_shapes():
    parts = [{"type": "text", "text": "天气", "image_url": None}, {"type": "text", "text": "？"}]
    record = {"messages": [
        {"role": "user", "content": parts, "name": "小明"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", **CALL}], "refusal": None, "audio": None, "annotations": []},
        {"role": "tool", "content": "晴", "tool_call_id": "1"},
        {"role": "assistant", "reasoning_content": "晴天不冷", "content": "不冷", "weight": 1, "id": "x", "timestamp": 3},
    ], "tools": TOOLS, "parallel_tool_calls": False}  # fmt: skip
    assert dialogue(record) == Dialogue([
        {"role": "user", "content": "天气？", "name": "小明"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "1", **CALL}]},
        {"role": "tool", "content": "晴", "tool_call_id": "1"},
        {"role": "assistant", "content": "不冷", "reasoning_content": "晴天不冷"},
    ], TOOLS)  # fmt: skip


def test_minimind_has_tools_and_calls_as_text_and_the_tools_in_the_system_message():
    record = {"conversations": [
        {"role": "system", "content": "令", "tools": json.dumps(TOOLS), "tool_calls": "", "reasoning_content": ""},
        {"role": "user", "content": "冷吗？", "tools": None, "tool_calls": None},
        {"role": "assistant", "content": "", "tool_calls": json.dumps([{"name": "weather", "arguments": {}}])},
    ]}  # fmt: skip
    calling = {"role": "assistant", "content": "", "tool_calls": [{"name": "weather", "arguments": {}}]}
    assert dialogue(record) == Dialogue([{"role": "system", "content": "令"}, USER, calling], TOOLS)
    del record["conversations"][0]["tools"]
    assert dialogue(record).tools is None
    for key in ("tools", "functions"):
        assert dialogue(record | {key: json.dumps(TOOLS)}).tools == dialogue(record | {key: TOOLS}).tools == TOOLS


def test_sharegpt_calls_functions():
    turns = [
        ("human", "冷吗？"),
        ("function_call", '{"name": "weather", "arguments": {"city": "北京"}}'),
        ("observation", "晴"),
    ]
    record = {"conversations": [{"from": who, "value": value} for who, value in turns], "tools": json.dumps(TOOLS)}
    calling = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert dialogue(record) == Dialogue([USER, calling, {"role": "tool", "content": "晴"}], TOOLS)


# ---- which schema, where a line has the keys of several -----------------------------------------------------------


@pytest.mark.parametrize("schema, record", [
    ("messages", {"text": "文", "messages": say("甲", "乙"), "conversations": say("丙", "丁"), "prompt": "甲", "response": "乙"}),
    ("conversations", {"text": "文", "conversations": say("丙", "丁"), "q": "甲", "a": "乙"}),
    ("text", {"text": "文", "messages": None, "instruction": "甲", "output": "乙", "system": 3, "history": 4}),
    ("prompt/response", {"prompt": "甲", "completion": "丙", "response": "乙", "instruction": "丁", "output": "丑"}),
    ("alpaca", {"text": None, "instruction": "甲", "output": "乙", "q": "丙", "a": "丁"}),
    ("q/a", {"q": "甲", "a": "乙", "question": "丙", "answer": "丁"}),
    ("query/response", {"query": "甲", "response": "乙", "question": "丙", "answer": "丁", "prompt": None}),
])  # fmt: skip
def test_the_first_schema_whose_keys_are_there_is_taken_and_null_is_not_there(schema, record):
    assert parse(record)[1] == schema


def test_the_text_key_means_text():
    assert parse({"prompt": "甲", "response": "乙", "text": "文"}, text_key="prompt") == ("甲", "text", set())


# ---- rejects ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("record, rule, reason", [
    ({"messages": []}, "no_text", "'messages' is empty"),
    ({"messages": {"role": "user"}}, "no_text", "'messages' is not a list but dict"),
    ({"messages": None}, "no_text", "no key 'text' or those of a dialogue (there are: 'messages' (null))"),
    ({"q": "甲"}, "no_text", "no key 'text' or those of a dialogue (there are: 'q')"),
    ({"messages": [USER, "好"]}, "no_text", "message 2 is not an object but str"),
    ({"messages": [USER, {"content": "好"}]}, "no_text", "message 2: 'role' is not text but null"),
    ({"messages": [USER, {"role": "assistant"}]}, "no_text", "message 2: 'content' is not text but null"),
    ({"messages": [USER, {"role": "assistant", "content": 3}]}, "no_text", "message 2: 'content' is not text but int"),
    ({"conversations": [{"from": "human", "value": None}]}, "no_text", "message 1: 'value' is not text but null"),
    ({"messages": [USER, {"role": "<s>user", "content": "好"}]}, "unknown_role", "message 2 has the role '<s>user'"),
    ({"messages": [USER, {"role": "", "content": "好"}]}, "unknown_role", "message 2 has the role ''"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "unsupported_part",
     "message 1, part 1 of 'content' is of type 'image_url'"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "看", "image": "x"}]}]}, "unsupported_field", "'image'"),
    ({"messages": [USER, {"role": "assistant", "content": "好", "function_call": {"name": "f"}}]}, "unsupported_field",
     "message 2 has 'function_call', which would be lost (--ignore_fields drops it)"),
    ({"messages": [USER, {"role": "assistant", "content": "好", "audio": {"id": "x"}}]}, "unsupported_field", "message 2 has 'audio'"),
    ({"messages": [USER, {"role": "assistant", "content": "好", "weight": 0}]}, "unsupported_field",
     "message 2 has 'weight': 0, but would be learned"),
    ({"messages": [USER, {"role": "assistant", "content": "好", "train": False}]}, "unsupported_field", "message 2 has 'train': False"),
    ({"messages": [{"role": "user", "content": "好", "reasoning_content": "想"}]}, "unsupported_field", "message 1 of the user has"),
    ({"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{"type": "function"}]}]}, "unsupported_field",
     "message 2: call 1 of 'tool_calls' names no function"),
    ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": "[]"}]}, "no_text", "message 2: 'content'"),
    ({"messages": [USER, {"role": "assistant", "content": "", "tool_calls": "f()"}]}, "unsupported_field",
     "message 2: 'tool_calls' is text, but not JSON"),
    ({"conversations": [{"from": "function_call", "value": "f()"}]}, "unsupported_field", "message 1: the function_call is text, but"),
    ({"conversations": [{"from": "function_call", "value": '{"tool": "f"}'}]}, "unsupported_field", "{'name', 'arguments'}"),
    ({"messages": [USER], "tools": ["weather"]}, "unsupported_field", "'tools' is not a list of objects"),
    ({"messages": [{**USER, "tools": TOOLS, "functions": TOOLS}]}, "unsupported_field", "message 1 has 'functions'"),
    ({"messages": [{**USER, "tools": TOOLS}], "tools": TOOLS[:1] * 2}, "unsupported_field", "different 'tools'"),
    ({"messages": say("甲", "乙", system="令"), "system": "别的"}, "unsupported_field", "both 'system' and a first message"),
    ({"messages": say("甲", "乙"), "history": [["丙", "丁"]]}, "unsupported_field", "'history' beside 'messages'"),
    ({"instruction": " ", "input": "", "output": "猫"}, "empty", "'instruction' and 'input' are empty"),
    ({"instruction": "翻译", "input": ["cat"], "output": "猫"}, "no_text", "'input' is not text but list"),
    ({"instruction": "翻译", "output": ""}, "empty", "'output' is empty"),
    ({"q": "甲", "a": "乙", "system": ["令"]}, "no_text", "'system' is not text but list"),
    ({"q": "甲", "a": "乙", "history": [["丙", "丁"], ["丙"]]}, "bad_history", "turn 2 of 'history' is not [question, answer]"),
    ({"q": "甲", "a": "乙", "history": [["丙", None]]}, "bad_history", "turn 1 of 'history' is not"),
    ({"q": "甲", "a": "乙", "history": [["丙", ""]]}, "bad_history", "turn 1 of 'history' has an empty"),
    ({"q": "甲", "a": "乙", "history": "没有"}, "no_text", "'history' is text, but not that of a list"),
    ({"q": "甲", "a": "乙", "history": "{}"}, "no_text", "'history' is not a list but dict"),
])  # fmt: skip
def test_what_is_wrong_is_said(record, rule, reason):
    found = reject(record)
    assert found[0] == rule and reason in found[1]


@pytest.mark.parametrize("history", [
    "[__import__('os').system('touch hacked')]", "[open('hacked', 'w')]", "[['甲', '乙'] for _ in '甲']", "[['甲', 9**9**9]]",
    "[f'{open(\"hacked\", \"w\")}']", "[" * 100_000, "(" * 5_000 + ")" * 5_000, "[['甲', '\\ud800']]", "[['甲', '\\N{nothing}']]",
    "['" + "\\'" * 100_000, "[['甲', '乙']]" + " " * 1_000_000, "[['甲', '乙'", "甲, 乙", "['甲'] ['乙']", "-" * 10_000,
    "1+" * 50_000, "[['甲', b'a']]", "[['甲', {'乙'}]]",
])  # fmt: skip
def test_a_text_of_a_list_is_data_and_never_run(tmp_path, monkeypatch, history):
    monkeypatch.chdir(tmp_path)
    assert reject({"q": "甲", "a": "乙", "history": history})[0] == "no_text"
    assert not (tmp_path / "hacked").exists()


def test_tools_of_any_depth_are_read_or_refused():
    def nested(levels):
        return b'{"a":' * levels + b"1" + b"}" * levels

    for levels, taken in [(40, True), (200, False), (1000, False), (100_000, False)]:
        line = b'{"messages": [{"role": "user", "content": "x"}], "tools": [' + nested(levels) + b"]}"
        try:
            assert len(texts(parse(line)[0])) == 1 + levels and taken
        except Rejected:
            assert not taken


# ---- ignored fields -----------------------------------------------------------------------------------------------


def test_ignored_fields_are_dropped_everywhere_and_named():
    part = {"type": "text", "text": "冷吗？", "image": "x"}
    calls = {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "想", "weight": 0, "tools": TOOLS}
    record = {"messages": [{"role": "user", "content": [part]}, calls], "tools": TOOLS, "history": []}
    document, _, dropped = parse(record, ("history", "image", "reasoning_content", "tool_calls", "tools", "weight"))
    assert document == Dialogue([USER, {"role": "assistant", "content": ""}])
    assert dropped == {"image", "reasoning_content", "tool_calls", "tools", "weight"}  # the history was empty
    assert parse({"messages": json.dumps(say("甲", "乙"))}, ("tools",)) == (Dialogue(say("甲", "乙")), "messages", set())
    assert parse({"text": "文", "q": "甲", "a": "乙"}, ("text",)) == (Dialogue(say("甲", "乙")), "q/a", {"text"})


# ---- any line at all ----------------------------------------------------------------------------------------------

words = st.sampled_from([
    "messages", "conversations", "role", "content", "from", "value", "user", "assistant", "tool", "function_call", "text", "q", "a",
    "history", "instruction", "input", "output", "system", "tools", "tool_calls", "function", "name", "arguments", "type", "weight",
    "reasoning_content", "[]", "[['a', 'b']]", '{"name": "f"}', "prompt", "response", "", "\ud800", "<s>user", "你好",
])  # fmt: skip
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=6),
    max_leaves=20,
)
message_like = st.fixed_dictionaries(
    {"role": words | values, "content": words | values},
    optional={field: values for field in ("tool_calls", "tools", "reasoning_content", "name", "weight", "audio")},
)
lines = values | st.fixed_dictionaries(
    {"messages": st.lists(message_like, max_size=3)}, optional={"tools": values, "system": values}
)
CLEANER = Cleaner(CleaningOptions(strip_control_tokens=True), control_token_pattern(["<s>", "</s>"]))


@given(lines, st.sets(words, max_size=3))
def test_any_json_is_a_document_or_a_reject(value, ignored):
    try:
        document, schema, dropped = parse(json.dumps(value).encode(), tuple(sorted(ignored)))
        document, _ = CLEANER.clean(document)
    except Rejected as error:
        assert error.rule and str(error)
        return
    assert dropped <= ignored and (schema == "text") == isinstance(document, str)
    duplicates.document_key(document)
    duplicates.document_text(document).encode()
    if isinstance(document, Dialogue):
        assert all(isinstance(message["role"], str) and isinstance(message["content"], str) for message in document.messages)
        again, _, _ = parse(orjson.dumps(as_record(document)))
        assert again == document


@given(st.text() | st.lists(st.lists(st.text(max_size=5), min_size=2, max_size=2)).map(repr))
def test_any_history_is_read_as_python_reads_it_or_refused(history):
    try:
        messages = dialogue({"q": "问", "a": "答", "history": history}).messages
    except Rejected:
        return
    said = [[messages[i]["content"], messages[i + 1]["content"]] for i in range(0, len(messages) - 2, 2)]
    assert not history or said == eval(history)


# ---- what is compared and cleaned ---------------------------------------------------------------------------------


def test_everything_that_is_written_is_compared():
    base = {
        "messages": [USER, {"role": "assistant", "content": "", "reasoning_content": "想", "tool_calls": [CALL]}],
        "tools": TOOLS,
    }
    others = [base]
    for change in (
        lambda record: record.pop("tools"),
        lambda record: record["messages"][1].pop("reasoning_content"),
        lambda record: record["messages"][1].pop("tool_calls"),
        lambda record: record["messages"][1].update(content="冷"),
        lambda record: record["messages"][0].update(role="system"),
        lambda record: record["messages"][0].update(name="小明"),
        lambda record: record["messages"][1]["tool_calls"][0]["function"]["arguments"].update(city="上海"),
    ):
        change(other := json.loads(json.dumps(base)))
        others.append(other)
    documents = [dialogue(record) for record in others]
    assert len({duplicates.document_key(document) for document in documents}) == len(documents)
    assert len({duplicates.document_text(document) for document in documents}) == len(documents)
    # One turn that looks like two, and a text that looks like a dialogue, are other documents.
    flat = "user\n甲\nassistant\n乙"
    same_text = [Dialogue(say("甲", "乙")), Dialogue(say("甲\nassistant\n乙")), flat]
    assert len({duplicates.document_text(document) for document in same_text}) == 1
    assert len({duplicates.document_key(document) for document in same_text}) == 3


def test_every_text_that_people_write_is_cleaned():
    dirty = "e\u0301\x00<s>"
    calls = [{"function": {"name": "f", "arguments": {dirty: [dirty, " "], "n": 3}}}]
    messages = [{"role": "assistant", "content": f" {dirty} ", "reasoning_content": dirty, "name": dirty, "tool_calls": calls}]
    document, changed = CLEANER.clean(Dialogue(messages, [{"description": dirty}]))
    assert document == Dialogue(
        [{"role": "assistant", "content": "é", "reasoning_content": "é", "name": "é",
          "tool_calls": [{"function": {"name": "f", "arguments": {"é": ["é", " "], "n": 3}}}]}],
        [{"description": "é"}],
    )  # fmt: skip
    assert changed == {"unicode", "control_characters", "control_tokens", "whitespace"}
    assert "é" in other_texts(document) and texts(document)[0] == "é"
    with pytest.raises(Rejected, match="the same"):
        CLEANER.clean(Dialogue(messages, [{"a<s>": 1, "a": 2}]))
    reject_controls = Cleaner(CleaningOptions(control_characters="reject"), control_token_pattern([]))
    with pytest.raises(Rejected, match="U\\+0007"):
        reject_controls.clean(Dialogue(say("好"), [{"description": "\x07"}]))
