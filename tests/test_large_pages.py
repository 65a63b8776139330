import os
import subprocess
import sys

import pytest

from mateconv_jax import large_pages

SCRIPT = """
import os, sys
from pathlib import Path
from mateconv_jax import large_pages
large_pages.THP = Path(sys.argv[1])
first = os.environ.get("STARTED_BY", "") != str(os.getpid())
os.environ["STARTED_BY"] = str(os.getpid())
large_pages.start_anew()
print("anew" if not first else "at once", os.environ.get("GLIBC_TUNABLES"), sys.argv[2:])
"""


@pytest.mark.parametrize(
    "pages, tunables, printed",
    [
        ("always [madvise] never", None, "anew glibc.malloc.hugetlb=1 ['a b']"),
        ("[always] madvise never", None, "at once None ['a b']"),
        ("always [madvise] never", "glibc.malloc.check=0", "at once glibc.malloc.check=0 ['a b']"),
        (None, None, "at once None ['a b']"),
    ],
)
def test_the_same_process_starts_anew_where_large_pages_must_be_asked_for(tmp_path, pages, tunables, printed):
    if os.path.exists("/dev/nvidiactl"):
        pytest.skip("there is a GPU")
    enabled = tmp_path / "enabled"
    if pages:
        enabled.write_text(pages)
    environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    if tunables:
        environment["GLIBC_TUNABLES"] = tunables
    done = subprocess.run([sys.executable, "-c", SCRIPT, enabled, "a b"], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == printed and not done.stderr


@pytest.mark.skipif(not large_pages.THP.exists() or "[madvise]" not in large_pages.THP.read_text(), reason="another kernel")
def test_malloc_then_has_large_pages():
    script = """
x = b"a" * 2**28
print(sum(int(line.split()[1]) for line in open("/proc/self/smaps") if line.startswith("AnonHuge")))
"""
    plain, large = (
        int(subprocess.check_output([sys.executable, "-c", script], env=os.environ | {"GLIBC_TUNABLES": tunables}))
        for tunables in ("glibc.malloc.hugetlb=0", large_pages.TUNABLES)
    )
    assert plain < 2**14 and large > 2**17  # kB; x has 2**18
