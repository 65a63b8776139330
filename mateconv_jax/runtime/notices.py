"""What a process tells the others at any time, whatever their main threads wait for: that it fails, or is asked to stop."""

import atexit
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable

import jax

from mateconv_jax.errors import UserError
from mateconv_jax.runtime import agreement

FOLDER, LEFT = "mateconv_jax/notices/", "mateconv_jax/left/"
TICK_SECONDS = 0.5  # between two looks at the coordinator's store, less than a millisecond each
# For a process whose own main thread is about to end, because it failed in the same way.
GRACE_SECONDS = 5.0
# The coordinator lives in the first process. When it goes, jax aborts the others, before they have written what happened.
LAST_SECONDS = 20.0  # a process that cannot even say that it leaves is not waited for longer


class Notices:
    """Within the block, what one process posts is handled in every process within a second, by a thread.

    A process that leaves the block by an exception takes the others with it: they would wait in a collective that it never
    reaches, and it would wait 5 minutes for them in jax's shutdown. They print why, and exit with the same code.
    """

    def __init__(self):
        self._handlers: dict[str, Callable[[int, str], None]] = {"failed": self._failed}
        self._outbox: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self._seen: set[str] = set()
        self._ended = threading.Event()

    def on(self, kind: str, handler: Callable[[int, str], None]) -> None:
        """Before the block: call handler(process, text) for every process, this one too, that posts a notice of that kind."""
        self._handlers[kind] = handler

    def post(self, kind: str, text: str = "") -> None:
        """Once for each kind. May be called by a signal handler."""
        self._outbox.put((kind, text))

    def __enter__(self):
        if jax.process_count() > 1:
            threading.Thread(target=self._watch, name="notices", daemon=True).start()
        return self

    def __exit__(self, _, error: BaseException | None, __):
        self._ended.set()
        if error is not None and jax.process_count() > 1:
            # Before jax's own, which waits for processes that will not come.
            atexit.register(leave, self.fail(error))

    def fail(self, error: BaseException) -> int:
        """End all processes. Another thread may call it: the main one may be waiting for a process that waits for this one.
        Returns the exit code.
        """
        code = 2 if isinstance(error, UserError) else 1
        if jax.process_count() > 1:
            message = {"code": code, "error": " ".join(str(error).split())[:1000] or type(error).__name__}
            _set(f"{FOLDER}failed/{jax.process_index()}", json.dumps(message))
        return code

    def _watch(self) -> None:
        while not self._ended.wait(TICK_SECONDS):
            try:
                self._exchange()
            except jax.errors.JaxRuntimeError:  # the coordinator is gone: jax ends this process
                return

    def _exchange(self) -> None:
        while not self._outbox.empty():
            kind, text = self._outbox.get()
            _set(f"{FOLDER}{kind}/{jax.process_index()}", text)
        for key, text in agreement.store().key_value_dir_get(FOLDER):
            if key not in self._seen:
                self._seen.add(key)
                kind, process = key.split("/")[-2:]
                self._handlers[kind](int(process), text)

    def _failed(self, process: int, text: str) -> None:
        failure = json.loads(text)
        if self._ended.wait(GRACE_SECONDS):
            return
        print(f"error: process {process} of {jax.process_count()} failed: {failure['error']}", file=sys.stderr)
        leave(failure["code"])


def leave(code: int) -> None:
    """End this process, once the others are about to end as well: connections that break under a computation would be their
    error. The first process goes last.
    """
    if jax.process_count() > 1:
        _set(f"{LEFT}{jax.process_index()}", "")
        end = time.monotonic() + LAST_SECONDS
        while time.monotonic() < end and len(agreement.store().key_value_dir_get(LEFT)) < jax.process_count():
            time.sleep(0.1)
        if jax.process_index() == 0:
            time.sleep(TICK_SECONDS)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _set(key: str, text: str) -> None:
    agreement.store().key_value_set(key, text, allow_overwrite=True)
