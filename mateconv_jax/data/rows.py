"""What a row is.

A batch of rows is a dict of arrays:

tokens           (B, S + 1) uint16 or uint32: S inputs and, one token later, S targets
length           (B,) int32: how many of the tokens are real; padding comes behind them
document_starts  (B, S + 1) bool: tokens that begin a document. Only where attention is to stay within documents.
learned          (B, S + 1) bool: tokens that are learned as targets. Missing: all real ones.

A row of a dataset of pairs is two such rows, the chosen and the rejected dialogue: tokens (B, 2, S + 1), length (B, 2), learned
(B, 2, S + 1).

No token id means any of this: a chat template writes `<s>` before every turn, and MateConv's tokenizer has no `<pad>`.
"""

from typing import Protocol

import numpy as np

Batch = dict[str, np.ndarray]


class Rows(Protocol):
    """Rows by number."""

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> Batch: ...


def learned_targets(batch: Batch) -> np.ndarray:
    """(B, S) bool: which targets are learned, (B, 2, S) of pairs; of numpy or JAX arrays."""
    is_learned_BS = np.arange(batch["tokens"].shape[-1] - 1) < batch["length"][..., None] - 1
    return is_learned_BS & batch["learned"][..., 1:] if "learned" in batch else is_learned_BS


def starts_after_end(tokens_BS: np.ndarray, bos_token_id: int | None, eos_token_id: int) -> np.ndarray:
    """`document_starts` of rows that do not record them: a `<s>` that follows a `</s>` directly.

    Right for `<s>text</s><s>text</s>`. MateConv's chat template writes a line feed between a turn's `</s>` and the next `<s>`,
    so that a dialogue is never cut; but it ends with one too, so that dialogues in a row count as one document.
    Without `<s>` (None) every `</s>` ends a document.
    """
    starts_BS = np.zeros(tokens_BS.shape, bool)
    starts_BS[:, 1:] = tokens_BS[:, :-1] == eos_token_id
    if bos_token_id is not None:
        starts_BS[:, 1:] &= tokens_BS[:, 1:] == bos_token_id
    return starts_BS
