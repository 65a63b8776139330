"""Records of preferences in the shapes they have elsewhere: two answers to one prompt, the better one and the worse.

TRL's and MiniMind's chosen and rejected, with the prompt in front or inside, as texts or as messages; MateConv's pos and neg.
"""

from mateconv_jax.data.dialogue import Dialogue, Preference
from mateconv_jax.data.text import dialogue_schemas
from mateconv_jax.data.text.dialogue import texts
from mateconv_jax.data.text.dialogue_schemas import text_of
from mateconv_jax.data.text.rejected import Rejected

KEYS = {"chosen", "rejected", "prompt", "pos", "neg", "q"}  # all that are read, beside those of dialogues


def parse(record: dict) -> tuple[str, Preference] | None:
    """The record's schema, and its preference; None where it has no two answers. A key whose value is null is not there.

    Raises:
      Rejected: what is wrong, with the key.
    """

    def has(*keys: str) -> bool:
        return all(record.get(key) is not None for key in keys)

    if has("chosen", "rejected"):
        name = "prompt/chosen/rejected" if has("prompt") else "chosen/rejected"
        answers = [_conversation(record, key) for key in ("chosen", "rejected")]
    elif has("q", "pos", "neg"):
        name = "q/pos/neg"
        answers = [_conversation({**record, "prompt": record["q"]}, key) for key in ("pos", "neg")]
    else:
        return None
    system = dialogue_schemas.system_of(record)
    for messages in answers if system else []:
        if messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        elif messages[0]["content"] != system:
            raise Rejected("unsupported_field", "both 'system' and a first message of the system")
    tools = [dialogue_schemas.all_tools(record, messages) for messages in answers]
    chosen, rejected = (Dialogue(messages, tools) for messages, tools in zip(answers, tools, strict=True))
    return name, Preference(chosen, rejected)


def check(preference: Preference) -> None:
    """Raises Rejected where there is nothing to prefer: the answers are equal, or one of them is empty."""
    n = preference.n_prompt
    if preference.chosen == preference.rejected:
        raise Rejected("equal_answers", "both answers are the same")
    for name, dialogue in (("chosen", preference.chosen), ("rejected", preference.rejected)):
        answer = Dialogue(dialogue.messages[n:])
        if not any(text.strip() for text in texts(answer)):
            raise Rejected("empty", f"the {name} answer is empty")
        if all(message["role"] != "assistant" for message in answer.messages):
            raise Rejected("nothing_to_learn", f"the assistant says nothing in the {name} answer")


def _conversation(record: dict, key: str) -> list[dict]:
    """The prompt and the answer under this key. An answer of several messages may hold the prompt, too."""
    prompt = record.get("prompt")
    if prompt is None:
        return dialogue_schemas.messages_of(record, key)
    if isinstance(prompt, list):
        before = dialogue_schemas.messages_of(record, "prompt")
    else:
        before = [*dialogue_schemas.history_of(record), {"role": "user", "content": text_of(record, "prompt")}]
    if not isinstance(record[key], list):
        return [*before, {"role": "assistant", "content": text_of(record, key)}]
    answer = dialogue_schemas.messages_of(record, key)
    if answer[0]["role"] == "assistant":
        return before + answer
    if before[-1] not in answer[:-1]:
        raise Rejected("unsupported_field", f"{key!r} does not begin with an answer, and the 'prompt' is not in it")
    return answer
