"""Training a byte-level BPE tokenizer."""

import functools
import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import tokenizers
from transformers import PreTrainedTokenizerFast

from mateconv_jax.data.tokenizer.chat import CHAT_TEMPLATE
from mateconv_jax.data.tokenizer.tokenizer import SPECIAL_TOKENS
from mateconv_jax.errors import UserError

LONGEST_WORD = 1000  # characters
CUT = "\ufdd0"  # a place where training texts are cut: a noncharacter, which no text is meant to hold


def train(
    texts: Iterable[str],
    vocab_size: int,
    split_digits: bool = False,
    special_tokens: Sequence[str] = (),
    max_token_bytes: int | None = None,
) -> PreTrainedTokenizerFast:
    """Byte-level BPE (Sennrich et al., 2016; GPT-2's bytes and pre-tokenisation) with MateConv's control tokens.

    The same texts in the same order give the same tokenizer, to the byte. The texts are held in memory; for 6,400 tokens the
    trainer takes about 11 MB more for each MB of Chinese text, for 32,000 about 33, and 1 to 2 s.

    Args:
      texts: documents as plain text.
      vocab_size: upper bound, at least 260 and the special tokens; a small corpus may give fewer merges.
      split_digits: one token a digit; otherwise numbers are merged like words.
      special_tokens: further control tokens, such as <think>, with the ids from 4 on.
      max_token_bytes: of UTF-8; None: no limit. Chinese has no spaces, so in a small or repetitive corpus whole clauses become
        tokens, of which a model cannot learn what is said of the words in them. 6 are two characters.

    Raises:
      UserError: vocab_size is too small; a special token is there already, or is a word that texts can hold.
    """
    pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split_digits:
        digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
        pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, pre_tokenizer])
    control_tokens = _control_tokens(special_tokens, pre_tokenizer)
    n_merges = vocab_size - len(control_tokens) - 256  # every byte has a token, so that any text can be written
    if n_merges < 0:
        raise UserError(f"--vocab_size: {vocab_size} is too small (expected at least {vocab_size - n_merges})")
    if max_token_bytes is not None and max_token_bytes < 1:
        raise UserError(f"--max_token_bytes: {max_token_bytes} is invalid (expected at least 1)")

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
        max_token_length=max_token_bytes,
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


def _control_tokens(special_tokens: Sequence[str], pre_tokenizer) -> list[str]:
    """MateConv's, then `special_tokens`."""
    control_tokens = list(SPECIAL_TOKENS.values())
    for token in special_tokens:
        if token in control_tokens:
            raise UserError(f"--special_tokens: {token!r} is there already")
        # Merges could make the same piece of a text's word, which would then get the control token's id.
        if len(pre_tokenizer.pre_tokenize_str(token)) < 2:
            raise UserError(f"--special_tokens: {token!r} is an ordinary word of a text (expected a form such as <think>)")
        control_tokens.append(token)
    return control_tokens


def _log(line: str) -> None:
    print(f"tokenizer: {line}", file=sys.stderr, flush=True)  # without a terminal nothing else is seen for a minute


def _cut_at_rare_pairs(texts: list[str], n_merges: int) -> Iterator[str]:
    """The texts, with CUT between documents, inside each pair of Chinese characters that is too rare to be in a token, and in
    words without end.

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
        cuts = np.union1d(positions[is_rare], _cuts_of_long_words(codes))
        yield np.insert(codes, cuts, ord(CUT)).tobytes().decode("utf-32-le")


@functools.cache
def _word_classes() -> np.ndarray:
    """(0x20001,) uint8: GPT-2's pre-tokeniser makes a word of a run of letters, numbers, spaces or others; CUT is alone. The
    last one stands for all code points from there on, ideographs.
    """
    classes = {"L": 1, "N": 2}
    table = np.array([classes.get(unicodedata.category(chr(code))[0], 0) for code in range(0x20001)], np.uint8)
    table[[code for code in range(0x3001) if chr(code).isspace()]] = 3
    table[ord(CUT)] = 4
    return table


def _cuts_of_long_words(codes: np.ndarray) -> np.ndarray:
    """(n,) positions, LONGEST_WORD apart within a word: the trainer's time grows with the square of a word's length."""
    classes = _word_classes()[np.minimum(codes, 0x20000)]
    starts = np.flatnonzero(np.diff(classes, prepend=255))
    lengths = np.diff(starts, append=len(codes))
    if not len(codes) or lengths.max() <= LONGEST_WORD:
        return np.zeros(0, np.int64)
    place = np.arange(len(codes)) - np.repeat(starts, lengths)
    return np.flatnonzero((place % LONGEST_WORD == 0) & (place > 0))


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
