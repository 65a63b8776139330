"""Results of a part: each is a line on the terminal and a row of gpu.json and gpu.md."""

import json
import os
import time
from pathlib import Path


class Report:
    """The rows of one part, appended to OUT/PART.jsonl one by one, so that a killed part keeps its rows."""

    def __init__(self, out: str | Path, part: str):
        self._path = Path(out) / f"{part}.jsonl"
        self._begin = time.perf_counter()

    def row(self, what: str, measured, beside="", ok: bool | None = None, **numbers) -> None:
        """Add a result.

        Args:
          what: what was measured or checked.
          measured: the result, for people.
          beside: what to compare it with: a limit, the peer's result or the expected value.
          ok: whether a check passed; None for a measurement.
          numbers: the unrounded values, for programs. A row with `seconds`, `config` and `dtype` can be recorded (record.py).
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
    """One Markdown table per part. parts: {name: {"seconds", "ended", "rows"}}."""
    lines = []
    for name, part in parts.items():
        lines += [f"### {name} ({part['seconds']:.0f} s{'' if part['ended'] == 'done' else ', ' + part['ended']})", ""]
        lines += ["| | measured | compared with | |", "|---|---|---|---|"]
        for row in part["rows"]:
            ok = {True: "ok", False: "**fails**", None: ""}[row["ok"]]
            cells = (row["what"], row["measured"], row["beside"], ok)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)
