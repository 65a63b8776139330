"""How many processor cores this process may use, and how many files it may open."""

import contextlib
import os
import resource


def usable() -> int:
    """Those that the scheduler or a container leaves it; where that cannot be asked (macOS, Windows), all of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def allow_open_files(n: int) -> float:
    """Raise the limit on open files to n, as far as the system lets us. Returns the limit, perhaps infinity."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != soft < n:
        with contextlib.suppress(ValueError, OSError):  # macOS has a limit of its own below a hard limit of infinity
            resource.setrlimit(resource.RLIMIT_NOFILE, (n if hard == resource.RLIM_INFINITY else min(n, hard), hard))
            soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return float("inf") if soft == resource.RLIM_INFINITY else soft
