"""A character n-gram model with interpolated modified Kneser-Ney smoothing (Chen and Goodman, 1998), in numpy.

What KenLM's lmplz computes, over characters instead of words, with two differences: n-grams are discounted by 0.5, 1 and 1.5 as
soon as one estimate of these is out of range, and a character that the training text lacks is spelt out: first that it is none
of the known ones, then which of all others that Unicode has room for. So texts in UTF-8 have probabilities that sum to 1.

Dimensions in names: N symbols of a stream, G distinct n-grams of one order, H distinct n-grams one shorter (contexts).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

END = "\0"  # ends every text, and stands before its first character; no text holds it
UNICODE = 0x110000 - 0x800 - 1  # characters that a text may hold: all code points but surrogates and END
FALLBACK = np.array([0, 0.5, 1, 1.5])  # as lmplz --discount_fallback


@dataclasses.dataclass(frozen=True)
class _Order:
    """All n-grams of one length.

    Attributes:
      key_G: sorted: the context's number, times the size of the vocabulary, plus the last symbol.
      discounted_G: counts less their discounts. The highest order counts occurrences, lower orders different symbols before.
      total_H: counts of all that follows a context; 0 where nothing does.
      left_H: what the discounts leave to the order below, a share of 1.
    """

    key_G: np.ndarray
    discounted_G: np.ndarray
    total_H: np.ndarray
    left_H: np.ndarray


class CharacterNgrams:
    """The model of some texts."""

    def __init__(self, texts: Sequence[str], order: int = 5):
        """texts: at least one, none with END. order: characters of the longest n-gram, END among them; at least 1."""
        stream_N = _stream(texts)
        self._known = np.flatnonzero(np.bincount(stream_N, minlength=1))  # code points, in order: END is symbol 0
        self._vocabulary = len(self._known) + 1  # the last symbol is an unknown character
        self._orders = _all_orders(np.searchsorted(self._known, stream_N), self._vocabulary, order)

    def bits(self, texts: Sequence[str]) -> np.ndarray:
        """(texts,) float64: bits of each text and its end, by itself."""
        stream_N = _stream(texts)
        bits_N = -np.log2(self.probabilities(stream_N)[1:])
        starts = np.flatnonzero(stream_N == 0)[:-1]
        return np.add.reduceat(bits_N, starts) if len(starts) else np.zeros(0)

    def probabilities(self, stream_N: np.ndarray) -> np.ndarray:
        """(N,) float64: of each character given those before it in its text.

        Args:
          stream_N: code points of END text END text … END. The first END's probability means nothing.
        """
        symbol_N = np.minimum(np.searchsorted(self._known, stream_N), len(self._known) - 1)
        is_known_N = self._known[symbol_N] == stream_N
        symbol_N[~is_known_N] = self._vocabulary - 1
        depth_N = _depths(symbol_N)
        probability_N = np.full(len(stream_N), 1 / self._vocabulary)
        number_N = np.zeros(len(stream_N), np.int64)  # of the n-gram that ends here, -1: never seen; of order 0 all are one
        for n, order in enumerate(self._orders, 1):
            context_N = np.where(depth_N >= n - 1, np.roll(number_N, 1), -1)
            key_N = context_N * self._vocabulary + symbol_N
            number_N = np.minimum(np.searchsorted(order.key_G, key_N), len(order.key_G) - 1)
            number_N[(order.key_G[number_N] != key_N) | (context_N < 0)] = -1
            total_N = np.where(context_N >= 0, order.total_H[context_N], 0)
            seen_N = np.where(number_N >= 0, order.discounted_G[number_N], 0)
            mixed_N = seen_N / np.maximum(total_N, 1) + order.left_H[context_N] * probability_N
            probability_N = np.where(total_N > 0, mixed_N, probability_N)
        probability_N[~is_known_N] /= UNICODE - (len(self._known) - 1)
        return probability_N


def _stream(texts: Sequence[str]) -> np.ndarray:
    """Code points (N,) uint32: END text END text … END."""
    stream_N = np.frombuffer(END.join(["", *texts, ""]).encode("utf-32-le"), np.uint32)
    if np.count_nonzero(stream_N == 0) != len(texts) + 1:
        raise ValueError("a text holds the character U+0000")
    return stream_N


def _depths(symbol_N: np.ndarray) -> np.ndarray:
    """How many symbols of its text are before each, the END that begins it among them; 0 for the first symbol."""
    place_N = np.arange(len(symbol_N))
    last_end_N = np.maximum.accumulate(np.where(symbol_N == 0, place_N, 0))
    return place_N - np.append(0, last_end_N[:-1])


def _all_orders(symbol_N: np.ndarray, vocabulary: int, longest: int) -> list[_Order]:
    """Count n-grams of length 1 to `longest`; none reaches over the END before its text."""
    depth_N = _depths(symbol_N)
    depth_N[0] = -1  # nothing predicts it
    number_N = np.where(depth_N >= 0, 0, -1)
    orders, key_G, begins_G, n_contexts = [], np.zeros(0, np.int64), np.zeros(0), 1
    contexts_N = np.zeros(len(symbol_N), np.int64)
    for n in range(1, longest + 1):
        places = np.flatnonzero(depth_N >= n - 1)
        if not len(places):  # all texts are shorter
            break
        context = contexts_N[places - 1]
        longer_key_G, longer = np.unique(context * vocabulary + symbol_N[places], return_inverse=True)
        if n > 1:
            suffix_G = np.empty(len(longer_key_G), np.int64)
            suffix_G[longer] = number_N[places]
            before_G = begins_G + np.bincount(suffix_G, minlength=len(key_G))  # different symbols before
            orders.append(_order(key_G, before_G, n_contexts, vocabulary))
            n_contexts = len(key_G)
        key_G = longer_key_G
        number_N[:] = -1
        number_N[places] = longer
        begins_G = np.bincount(number_N[depth_N == n - 1], minlength=len(key_G))  # with END: nothing is before them
        contexts_N = number_N.copy()
        contexts_N[0] = 0  # END
    times_G = np.bincount(number_N[number_N >= 0], minlength=len(key_G))
    return [*orders, _order(key_G, times_G, n_contexts, vocabulary)]


def _order(key_G: np.ndarray, count_G: np.ndarray, n_contexts: int, vocabulary: int) -> _Order:
    context_G = key_G // vocabulary
    discount_G = _discounts(count_G)[np.minimum(count_G, 3)]
    total_H = np.bincount(context_G, count_G, n_contexts)
    left_H = np.bincount(context_G, discount_G, n_contexts) / np.maximum(total_H, 1)
    return _Order(key_G, count_G - discount_G, total_H, left_H)


def _discounts(count_G: np.ndarray) -> np.ndarray:
    """What is subtracted from counts of 0, 1, 2 and of 3 or more (Chen and Goodman, equation 26)."""
    n = np.bincount(np.minimum(count_G, 5), minlength=6).astype(float)
    if not n[1:5].all():
        return FALLBACK
    y = n[1] / (n[1] + 2 * n[2])
    estimates = np.array([0] + [i - (i + 1) * y * n[i + 1] / n[i] for i in (1, 2, 3)])
    return estimates if (estimates[1:] > 0).all() else FALLBACK
