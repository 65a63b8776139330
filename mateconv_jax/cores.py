"""How many processor cores this process may use."""

import os


def usable() -> int:
    """Those that the scheduler or a container leaves it; where that cannot be asked (macOS, Windows), all of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
