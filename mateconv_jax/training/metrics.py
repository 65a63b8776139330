"""Where a run's numbers go: TensorBoard, the log, metrics.jsonl and the progress bar."""

import contextlib
import dataclasses
import json
import logging
import math
import resource
import secrets
import sys
import time
from pathlib import Path

import jax
from absl import logging as absl_logging
from clu import metric_writers, periodic_actions
from ml_collections import ConfigDict
from tqdm import tqdm
from tqdm.contrib import DummyTqdmFile

from mateconv_jax import files
from mateconv_jax.errors import UserError
from mateconv_jax.runtime import distributed


@dataclasses.dataclass(frozen=True)
class BadStep:
    """A step whose update was left out: how many there are now in a row, and the gradient's norm by leaf."""

    step: int
    in_a_row: int
    loss: float
    leaf_norms: dict[str, float]

    def reason(self) -> str:
        finite = all(map(math.isfinite, (self.loss, *self.leaf_norms.values())))
        return f"the loss {self.loss:.4f} is a spike" if finite else "the gradient is not finite"

    def largest(self, n: int = 5) -> str:
        """The leaves with the largest norms, those that are not finite first."""
        order = sorted(self.leaf_norms.items(), key=lambda item: (math.isfinite(item[1]), -item[1]))
        return ", ".join(f"{name} {norm:.3g}" for name, norm in order[:n])


def _scalars(metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: value for name, value in metrics.items() if name != "leaf_norms"}


class Wandb:
    """The same numbers on Weights & Biases. A run that goes on, goes on there: its id lies in RUN/wandb_id.

    Raises:
      UserError: the package is not installed.
    """

    def __init__(self, folder: Path, wandb_config: ConfigDict):
        try:
            import wandb
        except ImportError as error:
            raise UserError("wandb.enable: the package is not installed (pip install wandb)") from error
        id_file = folder / "wandb_id"
        if not id_file.exists():
            files.write_text(id_file, secrets.token_hex(4))
        self._run = wandb.init(
            dir=folder,
            project=wandb_config.project,
            name=wandb_config.run_name or folder.absolute().name,
            id=id_file.read_text(),
            resume="allow",
            config=json.loads((folder / "config.json").read_text(encoding="utf-8")),
        )

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars, step=step)

    def close(self) -> None:
        self._run.finish()


