"""Shapes of preferences, as two dialogues with one prompt."""

import json

import pytest

from mateconv_jax.data.dialogue import Dialogue, Preference
from mateconv_jax.data.text import preference_schemas
from mateconv_jax.data.text.dialogue import as_record
from mateconv_jax.data.text.jsonl import parse_line
from mateconv_jax.data.text.rejected import Rejected


def says(role, content):
    return {"role": role, "content": content}


ASK, GOOD, BAD = says("user", "几点了？"), says("assistant", "三点。"), says("assistant", "不知道。")
EARLIER = [says("user", "在吗？"), says("assistant", "在。")]


def parsed(record):
    document, schema, _ = parse_line(json.dumps(record, ensure_ascii=False).encode(), "text")
    if isinstance(document, Preference):
        preference_schemas.check(document)
    return document, schema


@pytest.mark.parametrize(
    "record, name, prompt",
    [
        ({"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, "chosen/rejected", [ASK]),  # MiniMind; TRL's implicit prompt
        ({"chosen": [*EARLIER, ASK, GOOD], "rejected": [*EARLIER, ASK, BAD]}, "chosen/rejected", [*EARLIER, ASK]),
        ({"prompt": "几点了？", "chosen": "三点。", "rejected": "不知道。"}, "prompt/chosen/rejected", [ASK]),
        ({"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}, "prompt/chosen/rejected", [ASK]),
        ({"prompt": "几点了？", "chosen": [GOOD], "rejected": [BAD]}, "prompt/chosen/rejected", [ASK]),
        # UltraFeedback: the prompt, and dialogues that hold it
        ({"prompt": "几点了？", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, "prompt/chosen/rejected", [ASK]),
        ({"q": "几点了？", "history": [["在吗？", "在。"]], "pos": "三点。", "neg": "不知道。"}, "q/pos/neg", [*EARLIER, ASK]),
        ({"q": "几点了？", "history": "[]", "pos": "三点。", "neg": "不知道。"}, "q/pos/neg", [ASK]),
        ({"system": "简短。", "prompt": "几点了？", "chosen": "三点。", "rejected": "不知道。"}, "prompt/chosen/rejected",
         [says("system", "简短。"), ASK]),
        ({"chosen": json.dumps([ASK, GOOD]), "rejected": str([ASK, BAD])}, "chosen/rejected", [ASK]),  # from a CSV file
        ({"conversations": None, "chosen": [{"from": "human", "value": "几点了？"}, {"from": "gpt", "value": "三点。"}],
          "rejected": [{"from": "human", "value": "几点了？"}, {"from": "gpt", "value": "不知道。"}]}, "chosen/rejected", [ASK]),
    ],
)  # fmt: skip
def test_a_preference_is_a_prompt_and_two_answers(record, name, prompt):
    assert parsed(record) == (Preference(Dialogue([*prompt, GOOD]), Dialogue([*prompt, BAD])), name)


def test_a_dialogue_or_a_text_stays_one_whatever_answers_stand_beside_it():
    answers = {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}
    assert parsed({"messages": [ASK, GOOD], **answers}) == (Dialogue([ASK, GOOD]), "messages")
    assert parsed({"text": "春天", **answers}) == ("春天", "text")
    assert parsed({"prompt": "几点了？", "response": "三点。", "chosen": "三点。"})[1] == "prompt/response"


@pytest.mark.parametrize(
    "record, rule, reason",
    [
        ({"chosen": [ASK, GOOD], "rejected": [ASK, GOOD]}, "equal_answers", "both answers are the same"),
        ({"chosen": [ASK, GOOD], "rejected": [ASK, says("assistant", " ")]}, "empty", "the rejected answer is empty"),
        ({"chosen": [ASK], "rejected": [ASK, BAD]}, "empty", "the chosen answer is empty"),
        ({"prompt": "几点了？", "chosen": "", "rejected": "不知道。"}, "empty", "'chosen' is empty"),
        (
            {"chosen": [ASK, GOOD], "rejected": [ASK, ASK]},
            "nothing_to_learn",
            "the assistant says nothing in the rejected answer",
        ),
        ({"chosen": "三点。", "rejected": "不知道。"}, "no_text", "'chosen' is text, but not that of a list"),
        ({"prompt": "早", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, "unsupported_field", "the 'prompt' is not in it"),
        ({"prompt": "几点了？", "chosen": 3, "rejected": "不知道。"}, "no_text", "'chosen' is not text but int"),
        ({"q": "几点了？", "pos": "三点。", "neg": "四点。", "history": [["早"]]}, "bad_history", "turn 1 of 'history'"),
    ],
)
def test_what_is_no_preference_is_refused(record, rule, reason):
    with pytest.raises(Rejected, match=reason) as caught:
        parsed(record)
    assert caught.value.rule == rule


def test_a_preference_is_the_same_when_it_is_written_and_read_again():
    tools = [{"type": "function", "function": {"name": "clock"}}]
    preference = Preference(Dialogue([ASK, GOOD], tools), Dialogue([ASK, BAD], tools))
    assert parsed(as_record(preference))[0] == preference
