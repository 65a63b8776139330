"""Several datasets as one, each with its share of the rows.

Which dataset a row comes from is decided by its place alone, over a period of 100,000 rows that repeats. Any 1,000
consecutive rows, wherever they begin, hold 1,000 times its weight rows of each dataset, rounded up or down; any 100,000 hold
the same number of each.
"""

import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from mateconv_jax.data import loader
from mateconv_jax.data.rows import Batch, Rows

THOUSAND, THOUSANDS = 1000, 100
PERIOD = THOUSAND * THOUSANDS


# ---- which dataset -------------------------------------------------------------------------------------------------


def apportion(weights: Sequence[Fraction]) -> list[int]:
    """Rows of each dataset in a period: PERIOD times its share of the weights, rounded by largest remainders.

    Each is rounded up or down, so that it is in the same whole thousandths as the exact share, or at their end.
    """
    exact = [PERIOD * weight / sum(weights) for weight in weights]
    counts = [int(rows) for rows in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: PERIOD - sum(counts)]:
        counts[i] += 1
    return counts


class Schedule:
    """Which dataset the row at a place of the mixture comes from, and how many of its rows come before.

    A thousand rows are laid out once, and repeat. A dataset with 60,050 rows in a period, 600.5 in a thousand, owns 600 of
    the places. The places that nobody owns are shared: what the datasets lack is laid end to end over the period's thousands,
    one shared place after the other (McNaughton's wrap-around rule, 1959), so that this one has a place in 50 thousands.
    Where those are the last of one place and the first of the next, it loses the earlier place before it gets the later one,
    as the places stand in that order in a thousand: any 1,000 consecutive rows hold 600 or 601 of it.
    """

    def __init__(self, counts: Sequence[int]):
        """counts: rows of each dataset in a period, PERIOD in all."""
        self.counts_K = np.array(counts, np.int64)
        assert self.counts_K.sum() == PERIOD and (self.counts_K > 0).all()
        own_K, beyond_K = np.divmod(self.counts_K, THOUSANDS)
        shared = np.repeat(np.arange(len(counts)), beyond_K).reshape(-1, THOUSANDS).T  # (thousand, shared place)
        whose = np.concatenate([np.tile(np.arange(len(counts)), (THOUSANDS, 1)), shared], axis=1)
        places = spread([*own_K.tolist(), *[1] * shared.shape[1]])
        self._set_P = whose[:, places].ravel()
        self._index_P = np.empty(PERIOD, np.int64)
        for number, count in enumerate(self.counts_K):
            self._index_P[self._set_P == number] = np.arange(count)

    def at(self, place_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The datasets (B,) at places (B,) of the mixture, and the numbers (B,) int64 of their rows that come before."""
        period_B, place_B = np.divmod(place_B, PERIOD)
        set_B = self._set_P[place_B]
        return set_B, period_B * self.counts_K[set_B] + self._index_P[place_B]

    def before(self, place: int) -> list[int]:
        """How many rows of each dataset come before a place."""
        periods, place = divmod(place, PERIOD)
        counts_K = periods * self.counts_K + np.bincount(self._set_P[:place], minlength=len(self.counts_K))
        return counts_K.tolist()


def spread(counts: Sequence[int]) -> np.ndarray:
    """An even order (sum,) of each i counts[i] times: among the first n, each i is there n * counts[i] / sum times, give or
    take less than one (Tijdeman, The chairman assignment problem, 1980). Those with equal counts come in their order.
    """
    count_K, total = np.array(counts, np.int64), sum(counts)
    due = 2 * np.count_nonzero(count_K) - 2  # i may come as soon as it lacks 1 / due of its next
    taken_K, order = np.zeros_like(count_K), np.empty(total, np.int64)
    for n in range(total):
        lacks_K = count_K * (n + 1) - total * taken_K
        may_K = (due * lacks_K >= total) & (count_K > 0)
        # Among these, the one that would first lack more than 1 - 1 / due: integers but for one division, the same everywhere.
        until_K = ((due - 1) * total - due * lacks_K) / np.maximum(count_K, 1)
        order[n] = np.argmin(np.where(may_K, until_K, np.inf)) if due else np.argmax(count_K)
        taken_K[order[n]] += 1
    return order


def names(paths: Sequence[str]) -> list[str]:
    """A name for each dataset, its folder's; as many of the folders above as it takes to tell them apart."""
    above = [os.path.splitext(os.path.abspath(path))[0].strip(os.sep).split(os.sep) for path in paths]
    found: list[str] = []
    for depth in range(1, max(map(len, above)) + 1):
        found = [re.sub(r"[^\w-]+", "_", "-".join(folders[-depth:])) for folders in above]
        if len(set(found)) == len(found):
            return found
    return [f"{name}-{number}" for number, name in enumerate(found, 1)]


# ---- rows ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Part:
    """A dataset of a mixture.

    Attributes:
      name: see `names`.
      rows: at least one.
      count: of its rows in a period, see Schedule.
      fingerprint: of its rows, see dataset.fingerprint.
    """

    name: str
    rows: Rows
    count: int
    fingerprint: str


class MixedRows:
    """The rows of several datasets, one behind the other, in batches that all have the same fields.

    Rows that do not say what is learned of them learn everything; rows that do not say where documents begin are one document.
    """

    def __init__(self, parts: Sequence[Part]):
        self.parts = tuple(parts)
        self._ends = np.cumsum([len(part.rows) for part in parts], dtype=np.int64)
        self.starts = [0, *self._ends[:-1].tolist()]
        fields: dict[str, list[np.ndarray]] = {}
        for part in parts:
            for name, values in part.rows.read(np.zeros(1, np.int64)).items():
                fields.setdefault(name, []).append(values)
        self._fields = {name: (np.result_type(*values), values[0].shape[1:]) for name, values in fields.items()}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, indices: np.ndarray) -> Batch:
        """Rows by number (B,), in any order: one read of each dataset."""
        batch = {name: np.empty((len(indices), *shape), dtype) for name, (dtype, shape) in self._fields.items()}
        part_B = np.searchsorted(self._ends, indices, side="right")
        for number in set(part_B.tolist()):
            at = np.flatnonzero(part_B == number)
            read = self.parts[number].rows.read(indices[at] - self.starts[number])
            for name, values in batch.items():
                values[at] = read.get(name, name == "learned")
        return batch


