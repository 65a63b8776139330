"""Memory in large pages, for training on the CPU."""

import os
import sys
from pathlib import Path

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
TUNABLES = "glibc.malloc.hugetlb=1"


def start_anew() -> None:
    """Start this command anew, as the same process, with a malloc that asks Linux for large pages.

    XLA takes a step's memory from malloc and gives it back after each: 520,000 pages of 4 KB to find and to clear for the base
    model at 8 x 512, now 2,000 of 2 MB, which is 8 % of the step's time and 16 % of the demo model's; the memory is the same.
    glibc reads its options when a process starts. Never giving memory back (mmap_max=0, one arena) gained another 5 % in a bare
    step and nothing in a run with checkpoints, which took 7.7 GB instead of 4.1.

    Returns where that is of no use: there is an NVIDIA GPU, GLIBC_TUNABLES is the user's, or Linux gives large pages always or
    never (docs.kernel.org/admin-guide/mm/transhuge.html).
    """
    if "GLIBC_TUNABLES" in os.environ or Path("/dev/nvidiactl").exists():
        return
    if THP.exists() and "[madvise]" in THP.read_text():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"GLIBC_TUNABLES": TUNABLES})
