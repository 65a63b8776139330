"""Contexts and answers as token ids, cut as lm_eval cuts them."""

import dataclasses

import numpy as np
from transformers import PreTrainedTokenizerFast

from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib
from mateconv_jax.data.tokenizer.chat import encode_chat
from mateconv_jax.errors import UserError
from mateconv_jax.tasks.prompts import Prompt

AT_ONCE = 512  # prompts: the ids of all 11,582 of CMMLU with five examples would be 1.6 GB of Python's integers


@dataclasses.dataclass(frozen=True)
class Scored:
    """An answer in its context.

    Attributes:
      ids: int32, of both.
      n_answer: tokens of the answer, at the end.
      is_truncated: the context has lost its beginning.
    """

    ids: np.ndarray
    n_answer: int
    is_truncated: bool


def encode(tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt], max_seq_len: int) -> list[list[Scored]]:
    """Each prompt's answers.

    As in lm_eval with add_bos_token: a text begins with <s>, where the tokenizer has it; white space at the context's end goes
    to the answer; both are encoded together, and the answer is what is behind the context's own tokens; of what does not fit
    the model, max_seq_len inputs and one more target, the beginning is cut off, <s> included.

    Other than there, control tokens that a text spells out are plain characters. And where a token begins in the context and
    ends in an answer, as in Chinese, which has no spaces (位于 and 欧洲 may be one), all answers to the question count from
    the last token that they share with the context: lm_eval drops what such a token has of the answer.

    Raises:
      UserError: an answer has no tokens, or more than max_seq_len.
    """
    found = []
    for start in range(0, len(prompts), AT_ONCE):
        found += _encode(tokenizer, prompts[start : start + AT_ONCE], max_seq_len)
    return found


def _encode(tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt], max_seq_len: int) -> list[list[Scored]]:
    pairs = [[_moved_space(prompt.context, answer) for answer in prompt.answers] for prompt in prompts]
    texts = {text for pair in pairs for context, answer in pair for text in (context, context + answer)}
    ids_of = dict(zip(texts, tokenizer_lib.encode(tokenizer, list(texts)), strict=True)) if texts else {}
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    found = []
    for prompt, pair in zip(prompts, pairs, strict=True):
        if isinstance(prompt.context, list):
            ids = encode_chat(tokenizer, prompt.context, add_generation_prompt=True)
            end = _without_space(tokenizer, ids)  # there, too
            whole = [(ids[:end], ids[end:] + ids_of[answer]) for _, answer in pair]
        else:
            both = [begin + ids_of[context + answer] for context, answer in pair]
            end = min(_shared(begin + ids_of[context], ids) for (context, _), ids in zip(pair, both, strict=True))
            whole = [(ids[:end] or [tokenizer.eos_token_id], ids[end:]) for ids in both]
        found.append([_fitted(prompt, read, answer_ids, max_seq_len) for read, answer_ids in whole])
    return found


def _moved_space(context: str | list[dict], answer: str) -> tuple[str, str]:
    """White space at the context's end belongs to the answer: tokens of words begin with their space."""
    if isinstance(context, list):
        return "", answer
    stripped = context.rstrip()
    return stripped, context[len(stripped) :] + answer


def _shared(context: list[int], whole: list[int]) -> int:
    """How many tokens `whole` has of the context, at most all but its last."""
    n = next((i for i, (a, b) in enumerate(zip(context, whole, strict=False)) if a != b), min(len(context), len(whole)))
    return min(n, len(whole) - 1)


def _without_space(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> int:
    """How many tokens there are before the white space at the end."""
    end = len(ids)
    while end > 1 and str(tokenizer.decode(ids[end - 1 : end])).isspace():
        end -= 1
    return end


def _fitted(prompt: Prompt, read: list[int], answer: list[int], max_seq_len: int) -> Scored:
    where = prompt.question.where
    if not answer:
        raise UserError(f"{where}: an answer has no tokens of its own")
    if len(answer) > max_seq_len:
        raise UserError(f"{where}: an answer has {len(answer)} tokens, more than the model's context of {max_seq_len}")
    ids = read + answer
    return Scored(np.array(ids[-(max_seq_len + 1) :], np.int32), len(answer), len(ids) > max_seq_len + 1)
