"""What a part found: a line on the terminal at once, and a row of gpu.json and gpu.md."""

import json
import os
import time
from pathlib import Path


class Report:
    """Rows of one part. Each is appended to OUT/PART.jsonl when it is known, so that a part that is killed keeps its rows."""

    def __init__(self, out: str | Path, part: str):
        self._path = Path(out) / f"{part}.jsonl"
        self._begin = time.perf_counter()

    def row(self, what: str, measured, beside="", ok: bool | None = None, **numbers) -> None:
        """One result.

        Args:
          what: was measured or checked.
          measured, beside: as they shall be read; beside: the limit, the peer's figure or what was expected.
          ok: whether a check holds; None: a measurement.
          numbers: the same for a program, unrounded.
        """
        row = {"what": what, "measured": str(measured), "beside": str(beside), "ok": ok} | numbers
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + os.linesep)
        mark = {True: "ok  ", False: "FAIL", None: "    "}[ok]
        seconds = time.perf_counter() - self._begin
        print(f"{seconds:4.0f} s  {mark} {what}: {measured}{f'  |  {beside}' if beside else ''}", flush=True)


def read(out: str | Path, part: str) -> list[dict]:
    path = Path(out) / f"{part}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def markdown(parts: dict[str, dict]) -> str:
    """A table for each part. parts: {name: {"seconds", "ended", "rows"}}."""
    lines = []
    for name, part in parts.items():
        lines += [f"### {name} ({part['seconds']:.0f} s{'' if part['ended'] == 'done' else ', ' + part['ended']})", ""]
        lines += ["| | measured | beside | |", "|---|---|---|---|"]
        for row in part["rows"]:
            ok = {True: "ok", False: "**fails**", None: ""}[row["ok"]]
            cells = (row["what"], row["measured"], row["beside"], ok)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)