class Metrics:
    """Takes a step's metrics as they are on the device and reads them when a later step has been dispatched, so that the
    device never waits for the host. Use as a context manager.
    """

    def __init__(
        self,
        folder: Path,
        leaf_names: list[str],
        start_step: int,
        evaluated: bool,
        total_steps: int,
        tokens_per_step: int,
        log_interval: int,
        mfu_per_token: float | None = None,
        wandb: ConfigDict | None = None,
        profile_step: int | None = None,
    ):
        """leaf_names: of leaf_norms. mfu_per_token: what one token a second is of all devices' peak; None: not known."""
        self._board = self._log = self._jsonl = self._wandb = None
        if distributed.is_first():
            if wandb is not None and wandb.enable:
                self._wandb = Wandb(folder, wandb)
            self._board = metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(folder / "tensorboard")))
            self._log = metric_writers.LoggingWriter()
            _forget_after(folder / "metrics.jsonl", start_step, evaluated)
            self._jsonl = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            desc="training",
            dynamic_ncols=True,
            disable=not (sys.stderr.isatty() and distributed.is_first()),
        )
        self._postfix: dict[str, str] = {}
        self._leaf_names = leaf_names
        self._tokens_per_step = tokens_per_step
        self._mfu_per_token = mfu_per_token
        self._log_interval = log_interval
        self._pending = None  # (step, metrics on the device)
        self._first_step = start_step + 1
        self._window_step = None  # tokens/s is measured from the end of this step ...
        self._window_start = 0.0  # ... which was then
        self._waited = 0.0  # seconds in it for input
        self._profile = None
        if profile_step is not None and distributed.is_first():
            self._profile = periodic_actions.Profile(
                logdir=folder / "tensorboard", num_profile_steps=5, profile_duration_ms=None, first_profile=profile_step,
                every_secs=None,
            )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()
        if self._board is not None:
            self._board.close()
            self._jsonl.close()
        if self._wandb is not None:
            self._wandb.close()

    def push(self, step: int, metrics: dict[str, jax.Array]) -> BadStep | None:
        """Metrics of the step just dispatched. They are read at the next push; every log_interval steps they are written."""
        bad_step = self.flush()
        self._bar.update(1)
        if self._profile is not None:
            self._profile(step)
        self._pending = step, metrics
        return bad_step

    def flush(self) -> BadStep | None:
        """Read what waits, blocking until that step is done, and write it where it is its turn.

        Returns:
          The step, where its update was left out.
        """
        if self._pending is None:
            return None
        (step, on_device), self._pending = self._pending, None
        in_a_row = int(on_device["bad_steps"])
        if step % self._log_interval == 0 or step == self._first_step:
            self._write_step(step, on_device)
        if not in_a_row:
            return None
        norms = dict(zip(self._leaf_names, jax.device_get(on_device["leaf_norms"]).tolist(), strict=True))
        return BadStep(step, in_a_row, float(on_device["train/loss"]), norms)

    def _write_step(self, step: int, on_device: dict[str, jax.Array]) -> None:
        scalars = {name: float(value) for name, value in jax.device_get(_scalars(on_device)).items()}
        now = time.perf_counter()
        if self._window_step is not None:
            step_time = (now - self._window_start) / (step - self._window_step)
            scalars |= {"tokens/s": self._tokens_per_step / step_time, "step_time_s": step_time}
            scalars |= {"input_wait": self._waited / (now - self._window_start), "memory_gb": _peak_memory() / 1e9}
            self._postfix["tokens/s"] = f"{scalars['tokens/s']:,.0f}"
            if self._mfu_per_token is not None:
                scalars["mfu"] = scalars["tokens/s"] * self._mfu_per_token
            self._postfix["MFU"] = f"{scalars['mfu']:.1%}" if "mfu" in scalars else "unknown"
        self._window_step, self._window_start, self._waited = step, now, 0.0
        if step == 1:
            absl_logging.info("initial loss: %.4f", scalars["train/loss"])
        self.write(step, scalars)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """One line of metrics.jsonl, one of the log, one point of each TensorBoard curve."""
        if self._board is None:
            return
        self._board.write_scalars(step, scalars)
        self._log.write_scalars(step, scalars)
        self._jsonl.write(json.dumps({"step": step, **scalars}) + "\n")
        self._jsonl.flush()
        if self._wandb is not None:
            self._wandb.write(step, scalars)
        shown = {name: value for name, value in scalars.items() if name.endswith("loss") or name in ("lr", "grad_norm")}
        self._postfix |= {
            name.replace("train/", ""): f"{value:.3g}" if name == "lr" else f"{value:.3f}" for name, value in shown.items()
        }
        self._bar.set_postfix(self._postfix, refresh=False)

    def write_samples(self, step: int, samples: list[tuple[str, str]]) -> None:
        """Prompts and how they go on: to the log and to TensorBoard."""
        for prompt, text in samples:
            absl_logging.info("sample of step %d: %s|%s", step, prompt, text)
        if self._board is not None:
            self._board.write_texts(step, {f"samples/{i}": prompt + text for i, (prompt, text) in enumerate(samples)})

    @contextlib.contextmanager
    def waiting_for_input(self):
        """The time inside is the step's wait for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def not_training(self):
        """What happens inside does not count in tokens/s."""
        start = time.perf_counter()
        yield
        self._window_start += time.perf_counter() - start


def _peak_memory() -> int:
    """Bytes: the most that this process's fullest device has held; on the CPU, that the process has."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stats):
        return max(device_stats["peak_bytes_in_use"] for device_stats in stats)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _forget_after(path: Path, step: int, evaluated: bool) -> None:
    """A run that went on past its last checkpoint will do those steps again, and the evaluation of `step` where the checkpoint
    does not know of it: drop their lines, and a torn one.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            record = json.loads(line)
            if record["step"] < step or record["step"] == step and (evaluated or "val/loss" not in record):
                kept.append(line)
    files.write_text(path, "".join(kept))


@contextlib.contextmanager
def logging_to(path: Path):
    """Inside, INFO lines of ours and of clu go to standard error and to `path`; other libraries' only from WARNING on.

    On a terminal the metrics are on the progress bar already, and their log lines go to the file alone.
    """
    logger = absl_logging.get_absl_logger()
    on_terminal = sys.stderr.isatty()
    to_console = logging.StreamHandler(DummyTqdmFile(sys.stderr) if on_terminal else sys.stderr)
    to_console.addFilter(lambda record: _is_ours(record) or _is_metrics(record) and not on_terminal)
    handlers = [to_console]
    if distributed.is_first():
        to_file = logging.FileHandler(path, encoding="utf-8")
        to_file.addFilter(lambda record: _is_ours(record) or _is_metrics(record))
        handlers.append(to_file)
    else:
        to_console.setLevel(logging.WARNING)
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
    propagate, level = logger.propagate, absl_logging.get_verbosity()
    logger.propagate = False
    absl_logging.set_verbosity(absl_logging.INFO)
    absl_handler = absl_logging.get_absl_handler()
    logger.removeHandler(absl_handler)
    try:
        yield
    finally:
        logger.propagate = propagate
        absl_logging.set_verbosity(level)
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()


def _is_ours(record: logging.LogRecord) -> bool:
    return "/mateconv_jax/" in record.pathname or record.levelno >= logging.WARNING


def _is_metrics(record: logging.LogRecord) -> bool:
    return record.pathname.endswith("clu/metric_writers/logging_writer.py")
