"""Training, loading and using a tokenizer. Text is text: what a document or a user writes never becomes a control token.

Tokenizers are transformers' fast tokenizers; a folder holds tokenizer.json, tokenizer_config.json and the chat template.
"""

import hashlib
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from transformers import PreTrainedTokenizerFast

from mateconv_jax.errors import UserError

# Ids 0 to 3, in this order.
SPECIAL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\\n' + message['content'] + '</s>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
)

CUT = "\ufdd0"  # a place where training texts are cut: a noncharacter, which no text is meant to hold


def train(
    texts: Iterable[str], vocab_size: int, split_digits: bool = False, special_tokens: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Byte-level BPE (Sennrich et al., 2016; GPT-2's bytes and pre-tokenisation) with MateConv's control tokens.

    The same texts in the same order give the same tokenizer, to the byte. The texts are held in memory; for 6,400 tokens the
    trainer takes about 11 MB more for each MB of Chinese text, for 32,000 about 33, and 1 to 2 s.

    Args:
      texts: documents as plain text.
      vocab_size: upper bound, at least 260 and the special tokens; a small corpus may give fewer merges.
      split_digits: one token a digit; otherwise numbers are merged like words.
      special_tokens: further control tokens, such as <think>, with the ids from 4 on.

    Raises:
      UserError: vocab_size is too small; a special token is there already, or is a word that texts can hold.
    """
    pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split_digits:
        digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
        pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, pre_tokenizer])
    control_tokens = list(SPECIAL_TOKENS.values())
    for token in special_tokens:
        if token in control_tokens:
            raise UserError(f"--special_tokens: {token!r} is there already")
        # Merges could make the same piece of a text's word, which would then get the control token's id.
        if len(pre_tokenizer.pre_tokenize_str(token)) < 2:
            raise UserError(f"--special_tokens: {token!r} is an ordinary word of a text (expected a form such as <think>)")
        control_tokens.append(token)
    n_merges = vocab_size - len(control_tokens) - 256  # every byte has a token, so that any text can be written
    if n_merges < 0:
        raise UserError(f"--vocab_size: {vocab_size} is too small (expected at least {vocab_size - n_merges})")

    texts = list(texts)
    start = time.perf_counter()
    _log(f"training on {sum(len(text.encode()) for text in texts) / 1e6:,.1f} MB of text in {len(texts):,} pieces")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=control_tokens,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([tokenizers.pre_tokenizers.Split(CUT, "removed"), pre_tokenizer])
    bpe.train_from_iterator(_cut_at_rare_pairs(texts, n_merges), trainer)
    bpe.pre_tokenizer = pre_tokenizer
    _log(f"{bpe.get_vocab_size():,} tokens after {time.perf_counter() - start:,.1f} s")
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=list(special_tokens),
        **SPECIAL_TOKENS,
    )


def _log(line: str) -> None:
    print(f"tokenizer: {line}", file=sys.stderr, flush=True)  # without a terminal nothing else is seen for a minute


def _cut_at_rare_pairs(texts: list[str], n_merges: int) -> Iterator[str]:
    """The texts, with CUT between documents and inside each pair of Chinese characters that is too rare to be in a token.

    For the byte-level pre-tokeniser a clause is one word, and the trainer's time and memory grow with the distinct words. Cut
    at rare pairs, nearly all words become short, and few are distinct. What BPE merges last is about as frequent as the
    n_merges-th of all characters and pairs; a pair is rare below half of that. 55 MB and 6,400 tokens took 0.7 GB instead of
    3.9 and 52 s of processor time instead of 193; 6,395 tokens were the same. The others join a character to a part of the
    next one: many rare pairs together make those.
    """
    pairs, counts = np.zeros(0, np.uint64), np.zeros(0)
    for codes in _code_points(texts, 1 << 20):
        new, n = np.unique(_han_pairs(codes)[1], return_counts=True)
        pairs, index = np.unique(np.concatenate([pairs, new]), return_inverse=True)
        counts = np.bincount(index, np.concatenate([counts, n]), len(pairs))
    characters = np.bincount((pairs >> np.uint64(32)).astype(np.int64), counts)
    candidates = np.concatenate([counts, characters])
    rare = np.partition(candidates, -n_merges)[-n_merges] / 2 if n_merges < len(candidates) else 0
    frequent = np.append(pairs[counts >= rare], np.uint64(2**64 - 1))  # the last one, so that every search ends inside
    for codes in _code_points(texts, 1 << 12):  # long enough for NumPy, short enough for the trainer's threads
        positions, here = _han_pairs(codes)
        is_rare = frequent[np.searchsorted(frequent, here)] != here
        yield np.insert(codes, positions[is_rare], ord(CUT)).tobytes().decode("utf-32-le")


def _code_points(texts: list[str], at_least: int) -> Iterator[np.ndarray]:
    """(n,) uint32: texts with CUT between them, n >= at_least but for the last."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= at_least:
            yield np.frombuffer(CUT.join(batch).encode("utf-32-le"), np.uint32)
            batch, size = [], 0
    yield np.frombuffer(CUT.join(batch).encode("utf-32-le"), np.uint32)


def _han_pairs(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n,) position of the second of two Chinese characters, and (n,) uint64 the first's code point << 32 | the second's."""
    is_han = ((codes >= 0x3400) & (codes < 0xA000)) | ((codes >= 0x20000) & (codes < 0x32400))
    first = np.flatnonzero(is_han[:-1] & is_han[1:])
    return first + 1, codes[first].astype(np.uint64) << np.uint64(32) | codes[first + 1]


def load(folder: str | Path, key: str, needs_begin: bool = True) -> PreTrainedTokenizerFast:
    """The tokenizer in `folder`. `key` names the flag or configuration key that gave the folder, for the error.

    Raises:
      UserError: no tokenizer there, or one without `</s>`, or without `<s>`, which `needs_begin` (some models have none).
    """
    if not (Path(folder) / "tokenizer.json").is_file():
        raise UserError(f"{key}: no tokenizer at {str(folder)!r} (expected a folder with tokenizer.json)")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # the library raises bare Exception for a broken file
        raise UserError(f"{key}: cannot read the tokenizer at {str(folder)!r} ({error})") from error
    if needs_begin and tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
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
