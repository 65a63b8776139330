"""Rollouts that several steps learn from, in RUN/rollouts/STEP.npz: a run resumed between those steps needs the answers that
older parameters gave.
"""

import json
from pathlib import Path

import numpy as np

from mateconv_jax import files, run_folder


class KeptRollouts:
    def __init__(self, folder: Path):
        """folder: of the run."""
        self._run, self._folder = folder, run_folder.rollouts(folder)

    def read(self, step: int) -> tuple[dict[str, np.ndarray], dict[str, float]] | None:
        """Batch and metrics of the rollout of that step; None: it is not there."""
        path = self._folder / f"{step}.npz"
        if not path.exists():
            return None
        with np.load(path) as stored:
            batch = {name: stored[name] for name in stored.files if name != "metrics"}
            return batch, json.loads(str(stored["metrics"]))

    def write(self, step: int, batch: dict[str, np.ndarray], metrics: dict[str, float]) -> None:
        """Keep it, and drop those that no checkpoint leads to any more."""
        self._folder.mkdir(exist_ok=True)
        with files.aside(self._folder / f"{step}.npz") as written, written.open("wb") as file:
            np.savez(file, allow_pickle=False, metrics=np.array(json.dumps(metrics)), **batch)
        saved = [int(path.name) for path in run_folder.checkpoints(self._run).glob("*") if path.name.isdigit()]
        kept = sorted(int(path.stem) for path in self._folder.glob("*.npz"))
        needed = max((first for first in kept if first <= min(saved, default=0)), default=0)
        for first in kept:
            if first < min(needed, step):
                (self._folder / f"{first}.npz").unlink()
