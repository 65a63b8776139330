"""Step metrics: read from the device once a later step was dispatched, then handed to the writers."""

import contextlib
from pathlib import Path

import jax
from absl import logging

from mateconv_jax.runtime import distributed
from mateconv_jax.training.profiler import Profiler
from mateconv_jax.training.skipped_steps import BadStep
from mateconv_jax.training.throughput import Throughput
from mateconv_jax.training.writers import (
    JsonlWriter,
    LogWriter,
    MarginWatch,
    MetricWriter,
    ProgressBar,
    TensorBoardWriter,
    WandbOptions,
    WandbWriter,
)


class Metrics:
    """Takes the metrics of a step while they are on the device and reads them once a later step was dispatched, so that the
    device never waits for the host. A context manager: leaving the block closes the writers.
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
        wandb: WandbOptions | None = None,
        profile_step: int | None = None,
    ):
        """Only the first process writes.

        Args:
          leaf_names: names of the entries of leaf_norms.
          evaluated: whether the checkpoint includes the evaluation at start_step.
          mfu_per_token: see Throughput.
        """
        self._leaf_names = leaf_names
        self._log_interval = log_interval
        self._first_step = start_step + 1
        self._pending: tuple[int, dict[str, jax.Array]] | None = None  # a step, and its metrics on the device
        self._throughput = Throughput(tokens_per_step, mfu_per_token)
        self.waiting_for_input, self.not_training = self._throughput.waiting_for_input, self._throughput.not_training
        self._writers: list[MetricWriter] = []
        self._board = self._bar = self._profiler = None
        if distributed.is_first():
            if wandb is not None and wandb.enable:
                self._writers.append(WandbWriter(folder, wandb))
            self._board = TensorBoardWriter(folder / "tensorboard", start_step + 1)
            self._bar = ProgressBar(start_step, total_steps)
            jsonl = JsonlWriter(folder / "metrics.jsonl", start_step, evaluated)
            self._writers += [self._board, jsonl, LogWriter(total_steps), MarginWatch(), self._bar]
            self._profiler = Profiler(folder / "tensorboard", profile_step)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.ExitStack() as closing:  # all of them, even if the disk is full
            for writer in self._writers:
                closing.callback(writer.close)
            if self._profiler is not None:
                closing.callback(self._profiler.close)

    def push(self, step: int, metrics: dict[str, jax.Array]) -> BadStep | None:
        """Take the metrics of the step just dispatched, to be read at the next push, and return what the last ones showed."""
        bad_step = self.flush()
        if self._bar is not None:
            self._bar.advance()
        if self._profiler is not None:
            with self.not_training():  # writing the trace takes seconds
                self._profiler.dispatched(step)
        self._pending = step, metrics
        return bad_step

    def flush(self) -> BadStep | None:
        """Read the pending metrics, blocking until their step is done; every log_interval steps they are written.

        Returns:
          The step if its update was skipped.
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
        on_host = jax.device_get({name: value for name, value in on_device.items() if name != "leaf_norms"})
        scalars = {name: float(value) for name, value in on_host.items()} | self._throughput.measure(step)
        if step == 1:
            logging.info("initial loss: %.6f", scalars["train/loss"])
        self.write(step, scalars)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """To every writer."""
        for writer in self._writers:
            writer.write_scalars(step, scalars)

    def write_samples(self, step: int, samples: list[tuple[str, str]]) -> None:
        """Prompts and their continuations, to the log and TensorBoard."""
        for prompt, text in samples:
            logging.info("sample of step %d: %s|%s", step, prompt, text)
        if self._board is not None:
            self._board.write_texts(step, {f"samples/{i}": prompt + text for i, (prompt, text) in enumerate(samples)})
