"""In which order a run reads a mixture of datasets, also when the datasets or their weights are others than before.

A dataset is known by the fingerprint of its rows. Where the mixture changes, each goes on at its next row; one that is left
out goes on there when it comes back. What was read of each stands in the checkpoint's progress:

{"since": 4800, "sets": [{"fingerprint": …, "name": "wiki", "count": 60000, "before": 2880, "salt": 3735928559}, …]}

From row 4,800 of the run on, wiki has 60,000 of every 100,000 rows; 2,880 of its rows were read before.
"""

from collections.abc import Sequence
from typing import Any

from mateconv_jax.data.dataset import Rows, fingerprint
from mateconv_jax.data.mixture import PERIOD, MixedRows, Order, Part, PartOrder, Schedule
from mateconv_jax.training.checkpoints import Progress


def order_of(rows: Rows, name: str, progress: Progress) -> tuple[Order | None, list[str]]:
    """The order in which a run that stands at progress.rows goes on, and a line for the log for each change. What it has read
    of each dataset is recorded in progress.mixture.

    Args:
      rows: for training.
      name: of a dataset that is the only one.

    Returns:
      None and no line where the run has never read but one dataset: it reads that in the order of loader.rows_at.
    """
    if isinstance(rows, MixedRows):
        parts, starts = rows.parts, rows.starts
    elif progress.mixture is None:
        return None, []
    else:
        parts, starts = (Part(name, rows, PERIOD, fingerprint(rows, len(rows))),), [0]
    was = progress.mixture or _one_dataset(parts, progress)
    now, changes = was, []
    if _counts(was) != {part.fingerprint: part.count for part in parts}:
        now = _changed(was, parts, progress.rows or 0)
        changes = _described(was, now) if was["sets"] else []
    progress.mixture, progress.train_data = now, None  # its changes are named here, not by Progress.reads
    known = {part.fingerprint: (part, start) for part, start in zip(parts, starts, strict=True)}
    read = [(*known[one["fingerprint"]], one) for one in now["sets"] if one["count"]]
    orders = [PartOrder(part.name, part.count, start, len(part.rows), one["before"], one["salt"]) for part, start, one in read]
    return Order(tuple(orders), now["since"]), changes


def _counts(mixture: dict[str, Any]) -> dict[str, int]:
    return {one["fingerprint"]: one["count"] for one in mixture["sets"] if one["count"]}


def _one_dataset(parts: Sequence[Part], progress: Progress) -> dict[str, Any]:
    """The mixture of a run that has read one dataset so far, or nothing."""
    if not progress.rows:
        return {"since": 0, "sets": []}
    name = next((part.name for part in parts if part.fingerprint == progress.train_data), "another dataset")
    one = {"fingerprint": progress.train_data, "name": name, "count": PERIOD, "before": 0, "salt": 0}
    return {"since": 0, "sets": [one]}


def _changed(was: dict[str, Any], parts: Sequence[Part], position: int) -> dict[str, Any]:
    """The mixture that holds from a position of the run on."""
    counts = {part.fingerprint: part.count for part in parts}
    names = {part.fingerprint: part.name for part in parts}
    read = iter(Schedule(list(_counts(was).values())).before(position - was["since"]) if was["sets"] else [])
    sets = {
        one["fingerprint"]: one | {"before": one["before"] + (next(read) if one["count"] else 0), "count": 0}
        for one in was["sets"]
    }
    for part in parts:
        new = {"fingerprint": part.fingerprint, "before": 0, "salt": int(part.fingerprint[:8], 16) | 1}
        sets[part.fingerprint] = sets.get(part.fingerprint, new)
    for digits, one in sets.items():
        one |= {"count": counts.get(digits, 0), "name": names.get(digits, one.get("name"))}
    return {"since": position, "sets": list(sets.values())}


def _described(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    goes_on = ", ".join(
        f"{one['name']} goes on after {one['before']:,} rows" if one["before"] else f"{one['name']} begins"
        for one in now["sets"]
        if one["count"]
    )
    lines = [f"not an exact continuation: the mixture was {_shares(was)}, now {_shares(now)}; {goes_on}"]
    left = {one["name"]: one["fingerprint"] for one in was["sets"]}
    for one in now["sets"]:
        if one["count"] and left.get(one["name"], one["fingerprint"]) != one["fingerprint"] and not one["before"]:
            lines.append(f"{one['name']}: these are other rows than those that the run has read under that name")
    return lines


def _shares(mixture: dict[str, Any]) -> str:
    return ", ".join(f"{one['name']} {share(one['count'])}" for one in mixture["sets"] if one["count"])


def share(count: int) -> str:
    """A number of rows in a period as a percentage."""
    return f"{100 * count / PERIOD:g} %"
