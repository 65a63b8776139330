"""Timing device work, and breaking it down by kernel with a trace."""

import collections
import contextlib
import glob
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from mateconv_jax.planning import programs
from mateconv_jax.runtime import sharding
from mateconv_jax.training.setup import Setup


def per_call(run, wait, calls: int = 5, seconds: float = 1.5) -> float:
    """Seconds per call of `run`, which dispatches asynchronously: the median over windows of `calls` calls, each followed by
    `wait`, after two warm-up windows.
    """
    windows = []
    for window in range(100):
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        wait()
        if window >= 2:
            windows.append((time.perf_counter() - begin) / calls)
        if sum(windows) * calls > seconds and len(windows) >= 3:
            break
    return statistics.median(windows)


def memory_bandwidth(dry_run: bool) -> float:
    """Bytes/s of a large copy on the device, counting reads and writes."""
    x = jnp.ones(2**20 if dry_run else 2**30, jnp.bfloat16)
    add = jax.jit(lambda x: x + 1)
    result = [x]
    return 2 * x.nbytes / per_call(lambda: result.append(add(result.pop())), lambda: result[0].block_until_ready(), seconds=0.3)


class Step:
    """A compiled training step with its state and a random batch on the devices."""

    def __init__(self, run: Setup, compiled: jax.stages.Compiled):
        self.compiled, self.state = compiled, run.fresh_state()
        self.host_batch = programs.random_batch(run)
        self.batch = sharding.to_devices(self.host_batch, run.mesh, rows_axis=1)
        self.metrics = None

    def run(self) -> None:
        self.state, self.metrics = self.compiled(self.state, self.batch)

    def wait(self) -> None:
        jax.block_until_ready(self.metrics)

    def seconds(self) -> float:
        seconds = per_call(self.run, self.wait)
        assert np.isfinite(float(self.metrics["train/loss"]))
        return seconds


# ---- breakdown by kernel --------------------------------------------------------------------------------------------

# A kernel belongs to the first group with a string that its lower-case name contains.
GROUPS = (
    ("attention", ("fmha", "flash", "sdpa", "cudnn_generated", "attention")),
    ("scatter", ("scatter", "embedding_dense", "embedding_backward", "sort", "radix")),
    ("matmuls", ("gemm", "nvjet", "cutlass", "cublas", "splitk", "dot", "sm90_xmma", "ampere_")),
    ("copies", ("memcpy", "memset", "copy", "transpose")),
    ("optimizer", ("adam", "multi_tensor")),
    ("elementwise", ("fusion", "triton", "elementwise", "reduce", "vectorized", "softmax", "norm")),
)


def group_of(kernel: str) -> str:
    kernel = kernel.lower()
    return next((group for group, parts in GROUPS if any(part in kernel for part in parts)), "other")


@contextlib.contextmanager
def kernels():
    """Trace the block's kernels: {name: (seconds, launches)}, filled at its end. Empty if the trace shows no GPU kernels."""
    found: dict[str, tuple[float, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            yield found
        for path in glob.glob(f"{folder}/**/*.xplane.pb", recursive=True):
            for plane in jax.profiler.ProfileData.from_file(path).planes:
                if not plane.name.startswith("/device:GPU"):
                    continue
                for line in (line for line in plane.lines if line.name.startswith("Stream")):
                    for event in line.events:
                        seconds, launches = found.get(event.name, (0.0, 0))
                        found[event.name] = seconds + event.duration_ns / 1e9, launches + 1


def by_group(found: dict[str, tuple[float, int]], steps: int) -> dict[str, dict[str, float]]:
    """{group: {"ms", "launches"} per step}, longest first."""
    groups = collections.defaultdict(lambda: {"ms": 0.0, "launches": 0.0})
    for name, (seconds, launches) in found.items():
        group = groups[group_of(name)]
        group["ms"] += 1e3 * seconds / steps
        group["launches"] += launches / steps
    return dict(sorted(groups.items(), key=lambda item: -item[1]["ms"]))


def in_words(groups: dict[str, dict[str, float]]) -> str:
    return ", ".join(f"{name} {group['ms']:.2f} ms in {group['launches']:.0f}" for name, group in groups.items())
