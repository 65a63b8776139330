"""Reward functions for `reward.functions`: (prompts, completions, records) -> a float for each completion.

    --config.reward.functions='("mateconv_jax.rewards:number_match",)'

A record is the line of the prompts' file that the prompt is from. What it should be answered is its "answer", or else the
assistant's turn at the end of its "messages".
"""

import re

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def exact_match(prompts: list, completions: list[str], records: list[dict]) -> list[float]:
    """1 where the answer is the expected one, white space at its ends aside; else 0."""
    return [float(text.strip() == expected(record).strip()) for text, record in zip(completions, records, strict=True)]


def number_match(prompts: list, completions: list[str], records: list[dict]) -> list[float]:
    """1 where the last number in the answer equals the last one in what is expected; else 0. Commas within numbers are ignored.

    Raises:
      ValueError: what is expected holds no number.
    """
    return [float(last_number(text) == _expected_number(record)) for text, record in zip(completions, records, strict=True)]


def pattern_match(prompts: list, completions: list[str], records: list[dict]) -> list[float]:
    """1 where the whole answer matches the regular expression in the record's "pattern"; else 0."""
    return [
        float(re.fullmatch(record["pattern"], text, re.DOTALL) is not None)
        for text, record in zip(completions, records, strict=True)
    ]


def ended(prompts: list, completions: list, records: list[dict]) -> list[float]:
    """1 where the model ended the answer itself; 0 where it ran into rollout.max_new_tokens."""
    return [float(completion.finish_reason == "eos") for completion in completions]


def expected(record: dict) -> str:
    """Raises ValueError if the record does not say."""
    if "answer" in record:
        return str(record["answer"])
    messages = record.get("messages") or [{}]
    if messages[-1].get("role") != "assistant":
        raise ValueError('the record has no "answer", and its "messages" do not end with an assistant\'s turn')
    return messages[-1]["content"]


def last_number(text: str) -> float | None:
    numbers = NUMBER.findall(re.sub(r"(?<=\d)[,，](?=\d{3})", "", text))
    return float(numbers[-1]) if numbers else None


def _expected_number(record: dict) -> float:
    number = last_number(expected(record))
    if number is None:
        raise ValueError(f"no number in {expected(record)!r}")
    return number
