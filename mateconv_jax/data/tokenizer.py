"""Training, loading and using a tokenizer. Text is text: what a document or a user writes never becomes a control token.

Tokenizers are transformers' fast tokenizers; a folder holds tokenizer.json, tokenizer_config.json and the chat template.
"""

import hashlib
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from transformers import PreTrainedTokenizerFast

from mateconv_jax.errors import UserError

# Ids 0 to 3, in this order.
SPECIAL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\\n' + message['content'] + '</s>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
)

SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256  # every byte has a token, so that any text can be written


def train(texts: Iterable[str], vocab_size: int, split_digits: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE (Sennrich et al., 2016; GPT-2's bytes and pre-tokenisation) with MateConv's control tokens.

    Args:
      texts: documents as plain text.
      vocab_size: upper bound, at least 260; a small corpus may give fewer merges.
      split_digits: one token a digit; otherwise numbers are merged like words.

    Raises:
      UserError: vocab_size is below 260.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(f"--vocab_size: {vocab_size} is too small (expected at least {SMALLEST_VOCABULARY})")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split_digits:
        digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
        bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, bpe.pre_tokenizer])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),  # minutes for a large corpus
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False, **SPECIAL_TOKENS
    )


def load(folder: str | Path, key: str) -> PreTrainedTokenizerFast:
    """The tokenizer in `folder`. `key` names the flag or configuration key that gave the folder, for the error.

    Raises:
      UserError: no tokenizer there, or one without `<s>` and `</s>`.
    """
    if not (Path(folder) / "tokenizer.json").is_file():
        raise UserError(f"{key}: no tokenizer at {str(folder)!r} (expected a folder with tokenizer.json)")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # the library raises bare Exception for a broken file
        raise UserError(f"{key}: cannot read the tokenizer at {str(folder)!r} ({error})") from error
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise UserError(f"{key}: the tokenizer at {str(folder)!r} has no begin or no end token (expected <s> and </s>)")
    return tokenizer


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Equal for two tokenizers that give equal ids: 16 hex digits of the SHA-256 of the tokenizer's JSON."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Token ids of plain texts; a literal `</s>` in a text is five ordinary characters."""
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False)["input_ids"]


def encode_chat(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], add_generation_prompt: bool) -> list[int]:
    """A dialogue through the tokenizer's chat template. Only the template's own control tokens become control ids.

    The template is rendered around place-holders, and what users wrote is encoded as plain text where those stood. For
    ordinary contents the ids equal transformers' `apply_chat_template`.

    Args:
      messages: [{"role": …, "content": …}, …].
      add_generation_prompt: end with the header of an assistant's answer.

    Raises:
      UserError: the tokenizer has no chat template, or it does not take these messages.
    """
    if not tokenizer.chat_template:
        raise UserError("chat: this tokenizer has no chat template (expected one in tokenizer_config.json)")
    contents = [message["content"] for message in messages]
    hidden = [{**message, "content": f"\ue000{i}\ue001"} for i, message in enumerate(messages)]
    try:
        rendered = tokenizer.apply_chat_template(hidden, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # whatever the template raises
        raise UserError(f"chat: the chat template does not take these messages ({error})") from error
    ids = []
    # re.split alternates the template's text and the numbers of the contents.
    for i, part in enumerate(re.split("\ue000(\\d+)\ue001", rendered)):
        if i % 2:
            ids += encode(tokenizer, [contents[int(part)]])[0]
        else:
            ids += tokenizer(part, add_special_tokens=False, split_special_tokens=False)["input_ids"]
    return ids
