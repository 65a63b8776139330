"""Several paths with weights, as data.train_data_path takes them: data/wiki:0.6,data/books:0.3,data/code:0.1."""

import os
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple

from ml_collections import ConfigDict

from mateconv_jax.errors import UserError

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
EXPECTED = "a path, or several with weights, such as data/wiki:0.6,data/code:0.4"


class WeightedPath(NamedTuple):
    path: str
    weight: Fraction


def parse(text: str, key: str) -> list[WeightedPath]:
    """The paths of "PATH:WEIGHT,PATH:WEIGHT" with ~ expanded; weights need not add up to 1.

    Text without weights is one path, and so is text that names something that exists. A path may hold ":" and ","; where that
    can be read in several ways, what exists decides.

    Args:
      key: the flag or configuration key, for errors.

    Raises:
      UserError: a path without a weight, with a weight that is not above 0, or there twice.
    """
    parts = text.split(",")
    if not has_weights(text):
        if len(parts) > 1 and not _exists(text) and all(map(_exists, parts)):
            raise UserError(f"{key}: {parts[0]!r} has no weight (expected {EXPECTED})")
        return [WeightedPath(os.path.expanduser(text), Fraction(1))]
    found, start = [], 0
    while start < len(parts):
        readings = [
            (match[1].strip(), Fraction(match[2]), end)
            for end in range(start + 1, len(parts) + 1)
            if (match := re.fullmatch(rf"(.+?)\s*:\s*({NUMBER})\s*", ",".join(parts[start:end])))
        ]
        if not readings:
            raise UserError(f"{key}: {parts[start]!r} has no weight (expected {EXPECTED})")
        path, weight, start = next((reading for reading in readings if _exists(reading[0])), readings[0])
        if weight <= 0:
            raise UserError(f"{key}: {path!r} has the weight {float(weight):g} (expected a number above 0)")
        found.append(WeightedPath(os.path.expanduser(path), weight))
    absolute = [os.path.abspath(path) for path, _ in found]
    for number, path in enumerate(absolute):
        if path in absolute[:number]:
            raise UserError(f"{key}: {found[number].path!r} is there twice (expected it once, with the sum of its weights)")
    return found


def has_weights(text: str) -> bool:
    return not _exists(text) and re.search(f":\\s*{NUMBER}\\s*(,|$)", text) is not None


def as_text(value, key: str) -> str:
    """What a config file may say, as one text with ~ expanded: text, {path: weight}, a list of "path:weight" or (path,
    weight).

    Raises:
      UserError: see `parse`, or it is none of these.
    """
    if isinstance(value, Mapping | ConfigDict):
        value = list(value.items())
    if isinstance(value, list | tuple):
        entries = [entry if isinstance(entry, str) else _entry(entry, key) for entry in value]
        if not entries:
            raise UserError(f"{key}: {value!r} names no path (expected {EXPECTED})")
        value = ",".join(entries)
    value = str(value)  # the command line takes a folder's name of digits for a number
    found = parse(value, key)
    if len(found) == 1 and found[0].path == os.path.expanduser(value):
        return found[0].path
    return ",".join(f"{path}:{_shortest(weight)}" for path, weight in found)


def _entry(entry, key: str) -> str:
    if isinstance(entry, list | tuple) and len(entry) == 2:
        return f"{entry[0]}:{entry[1]}"
    raise UserError(f"{key}: {entry!r} is not a path with a weight (expected {EXPECTED})")


def _shortest(weight: Fraction) -> str:
    return repr(float(weight)) if weight.denominator > 1 else str(weight)


def _exists(path: str) -> bool:
    return os.path.exists(os.path.expanduser(path))