def fingerprint(parts: Sequence[Part]) -> str:
    """16 hex digits of the rows and shares of a mixture."""
    return hashlib.sha256(repr([(part.fingerprint, part.count) for part in parts]).encode()).hexdigest()[:16]


# ---- in which order a run reads them ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PartOrder:
    """In which order a run reads a dataset.

    Attributes:
      name, count: see Part.
      start: number of its first row in the mixture.
      n_rows: how many there are.
      before: how many it has read of it before the mixture began to hold.
      salt: tells its shuffles from those of another dataset of as many rows; 0: those of a run on this dataset alone.
    """

    name: str
    count: int
    start: int
    n_rows: int
    before: int = 0
    salt: int = 0

    def rows_at(self, index_B: np.ndarray, seed: int, shuffle: bool) -> np.ndarray:
        """Numbers in the mixture of the rows that it reads since the mixture began to hold."""
        if self.salt:
            seed = loader.hashed(seed, self.salt)
        return self.start + loader.rows_at(self.before + index_B, self.n_rows, seed, shuffle)


@dataclasses.dataclass(frozen=True)
class Order:
    """In which order a run reads the rows of a mixture: a pure function of the position.

    Attributes:
      parts: in any order, which decides places.
      since: the position from which on the mixture holds.
    """

    parts: tuple[PartOrder, ...]
    since: int = 0

    @functools.cached_property
    def schedule(self) -> Schedule:
        return Schedule([part.count for part in self.parts])

    def rows_at(self, position_B: np.ndarray, seed: int, shuffle: bool) -> np.ndarray:
        """Which rows (B,) int64 of the mixture stand at positions of the run's endless sequence of rows."""
        part_B, index_B = self.schedule.at(position_B - self.since)
        rows_B = np.empty(len(position_B), np.int64)
        for number in set(part_B.tolist()):
            at = np.flatnonzero(part_B == number)
            rows_B[at] = self.parts[number].rows_at(index_B[at], seed, shuffle)
        return rows_B

    def read_before(self, position: int) -> list[int]:
        """How many rows of each part are read before a position."""
        counts = self.schedule.before(position - self.since)
        return [part.before + count for part, count in zip(self.parts, counts, strict=True)]

    def describe(self, row_numbers: np.ndarray) -> str:
        """Rows of the mixture in words: "rows of wiki [3, 1], of code [2]"."""
        said = []
        for part in self.parts:
            own = row_numbers - part.start
            own = own[(own >= 0) & (own < part.n_rows)]
            said += [f"of {part.name} {own.tolist()}"] if len(own) else []
        return "rows " + ", ".join(said)
