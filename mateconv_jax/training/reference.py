"""Log-probabilities of answers under the reference: the weights that a run starts from.

They are computed once, before the first step, and kept beside the run, so that no second model is in memory, and a resumed run
has the same numbers to the bit:

RUN/reference/SPLIT.npz        log_probs (pairs, 2) fp32, and of which weights and rows they are
RUN/reference/SPLIT.ID.partial the same numbers, batch after batch, while they are being computed
"""

import collections
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from mateconv_jax import files, run_folder
from mateconv_jax.data import loader
from mateconv_jax.data.dataset import JoinedRows, Rows
from mateconv_jax.errors import UserError
from mateconv_jax.interop.formats import open_model
from mateconv_jax.runtime import distributed, sharding
from mateconv_jax.training import initial_weights
from mateconv_jax.training.checkpoints import Progress
from mateconv_jax.training.resume import Origin

LAG = 4  # batches dispatched but not yet read, as in the evaluator


@dataclasses.dataclass(frozen=True)
class Reference:
    """The reference of a run.

    Attributes:
      run: its folder.
      origin: where it starts.
      init_from, n_heads: training.init_from and model.n_heads: where a resumed run finds the weights if the numbers are gone.
      dtype: of the computation.
      score: see step.make_score_step.
      batch_size: pairs over all devices.
    """

    run: Path
    origin: Origin
    init_from: str | None
    n_heads: int
    dtype: str
    score: Callable
    mesh: Mesh
    batch_size: int

    def join(
        self,
        train: Rows,
        validation: Mapping[str, Rows],
        params: nnx.State,
        progress: Progress,
        should_stop: Callable[[], bool],
    ) -> tuple[Rows, Mapping[str, Rows]] | None:
        """The rows, those of each validation set too, with the field `reference`, read from the run's folder or computed. None
        if `should_stop` became true.

        Args:
          params: the run's parameters, which are the reference if it has not begun.
          progress: of the run; which reference it has is noted there.

        Raises:
          UserError: the numbers are gone, and so are the weights; or a log-probability is not finite.
        """
        before = progress.reference
        of = before or {"weights": weights_fingerprint(params), "dtype": self.dtype}
        joined: dict[str, Rows] = {}
        splits = {name: f"validation-{name}" if name else "validation" for name in validation}
        for split, rows in {"train": train, **{split: validation[name] for name, split in splits.items()}}.items():
            made_of = {"weights": of["weights"], "dtype": of["dtype"], "rows": rows_fingerprint(rows), "pairs": len(rows)}
            log_probs_N2 = self._read(split, made_of)
            if log_probs_N2 is None:
                if before is not None:
                    params = self._start_weights(params, of["weights"])
                log_probs_N2 = self._compute(split, rows, params, made_of, should_stop)
                if log_probs_N2 is None:
                    return None
            joined[split] = JoinedRows(rows, {"reference": log_probs_N2})
            if split == "train":
                numbers = hashlib.sha256(log_probs_N2.tobytes()).hexdigest()[:16]
                if before is not None and before["rows"] == made_of["rows"] and before["numbers"] != numbers:
                    logging.warning(
                        "not an exact continuation: the reference's log-probabilities were computed again, and differ"
                    )
                progress.reference = {**of, "rows": made_of["rows"], "numbers": numbers}
        return joined["train"], {name: joined[split] for name, split in splits.items()}

    def _start_weights(self, params: nnx.State, expected: str) -> nnx.State:
        """Those of training.init_from, in the shapes and shardings of `params`."""
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
        folder = run_folder.reference(self.run)
        if self.init_from is None:
            raise UserError(
                f"training.init_from: missing, but {str(folder)!r} lacks the reference's log-probabilities for these data "
                "(expected the model that the run started from)"
            )
        model = open_model(self.init_from, "training.init_from", n_heads=self.n_heads)
        weights = initial_weights.read(model, abstract)
        if weights_fingerprint(weights) != expected:
            raise UserError(
                f"training.init_from: not the weights that the run started from, and {str(folder)!r} lacks the reference's "
                "log-probabilities for these data (expected the same model)"
            )
        return weights

    # ---- in the run's folder ----------------------------------------------------------------------------------------

    def _read(self, split: str, made_of: dict) -> np.ndarray | None:
        """(pairs, 2), the same in every process; None: they are not there, broken, or of other weights or rows."""
        found = None
        if distributed.is_first():
            for run in self._runs():
                found = _load(run_folder.reference(run) / f"{split}.npz", made_of)
                if found is not None:
                    break
            if found is not None and run != self.run:
                _save(run_folder.reference(self.run) / f"{split}.npz", found, made_of)
        return _from_first(found)

    def _runs(self) -> list[Path]:
        resumed = self.origin.checkpoint
        return [self.run] if resumed is None else [self.run, resumed.run]

    def _compute(
        self, split: str, rows: Rows, params: nnx.State, made_of: dict, should_stop: Callable[[], bool]
    ) -> np.ndarray | None:
        """Compute what an earlier process has not, and write it. None if `should_stop` became true before the end."""
        folder = run_folder.reference(self.run)
        identity = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
        partial = folder / f"{split}.{identity}.partial"
        done = _from_first(_read_partial(partial, self.batch_size) if distributed.is_first() else None)
        assert done is not None
        begin = time.perf_counter()
        already = f", {len(done):,} of them are done" if len(done) else ""
        logging.info("reference: scoring %s pairs of %s%s", f"{len(rows):,}", split, already)
        parts = [done]
        with partial.open("ab") if distributed.is_first() else _Nowhere() as file:
            for log_probs_B2 in self._scores(split, rows, params, len(done), should_stop):
                if log_probs_B2 is None:
                    return None
                _check(log_probs_B2, split, sum(map(len, parts)))
                file.write(log_probs_B2.tobytes())
                file.flush()
                parts.append(log_probs_B2)
        log_probs_N2 = np.concatenate(parts)
        if distributed.is_first():
            _save(folder / f"{split}.npz", log_probs_N2, made_of)
            for left in folder.glob(f"{split}.*.partial"):
                if left.is_file():
                    left.unlink()
        logging.info("reference: %s pairs scored in %.0f s", f"{len(rows) - len(done):,}", time.perf_counter() - begin)
        return log_probs_N2

    def _scores(self, split: str, rows: Rows, params: nnx.State, first: int, should_stop: Callable[[], bool]):
        """(B, 2) of each batch from pair `first` on; None at the end if `should_stop` became true."""
        pending = collections.deque()
        n_batches = -(-len(rows) // self.batch_size)
        batches = loader.validation_batches(rows, self.batch_size, n_batches, first)
        bar = tqdm(
            batches, f"reference, {split}", n_batches, initial=first // self.batch_size, unit="batch", dynamic_ncols=True,
            mininterval=0.5, disable=not (sys.stderr.isatty() and distributed.is_first()),
        )  # fmt: skip
        read = first

        def oldest() -> np.ndarray:
            nonlocal read
            log_probs_B2 = np.asarray(pending.popleft(), np.float32)[: len(rows) - read]
            read += len(log_probs_B2)
            return log_probs_B2

        for batch in bar:
            pending.append(self.score(params, sharding.to_devices(batch, self.mesh)))
            if len(pending) > LAG:
                yield oldest()
            if should_stop():
                logging.info("reference: stopped after %s pairs; the same command continues from there", f"{read:,}")
                yield None
                return
        while pending:
            yield oldest()


class _Nowhere:
    """Where processes write that are not the first."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def write(self, data: bytes) -> None:
        pass

    def flush(self) -> None:
        pass


def _check(log_probs_B2: np.ndarray, split: str, first: int) -> None:
    finite = np.isfinite(log_probs_B2).all(axis=1)
    if not finite.all():
        number = first + int(np.argmin(finite))
        raise UserError(
            f"training.init_from: under these weights an answer of pair {number} of {split!r} has the log-probability "
            f"{log_probs_B2[number - first].tolist()} (expected finite ones; training.dtype=float32 may help)"
        )


def _read_partial(path: Path, batch_size: int) -> np.ndarray:
    """What an earlier process computed, whole batches only: the same batches are computed again after a kill."""
    path.parent.mkdir(exist_ok=True)
    numbers = np.fromfile(path, np.float32) if path.exists() else np.zeros(0, np.float32)
    done = numbers[: len(numbers) // (2 * batch_size) * 2 * batch_size]
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(done.nbytes)
    return done.reshape(-1, 2)


def _save(path: Path, log_probs_N2: np.ndarray, made_of: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    with files.aside(path) as written, written.open("wb") as file:
        np.savez(file, log_probs=log_probs_N2, made_of=np.array(json.dumps(made_of)))


def _load(path: Path, made_of: dict) -> np.ndarray | None:
    try:
        with np.load(path) as file:  # a zip archive, with a checksum of each member
            return file["log_probs"] if json.loads(str(file["made_of"])) == made_of else None
    except FileNotFoundError:
        return None
    except Exception as error:  # numpy and zipfile raise anything for a broken file
        logging.warning("%s cannot be read, and is computed again (%s)", path, " ".join(str(error).split())[:200])
        return None


def _from_first(numbers_N2: np.ndarray | None) -> np.ndarray | None:
    """The first process's, in every process."""
    if jax.process_count() == 1:
        return numbers_N2
    n = int(multihost_utils.broadcast_one_to_all(np.int64(-1 if numbers_N2 is None else len(numbers_N2))))
    if n < 0:
        return None
    given = np.zeros((n, 2), np.float32) if numbers_N2 is None else numbers_N2
    return np.asarray(multihost_utils.broadcast_one_to_all(given))


def rows_fingerprint(rows: Rows) -> str:
    """16 hex digits of every row, not of a few as in dataset.fingerprint: a changed pair moves no other."""
    digest = hashlib.sha256()
    for start in range(0, len(rows), 4096):
        batch = rows.read(np.arange(start, min(start + 4096, len(rows))))
        for name in sorted(batch):
            digest.update(np.ascontiguousarray(batch[name]).tobytes())
    return digest.hexdigest()[:16]


def weights_fingerprint(params: nnx.State) -> str:
    """16 hex digits of all bits of fp32 parameters, the same however they are sharded: integer sums do not depend on order."""

    def digest(p):
        bits = jax.lax.bitcast_convert_type(p, jnp.uint32)
        place = jnp.uint32(1)
        for axis, size in enumerate(p.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, p.shape, axis)
        mixed = (bits ^ (place * jnp.uint32(0x9E3779B1))) * jnp.uint32(0x85EBCA6B)
        mixed ^= mixed >> 15
        return jnp.stack([jnp.sum(mixed, dtype=jnp.uint32), jnp.sum(mixed * (2 * place + 1), dtype=jnp.uint32)])

    sums = jax.device_get(jax.jit(lambda params: jnp.stack([digest(p) for p in jax.tree.leaves(params)]))(params))
    return hashlib.sha256(np.ascontiguousarray(sums).tobytes()).hexdigest()[:16]
