"""How many bytes of text each token writes. Losses in bits per byte compare models whose tokenizers differ."""

import re
from typing import TYPE_CHECKING

import numpy as np

from mateconv_jax.data.rows import Batch, learned_targets
from mateconv_jax.data.tokenizer.pieces import BYTES, is_byte_level, readable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def bytes_per_token(tokenizer: "PreTrainedTokenizerFast") -> np.ndarray:
    """Bytes of UTF-8 that each token writes, (largest id + 1,) int32; 0 for control tokens.

    A byte-level vocabulary's are exact, parts of a character included: the tokens of a text sum to its bytes. In any other
    kind of vocabulary they are those of the text that the tokenizer makes of the token behind another one. There an unknown
    token counts nothing, and a normaliser's changes count as changed.
    """
    vocabulary = tokenizer.get_vocab()
    added = tokenizer.added_tokens_decoder
    control = {*tokenizer.all_special_ids, *(token for token, piece in added.items() if piece.special)}
    byte_level = is_byte_level(tokenizer)
    n_bytes = np.zeros(1 + max(vocabulary.values()), np.int32)
    others = []
    for piece, token in vocabulary.items():
        if token in control:
            continue
        if byte_level and token not in added and all(character in BYTES for character in piece):
            n_bytes[token] = len(piece)  # GPT-2's alphabet: a character a byte
        elif re.fullmatch("<0x[0-9A-F]{2}>", piece):
            n_bytes[token] = 1  # a byte fallback, as SentencePiece writes them
        else:
            others.append(token)
    for token, text in zip(others, readable(tokenizer, others), strict=True):
        n_bytes[token] = len(text.encode())
    return n_bytes


def target_bytes(bytes_per_token_V: np.ndarray, batch: Batch) -> int:
    """Bytes of text that a batch's learned targets write. On the host: about 2 ns a token.

    Args:
      bytes_per_token_V: see `bytes_per_token`.
      batch: see data/rows.py.
    """
    targets_BS = batch["tokens"][:, 1:]
    return int(bytes_per_token_V[targets_BS].sum(where=learned_targets(batch), dtype=np.int64))
