"""Trainings in processes of their own, forked from a server that has imported everything: 0.2 s each instead of 7."""

import atexit
import faulthandler
import multiprocessing
import multiprocessing.forkserver
import os
import sys
import time
import traceback
from pathlib import Path

from mateconv_jax.errors import exit_code

_context = multiprocessing.get_context("forkserver")


def start_server() -> None:
    """In place of one that was started for something else."""
    multiprocessing.forkserver._forkserver._stop()
    _context.set_forkserver_preload(["mateconv_jax.training.loop"])


def _main(flags: list[str], log: str, environment: dict[str, str], stop_at: int | None, prepare) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)
    faulthandler.dump_traceback_later(200, file=2)  # where it hangs, before `finish` gives up
    os.environ.update(environment)
    from mateconv_jax import train

    if prepare is not None:
        prepare()
    if stop_at is not None:
        _send_sigterm_at(stop_at)
    sys.argv = ["train", *flags]
    try:
        code = exit_code(train.main, sys.argv)
    except Exception:  # as Python would
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()  # before Python 3.13, processes of multiprocessing do not
    sys.exit(code)


def _send_sigterm_at(step: int) -> None:
    import signal

    from mateconv_jax.training import metrics

    push = metrics.Metrics.push

    def pushing(self, at, step_metrics):
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return push(self, at, step_metrics)

    metrics.Metrics.push = pushing


class Training:
    """`python -m mateconv_jax.train FLAGS`. stop_at: it sends itself SIGTERM when that step is dispatched. prepare: called in
    the process before it trains.
    """

    def __init__(
        self, flags: list[str], log: Path, environment: dict[str, str] = {}, stop_at: int | None = None, prepare=None,  # noqa: B006
    ):  # fmt: skip
        self._log = log
        self.process = _context.Process(target=_main, args=(flags, str(log), environment, stop_at, prepare))
        self.process.start()

    def output(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def wait_for(self, text: str, seconds: float = 120, done_is_fine: bool = False) -> None:
        """Until it has printed that; an end without it is a failure, unless `done_is_fine`."""
        end = time.monotonic() + seconds
        while text not in self.output():
            if done_is_fine and self.process.exitcode == 0:
                return
            assert self.process.is_alive() and time.monotonic() < end, self.output()[-3000:]
            time.sleep(0.01)

    def finish(self, code: int = 0) -> str:
        """Its output, once it has ended with that exit code."""
        self.process.join(300)
        assert self.process.exitcode == code, f"{self.process.exitcode}\n{self.output()[-3000:]}"
        return self.output()
