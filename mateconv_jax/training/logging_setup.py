"""Where log lines go: standard error and RUN/train.log."""

import contextlib
import logging
import sys
from collections.abc import Generator
from pathlib import Path

from absl import logging as absl_logging
from tqdm.contrib import DummyTqdmFile

import mateconv_jax
from mateconv_jax.runtime import distributed
from mateconv_jax.terminal import escaped

_PACKAGE = str(Path(mateconv_jax.__file__).parent) + "/"


@contextlib.contextmanager
def logging_to(path: Path) -> Generator[None]:
    """Within the block, this package logs from INFO on to standard error and to `path`, other libraries from WARNING on.

    On a terminal the progress bar already shows the metrics, so their lines go only to the file. Only the first process writes
    the file; the others show warnings.
    """
    logger = absl_logging.get_absl_logger()
    on_terminal = sys.stderr.isatty()
    to_console = logging.StreamHandler(DummyTqdmFile(sys.stderr) if on_terminal else sys.stderr)
    to_console.addFilter(lambda record: _is_ours(record) and not (on_terminal and hasattr(record, "metrics")))
    handlers: list[logging.Handler] = [to_console]
    if distributed.is_first():
        to_file = _LogFile(path, encoding="utf-8")
        to_file.addFilter(_is_ours)
        handlers.append(to_file)
    else:
        to_console.setLevel(logging.WARNING)
    for handler in handlers:
        handler.setFormatter(_Escaping("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
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
            with contextlib.suppress(OSError):  # what is left in its buffer does not fit on the disk either
                handler.close()


class _Escaping(logging.Formatter):
    """Samples, prompts and rewards' errors quote what a model or a file says; the log is read in a terminal as well."""

    def format(self, record: logging.LogRecord) -> str:
        return escaped(super().format(record))


class _LogFile(logging.FileHandler):
    """On a full disk lines are lost without a traceback for each; the metrics, written beside it, end the run."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)


def _is_ours(record: logging.LogRecord) -> bool:
    return record.pathname.startswith(_PACKAGE) or record.levelno >= logging.WARNING
