"""The GPU's check must work at the first try on the day there is one: here it runs with tiny sizes on the CPU."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("gpu")


# A line that each part must have written.
LINES = {
    "correct": "document mask: blocked attention in bfloat16 against float32",
    "resume": "and resumed",
    "live": "sample while the run trains",
    "training": "base, 32 x 512",
    "decoding": "batch 4, sampled",
    "host": "to_devices of a batch",
    "variants": "experts ragged",
}


# These start PyTorch or `train` several times, a minute each.
SLOW = ("host", "correct", "resume", "live", "training", "decoding", "variants")


@pytest.mark.parametrize("part", [pytest.param(part, marks=[pytest.mark.slow] * (part in SLOW)) for part in LINES])
def test_a_dry_run_of_each_part(part, out):
    command = ["bash", "benchmarks/gpu.sh", "--dry_run", "--out", str(out), "--part", part]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    results = json.loads(result.stdout.splitlines()[-1])
    assert results["parts"][part]["ended"] == "done"
    rows = results["parts"][part]["rows"]
    assert any(LINES[part] in row["what"] for row in rows)
    assert all(row["ok"] is not False for row in rows)
    assert f"### {part}" in (out / "gpu.md").read_text() and json.loads((out / "gpu.json").read_text()) == results
