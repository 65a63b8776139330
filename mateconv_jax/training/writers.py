"""Where a run's numbers go: TensorBoard, metrics.jsonl, Weights & Biases, the log and the progress bar.

Each writer has those methods of clu's metric writers that it needs: write_scalars, write_texts, flush, close. clu's own cannot
be imported without TensorFlow: 1.3 GB only to write TensorBoard files.
"""

import dataclasses
import json
import secrets
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from absl import logging
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyrefly: ignore[missing-module-attribute]  (no stubs)
from tensorboard.compat.proto.summary_pb2 import Summary  # pyrefly: ignore[missing-module-attribute]
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm

from mateconv_jax import files
from mateconv_jax.errors import UserError
from mateconv_jax.training import log_line


class MetricWriter(Protocol):
    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoardWriter:
    """One event file in `folder`. Every write is flushed: curves grow live, and a kill loses nothing.

    The file records a restart at `first_step`, so that TensorBoard drops what an earlier process wrote from there on.

    Raises:
      OSError: the file cannot be written; raised by each write, not only by close.
    """

    def __init__(self, folder: Path, first_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in alphabetical order.
        path = folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        # Not tensorboard's EventFileWriter, which imports TensorFlow where it is installed.
        self._records = RecordWriter(path.open("xb"))
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        # simple_value, not a tensor: EventAccumulator, with which scripts read curves, keeps tensors over a restart.
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._write(Event(step=step, summary=Summary(value=values)))

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        values = [text_pb(name, text).value[0] for name, text in texts.items()]
        self._write(Event(step=step, summary=Summary(value=values)))

    def flush(self) -> None:
        self._records.flush()

    def close(self) -> None:
        self._records.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
        self.flush()


class JsonlWriter:
    """One JSON object per line, {"step": 340, "train/loss": 0.7301, …}.

    Lines after `start_step` are dropped first: a run that was killed after its last checkpoint repeats those steps. So is the
    evaluation at `start_step` unless the checkpoint includes it (`evaluated`), a line cut short by a kill, and the garbage that
    a power loss may leave.
    """

    def __init__(self, path: Path, start_step: int, evaluated: bool):
        if path.exists():
            *lines, _ = path.read_bytes().split(b"\n")  # behind the last line's end there is nothing, or a line cut short
            records = [_record(line) for line in lines]
            if garbled := records.count(None):
                logging.warning("%s: dropped %d lines that are not a JSON object with a step", path, garbled)
            kept = [
                line
                for line, record in zip(lines, records, strict=True)
                if record is not None
                and (record["step"] < start_step or record["step"] == start_step and (evaluated or not _is_evaluation(record)))
            ]
            files.write_text(path, "".join(line.decode() + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _record(line: bytes) -> dict | None:
    """None: the line is no JSON object with a step."""
    try:
        record = json.loads(line)
    except ValueError:  # UnicodeDecodeError too
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _is_evaluation(record: dict) -> bool:
    return any(name.startswith(("val/", "tasks/")) for name in record)


@dataclasses.dataclass(frozen=True)
class WandbOptions:
    """config.wandb."""

    enable: bool
    project: str
    run_name: str | None


class WandbWriter:
    """Weights & Biases. A resumed run continues there as well: its id is in RUN/wandb_id.

    Raises:
      UserError: the package is not installed.
    """

    def __init__(self, folder: Path, options: WandbOptions):
        try:
            import wandb
        except ImportError as error:
            raise UserError("wandb.enable: the package is not installed (pip install wandb)") from error
        id_file = folder / "wandb_id"
        if not id_file.exists():
            files.write_text(id_file, secrets.token_hex(4))
        self._run = wandb.init(
            dir=folder,
            project=options.project,
            name=options.run_name or folder.absolute().name,
            id=id_file.read_text(encoding="utf-8"),
            resume="allow",
            config=json.loads((folder / "config.json").read_text(encoding="utf-8")),
        )

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


class LogWriter:
    """A line of the log for people to read, see log_line."""

    def __init__(self, total_steps: int):
        self._total_steps = total_steps

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        # Marked, because on a terminal the progress bar already shows the numbers.
        logging.info("%s", log_line.step_line(step, self._total_steps, scalars), extra={"metrics": True})

    def close(self) -> None:
        logging.flush()


class MarginWatch:
    """Says once that preferences move nothing: that after 50 steps policy and reference are still the same."""

    AFTER = 50  # steps
    STILL = 1e-3  # nats of the margin between the rewards: the loss is then still 0.693

    def __init__(self):
        self._done = False

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        if self._done or step < self.AFTER or "dpo/kl" not in scalars:  # without a reference the margin does not begin at 0
            return
        self._done = True
        if abs(scalars["dpo/margin"]) < self.STILL:
            logging.warning(
                "nothing moves: the margin between the rewards is %.1e after %d steps, at a learning rate of %.1e "
                "(expected about 0.01 by now; a larger training.learning_rate or a shorter warm-up would change that)",
                scalars["dpo/margin"], step, scalars["lr"],
            )  # fmt: skip

    def close(self) -> None:
        pass


class ProgressBar:
    """On a terminal, a progress bar over steps with the newest numbers; elsewhere nothing."""

    def __init__(self, start_step: int, total_steps: int):
        self._postfix: dict[str, str] = {}
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            desc="training",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def advance(self) -> None:
        """By one step."""
        self._bar.update(1)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        if "tokens/s" in scalars:
            self._postfix["tokens/s"] = f"{scalars['tokens/s']:,.0f}"
            self._postfix["MFU"] = f"{scalars['mfu']:.1%}" if "mfu" in scalars else "unknown"
        for name, value in scalars.items():
            if name == "lr":
                self._postfix["lr"] = f"{value:.3g}"
            elif name.endswith("loss") or name == "grad_norm":
                self._postfix[name.replace("train/", "")] = f"{value:.3f}"
        self._bar.set_postfix(self._postfix, refresh=False)

    def close(self) -> None:
        self._bar.close()
