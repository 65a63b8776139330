"""A PyTorch process that prepares, waits for the word, measures and ends: neither side takes the other's memory."""

import json
import subprocess
import sys


class Peer:
    """Runs `python -m MODULE ARGUMENTS`, which calls `serve`."""

    def __init__(self, module: str, *arguments: str):
        command = [sys.executable, "-m", module, *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ready(self) -> bool:
        """Waits until it is prepared; False where it failed."""
        return self._process.stdout.readline().strip() == "ready"

    def measure(self) -> dict | None:
        """What it measured; None where it failed."""
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
    """In the peer: `prepare()` returns the function that measures, which returns a dict."""
    measure = prepare()
    print("ready", flush=True)
    if sys.stdin.readline():
        print(json.dumps(measure()), flush=True)
