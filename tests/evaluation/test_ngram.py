"""The n-gram model beside a plain loop over the same definition, and the sum of its probabilities."""

import collections
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from mateconv_jax.evaluation import ngram
from mateconv_jax.evaluation.ngram import END, FALLBACK, UNICODE, CharacterNgrams

TEXTS = st.lists(st.text("ab中c", max_size=8), min_size=1, max_size=12)
ENOUGH = ["".join("abcdefgh"[i * i * k % 89 % 8] for i in range(40)) for k in range(1, 60)]  # for estimates of the discounts


class Plain:
    """Interpolated modified Kneser-Ney, one n-gram at a time."""

    def __init__(self, texts, order):
        self.order = order
        self.known = {END, *"".join(texts)}
        self.counts = []  # of order 1, 2, …: {context: {character: count}}
        padded = [END + text + END for text in texts]
        for n in range(1, order + 1):
            counts = collections.defaultdict(collections.Counter)
            before = collections.defaultdict(set)
            for text in padded:
                for i in range(1, len(text)):
                    if i + 1 < n:
                        continue
                    gram = text[i + 1 - n : i + 1]
                    if n == order or i + 1 == n:  # the longest, and those that begin a text
                        counts[gram[:-1]][gram[-1]] += 1
                    else:
                        before[gram].add(text[i - n])
            for gram, characters in before.items():
                counts[gram[:-1]][gram[-1]] += len(characters)
            self.counts.append(counts)

    def discounts(self, n):
        c = collections.Counter(count for followers in self.counts[n - 1].values() for count in followers.values())
        if 0 in (c[1], c[2], c[3], c[4]):
            return FALLBACK
        y = c[1] / (c[1] + 2 * c[2])
        found = [0, 1 - 2 * y * c[2] / c[1], 2 - 3 * y * c[3] / c[2], 3 - 4 * y * c[4] / c[3]]
        return found if min(found[1:]) > 0 else FALLBACK

    def probability(self, character, before, n=None):
        n = min(self.order, len(before) + 1) if n is None else n
        if n == 0:
            return 1 / (len(self.known) + 1)
        lower = self.probability(character, before, n - 1)
        followers = self.counts[n - 1].get(before[len(before) - (n - 1) :])
        if not followers:
            return lower
        discounts, total = self.discounts(n), sum(followers.values())
        count = followers.get(character, 0)
        left = sum(discounts[min(count, 3)] for count in followers.values())
        return (count - discounts[min(count, 3)] + left * lower) / total

    def bits(self, text):
        padded, bits = END + text + END, 0.0
        for i in range(1, len(padded)):
            p = self.probability(padded[i], padded[:i])
            bits -= math.log2(p if padded[i] in self.known else p / (UNICODE - len(self.known) + 1))
        return bits


def follows(model, text, character):
    """The probability of a character after the beginning of a text."""
    return model.probabilities(ngram._stream([text + character.replace(END, "")]))[len(text) + 1]


@hypothesis.given(TEXTS, TEXTS, st.integers(1, 5))
def test_bits_equal_those_of_a_plain_loop(training, held_out, order):
    model, plain = CharacterNgrams(training, order), Plain(training, order)
    assert model.bits(held_out) == pytest.approx([plain.bits(text) for text in held_out], rel=1e-9)


def test_with_estimated_discounts_too():
    model, plain = CharacterNgrams(ENOUGH, 4), Plain(ENOUGH, 4)
    assert plain.discounts(3) is not FALLBACK and plain.discounts(4) is not FALLBACK
    held_out = ["abcabcdh", "", "é中", ENOUGH[7][:11]]
    assert model.bits(held_out) == pytest.approx([plain.bits(text) for text in held_out], rel=1e-9)


@hypothesis.given(TEXTS, st.text("ab中cd", max_size=6), st.integers(1, 5))
def test_probabilities_sum_to_1(training, before, order):
    """Over all characters that the training text has, the end, and all others that Unicode has."""
    model = CharacterNgrams(training, order)
    known = {END, *"".join(training)}
    unknown = UNICODE - (len(known) - 1)
    total = sum(follows(model, before, character) for character in known) + unknown * follows(model, before, "𠀀")
    assert total == pytest.approx(1, abs=1e-9)


def test_longer_contexts_help_where_they_tell_something():
    bits = [CharacterNgrams(["一二三四五六七八九十"] * 5, order).bits(["一二三四五六七八九十"])[0] for order in (1, 2, 5)]
    assert bits[0] > 30 and bits[0] > 3 * bits[1] and bits[1] < 12


def test_nothing_to_score_and_an_end_within_a_text():
    assert CharacterNgrams(["a"], 2).bits([]).shape == (0,)
    with pytest.raises(ValueError, match="U\\+0000"):
        CharacterNgrams(["a\0b"])
    assert np.isfinite(CharacterNgrams([""], 3).bits(["", "a"])).all()
