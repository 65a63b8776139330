import random

import numpy as np
import pytest
from hypothesis import given, strategies as st

from mateconv_jax.data.text import duplicates
from mateconv_jax.data.text.dialogue import Dialogue
from mateconv_jax.data.text.duplicates import DUPLICATE, KEPT, NEAR_DUPLICATE, SeenKeys


def one_by_one(chunks):
    """The obvious way: a set, document after document."""
    seen, codes = set(), []
    for chunk in chunks:
        for first, *others in chunk:
            codes.append(DUPLICATE if first in seen else NEAR_DUPLICATE if seen & set(others) else KEPT)
            seen |= {first, *others}
    return codes


# Keys of different places in a document never meet: the whole text's are even here, the bands' odd.
evens = st.integers(0, 40).map(lambda n: 2 * n)
ones, threes = (st.integers(0, 60).map(lambda n, i=i: 4 * n + i) for i in (1, 3))
document = st.tuples(evens, ones, threes)


@given(st.lists(st.lists(document, max_size=20), max_size=12))
def test_marks_equal_a_set_kept_document_after_document(chunks):
    seen = SeenKeys()
    codes = [seen.mark(np.array(chunk, np.uint64).reshape(-1, 3)).tolist() for chunk in chunks]
    assert sum(codes, []) == one_by_one(chunks)


def test_memory_is_eight_bytes_a_key():
    seen = SeenKeys()
    rng = np.random.default_rng(0)
    for _ in range(200):
        seen.mark(rng.integers(0, 2**63, (500, 1), np.uint64))
    assert sum(part.nbytes for part in seen._sorted) == 8 * 200 * 500 and len(seen._sorted) < 10


def test_exact_keys():
    assert duplicates.text_key("长江") == duplicates.text_key("长江") != duplicates.text_key("长江。")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert duplicates.document_text(Dialogue(turns)) != duplicates.document_text(Dialogue(turns[::-1]))


def shares_a_band(a, b, threshold):
    return bool(set(duplicates.band_keys(a, threshold).tolist()) & set(duplicates.band_keys(b, threshold).tolist()))


def test_near_texts_share_a_band_and_far_ones_do_not():
    rng = random.Random(0)

    def text(n):
        return "".join(chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(n))

    near = far = 0
    for _ in range(100):
        original = text(400)
        changed = original[:200] + text(4) + original[204:]  # similarity (396 - 8) / (396 + 8) = 0.96
        half = original[:240] + text(160)  # similarity 0.42
        near += shares_a_band(original, changed, 0.8)
        far += shares_a_band(original, half, 0.8)
    assert near >= 98 and far <= 2
    assert shares_a_band("短", "短", 0.8) and not shares_a_band("短", "长", 0.8)


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9])
def test_half_of_the_pairs_at_the_threshold_share_a_band(threshold):
    b, r = duplicates.bands(threshold)
    assert b * r <= 128 and 0.35 < 1 - (1 - threshold**r) ** b < 0.65
