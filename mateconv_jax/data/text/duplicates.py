"""Which documents are copies of an earlier one: exactly, or nearly by MinHash.

Each document has 64-bit keys: one of its whole text and, for near duplicates, one of each band of its MinHash signature
(Broder, 1997; banding as in Leskovec et al., Mining of Massive Datasets, 3.4). A document is dropped when an earlier one,
dropped or not, had one of its keys. That depends on the order of the documents alone, so that one process with a set, any
number of workers and a Beam GroupByKey all drop the same.
"""

from hashlib import blake2b

import numpy as np
import orjson

from mateconv_jax.data.dialogue import Preference
from mateconv_jax.data.text.dialogue import other_texts
from mateconv_jax.data.text.jsonl import Document

KEPT, DUPLICATE, NEAR_DUPLICATE = 0, 1, 2
PERMUTATIONS = 128
SHINGLE = 5  # characters: of Chinese about three words


def text_key(text: str) -> int:
    """64 bits of BLAKE2b. Among 10 million texts the probability that any two different ones collide is 3e-6."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def bands(threshold: float) -> tuple[int, int]:
    """(b, r): b bands of r hashes, b * r <= 128, for which two texts of Jaccard similarity `threshold` share a band with a
    probability nearest to one half.
    """
    choices = [(PERMUTATIONS // r, r) for r in range(1, PERMUTATIONS + 1)]
    return min(choices, key=lambda choice: abs(1 - (1 - threshold ** choice[1]) ** choice[0] - 0.5))


def band_keys(text: str, threshold: float) -> np.ndarray:
    """(b,) uint64 keys of the text's set of 5-character shingles."""
    from rensa import RMinHash  # pyrefly: ignore[missing-module-attribute]  (compiled, without stubs)

    n_bands, n_rows = bands(threshold)
    minhash = RMinHash(num_perm=PERMUTATIONS, seed=1)
    minhash.update([text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1))])
    signature = np.array(minhash.digest(), np.uint32)[: n_bands * n_rows].reshape(n_bands, n_rows)
    keys = [blake2b(row.tobytes(), digest_size=8, salt=b"band%d" % i).digest() for i, row in enumerate(signature)]
    return np.frombuffer(b"".join(keys), np.uint64)


def document_key(document: Document) -> int:
    """Of everything that a chat template may write of a dialogue, or of a preference's two, each where it stands."""
    if isinstance(document, str):
        return text_key(document)
    dialogues = [document.chosen, document.rejected] if isinstance(document, Preference) else [document]
    parts = [part for dialogue in dialogues for part in (dialogue.messages, dialogue.tools)]
    written = orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)
    return int.from_bytes(blake2b(written, digest_size=8).digest(), "little")


def document_text(document: Document) -> str:
    """What near duplicates are compared by: the text, or all of a dialogue's roles and texts, one a line; of a preference those
    of both dialogues.
    """
    if isinstance(document, str):
        return document
    if isinstance(document, Preference):
        return f"{document_text(document.chosen)}\n{document_text(document.rejected)}"
    turns = [part for message in document.messages for part in (message["role"], message["content"])]
    return "\n".join(turns + other_texts(document))


class SeenKeys:
    """A growing set of 64-bit keys: sorted arrays, each at least twice as long as the next, 8 bytes a key.

    (A Python set takes about 60: 10 million documents are 80 MB here.)
    """

    def __init__(self):
        self._sorted: list[np.ndarray] = []

    def mark(self, keys_NK: np.ndarray) -> np.ndarray:
        """Add the keys (n, k) of the next n documents in order; (n,) uint8: KEPT, DUPLICATE (key 0) or NEAR_DUPLICATE."""
        flat, first = np.unique(keys_NK, return_index=True)
        is_first = np.zeros(keys_NK.size, bool)
        is_first[first] = True
        known = ~is_first
        new = np.ones(len(flat), bool)
        for older in self._sorted:
            place = np.minimum(np.searchsorted(older, flat), len(older) - 1)
            new &= older[place] != flat
        known[first[~new]] = True
        self._add(flat[new])
        known = known.reshape(keys_NK.shape)
        codes = np.where(known[:, 1:].any(axis=1), NEAR_DUPLICATE, KEPT)
        return np.where(known[:, 0], DUPLICATE, codes).astype(np.uint8)

    def _add(self, keys: np.ndarray) -> None:
        if len(keys):
            self._sorted.append(keys)
        while len(self._sorted) > 1 and 2 * len(self._sorted[-1]) > len(self._sorted[-2]):
            last = self._sorted.pop()
            self._sorted[-1] = np.sort(np.concatenate([self._sorted[-1], last]), kind="stable")
