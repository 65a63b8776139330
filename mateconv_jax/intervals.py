"""Intervals in the configuration: optimizer steps, or a share of the run or of an epoch."""

import re

EXPECTED = 'a number of steps, or a share such as "5%" of the run or "0.5epoch"'


def steps(value: int | str, total_steps: int, steps_per_epoch: float) -> int:
    """Optimizer steps in an interval, at least 1.

    Args:
      value: an integer, "N", "N%" of total_steps, or "Nepoch" / "Nepochs"; N may be fractional in the last two.

    Raises:
      ValueError: another form, or not above 0.
    """
    match = re.fullmatch(r"([0-9.]+)\s*(%|epochs?)?", str(value).strip())
    if not match or match[1].count(".") > (match[2] is not None) or not float(match[1]) > 0:
        raise ValueError(f"{value!r} is invalid (expected {EXPECTED})")
    number, unit = float(match[1]), match[2]
    per_unit = {None: 1, "%": total_steps / 100}.get(unit, steps_per_epoch)
    return max(1, round(number * per_unit))


def is_interval(value) -> bool:
    """Whether `steps` accepts it."""
    try:
        steps(value, 100, 100)
    except ValueError:
        return False
    return True
