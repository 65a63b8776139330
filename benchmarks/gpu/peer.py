"""A PyTorch process that prepares, waits for a signal, measures and exits, so that neither side holds memory while the other is
timed.
"""

import json
import subprocess
import sys


class Peer:
    """A process `python -m MODULE ARGUMENTS` that calls `serve`."""

    def __init__(self, module: str, *arguments: str):
        command = [sys.executable, "-m", module, *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ready(self) -> bool:
        """Wait until it is prepared. False if it failed."""
        return self._process.stdout.readline().strip() == "ready"

    def measure(self) -> dict | None:
        """Let it measure, and return its result; None if it failed."""
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        except OSError:
            return None
        line = self._process.stdout.readline()
        self._process.wait()
        return json.loads(line) if line.startswith("{") else None

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def serve(prepare) -> None:
    """The peer's side: `prepare()` returns a function that measures and returns a dict."""
    measure = prepare()
    print("ready", flush=True)
    if sys.stdin.readline():
        print(json.dumps(measure()), flush=True)
