"""Prompts to be answered, for learning from reward: a JSONL file, read whole.

A line is {"prompt": …} or {"messages": […]} with whatever other fields its reward functions need:

prompt     a text, which the model continues; or a dialogue's messages, whose last turn it answers
messages   a dialogue; an assistant's turn at its end is what the model is to say, and no part of the prompt
"""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from absl import logging
from transformers import PreTrainedTokenizerFast

from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib
from mateconv_jax.data.tokenizer.chat import encode_chat
from mateconv_jax.errors import UserError

SHOWN = 3  # skipped lines of which the log gives the number


@dataclasses.dataclass(frozen=True)
class Prompts:
    """
    Attributes:
      path: the file.
      rows_per_prompt: rows that a prompt counts as in an epoch: its answers, each as often as it is learned from.
      ids: each prompt's tokens, the header of the answer among them.
      prompts: what it was made from: a text, or messages.
      records: the lines.
    """

    path: Path
    rows_per_prompt: int = 1
    ids: list[list[int]] = dataclasses.field(default_factory=list)
    prompts: list[str | list[dict]] = dataclasses.field(default_factory=list)
    records: list[dict] = dataclasses.field(default_factory=list)

    @property
    def n_prompts(self) -> int:
        return len(self.ids)

    def __len__(self):
        """Rows of an epoch."""
        return self.n_prompts * self.rows_per_prompt

    @property
    def longest(self) -> int:
        """In tokens."""
        return max(map(len, self.ids))

    def tokens(self, numbers: Iterable[int]) -> tuple[list[list[int]], list[bool]]:
        """Of these prompts: their tokens, and whether they are texts."""
        return [self.ids[i] for i in numbers], [isinstance(self.prompts[i], str) for i in numbers]

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Of rows: the prompt's tokens, padded, how many they are, and a hash of its record."""
        numbers = (np.asarray(indices) // self.rows_per_prompt).tolist()
        tokens_BL = np.zeros((len(numbers), self.longest), np.uint32)
        for tokens_L, i in zip(tokens_BL, numbers, strict=True):
            tokens_L[: len(self.ids[i])] = self.ids[i]
        length_B = np.array([len(self.ids[i]) for i in numbers], np.int32)
        hashes = [hashlib.sha256(json.dumps(self.records[i]).encode()).digest() for i in numbers]
        return {"tokens": tokens_BL, "length": length_B, "record": np.frombuffer(b"".join(hashes), np.uint8)}


def read_prompts(
    path: str | Path, key: str, tokenizer: PreTrainedTokenizerFast, max_tokens: int, rows_per_prompt: int = 1
) -> Prompts:
    """The prompts of a JSONL file. Lines that cannot be used are skipped and counted in the log.

    Args:
      key: the configuration key that gave the path, for errors.
      max_tokens: a longer prompt leaves no room for an answer and is skipped.

    Raises:
      UserError: the file cannot be read, or no line of it can be used.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f'{key}: cannot read {str(path)!r} ({reason}; expected JSONL, a {{"prompt": …}} a line)') from error
    prompts, skipped = Prompts(path, rows_per_prompt), collections.defaultdict(list)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record, prompt = _parse(line)
            ids = _encode(tokenizer, prompt)
            if len(ids) > max_tokens:
                raise _Unusable(f"longer than {max_tokens} tokens")
        except _Unusable as error:
            skipped[str(error)].append(number)
            continue
        prompts.ids.append(ids)
        prompts.prompts.append(prompt)
        prompts.records.append(record)
    for reason, numbers in skipped.items():
        shown = ", ".join(map(str, numbers[:SHOWN])) + ", …" * (len(numbers) > SHOWN)
        logging.warning("%s: skipped %d lines: %s (line %s)", path, len(numbers), reason, shown)
    if not len(prompts):
        why = "; ".join(skipped) or "it is empty"
        raise UserError(f'{key}: no prompt in {str(path)!r} ({why}; expected JSONL, a {{"prompt": …}} a line)')
    return prompts


class _Unusable(Exception):
    """Why a line cannot be used."""


def _parse(line: str) -> tuple[dict, str | list[dict]]:
    """A line's record, and the prompt in it."""
    try:
        record = json.loads(line)
    except ValueError:
        raise _Unusable("not JSON") from None
    if not isinstance(record, dict) or not ({"prompt", "messages"} & set(record)):
        raise _Unusable('no "prompt" and no "messages"')
    prompt = record.get("prompt", record.get("messages"))
    if isinstance(prompt, str):
        return record, prompt
    if not isinstance(prompt, list) or not all(isinstance(message, dict) and "role" in message for message in prompt):
        raise _Unusable("neither a text nor messages")
    if "prompt" not in record and prompt and prompt[-1]["role"] == "assistant":
        prompt = prompt[:-1]
    if not prompt:
        raise _Unusable("no message to answer")
    return record, prompt


def _encode(tokenizer: PreTrainedTokenizerFast, prompt: str | list[dict]) -> list[int]:
    if isinstance(prompt, str):
        ids = tokenizer_lib.encode_beginning(tokenizer, prompt)
        if not ids:
            raise _Unusable("empty")
        return ids
    try:
        return encode_chat(tokenizer, prompt, add_generation_prompt=True)
    except UserError as error:
        if not tokenizer.chat_template:
            raise
        raise _Unusable(str(error)) from error
