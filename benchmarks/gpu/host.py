"""The host's work during a step:  python -m benchmarks.gpu.host --out DIR --data DATASET

Dispatching a step and transferring a batch, which must take less time than the step; host memory while a checkpoint is saved.
"""

import tempfile
import threading
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks.gpu import sizes, timing
from benchmarks.gpu.report import Report
from benchmarks.gpu.training import compile_step
from mateconv_jax.runtime import sharding
from mateconv_jax.training.checkpoints import Checkpoints, Progress


def main(args) -> None:
    report = Report(args.out, "host")
    _, run, compiled = compile_step(sizes.BASE, args.dry_run, use_ema=True)
    running = timing.Step(run, compiled)
    seconds = running.seconds()
    dispatch(report, running, seconds)
    transfer(report, running, seconds, run.mesh)
    save(report, running, seconds, args.out)


def dispatch(report: Report, running: timing.Step, seconds: float) -> None:
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        running.run()
        times.append(time.perf_counter() - begin)
        running.wait()
    report.row(
        "dispatch of a step",
        f"{1e3 * np.median(times):.2f} ms",
        f"the step takes {1e3 * seconds:.2f} ms",
        bool(np.median(times) < seconds),
    )


def transfer(report: Report, running: timing.Step, seconds: float, mesh) -> None:
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        batch = sharding.to_devices(running.host_batch, mesh, rows_axis=1)
        times.append(time.perf_counter() - begin)
        jax.block_until_ready(batch)
    report.row(
        "to_devices of a batch",
        f"{1e3 * np.median(times):.2f} ms",
        f"the step takes {1e3 * seconds:.2f} ms",
        bool(np.median(times) < seconds),
    )


def save(report: Report, running: timing.Step, seconds: float, out: str) -> None:
    """Save checkpoints while steps run."""
    megabytes = sum(x.nbytes for x in jax.tree.leaves(running.state)) / 1e6
    with (
        tempfile.TemporaryDirectory(dir=out) as folder,
        Checkpoints(Path(folder), 10, None, False) as checkpoints,
        HighestRss() as rss,
    ):
        blocked, written = [], []
        for number in range(1, 5):
            begin = time.perf_counter()
            checkpoints.save(number, running.state, Progress())
            running.run()  # overwrites the state
            blocked.append(time.perf_counter() - begin)
            while not (Path(folder) / "checkpoints" / str(number)).exists():
                running.run()
                running.wait()
            written.append(time.perf_counter() - begin)
    stats = jax.local_devices()[0].memory_stats() or {}
    on_device = f"; device peak {stats['peak_bytes_in_use'] / 1e9:.2f} GB" if "peak_bytes_in_use" in stats else ""
    waits, total = (1e3 * np.median(times[1:]) for times in (blocked, written))
    report.row(
        f"saving {megabytes:.0f} MB",
        f"the loop waits {waits:.0f} of the {total:.0f} ms until it is written",
        f"resident memory {rss.before / 1e9:.2f} GB, peak {rss.highest / 1e9:.2f} while saving{on_device}",
    )


class HighestRss:
    """The peak of the process's resident memory, sampled every 5 ms."""

    def __enter__(self):
        self.before = self.highest = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.highest = max(self.highest, self._now())

    @staticmethod
    def _now() -> int:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
        return pages * 4096


if __name__ == "__main__":
    main(sizes.parse_args(__doc__))
