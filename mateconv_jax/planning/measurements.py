"""Times measured on real GPUs: measurements.json beside this file, which `bash benchmarks/gpu.sh --record` extends."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mateconv_jax import files
from mateconv_jax.errors import UserError
from mateconv_jax.planning.hlo_report import GROUPS

PATH = Path(__file__).with_name("measurements.json")
PROGRAMS = ("training step", "decoding step")


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One program, timed on one GPU.

    Attributes:
      card: jax's device kind.
      date: "2026-11-26".
      jax: the version that was measured.
      program: one of PROGRAMS.
      shape: what the benchmark calls it.
      dtype: of the arithmetic.
      config: keys that differ from the defaults, such as {"model.dim": 768}.
      decoding: rows, cache positions and sampling of a decoding step.
      ms: per run of the program.
      groups_ms: of the kernels of some of GROUPS, from a profiler trace; empty if there is none.
      bound_ms: Roofline.groups of the same program.
      launches: Roofline.kernels of the same program.
      bound_jax: the version whose compiler made the program that was analysed.
    """

    card: str
    date: str
    jax: str
    program: str
    shape: str
    dtype: str
    config: dict[str, Any]
    decoding: dict[str, Any]
    ms: float
    groups_ms: dict[str, float]
    bound_ms: dict[str, float]
    launches: float
    bound_jax: str

    def __post_init__(self):
        kinds: dict[Any, Any] = {float: ((float, int), "a number"), str: (str, "a text")}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            types, name = kinds.get(field.type, (dict, "an object"))
            if not isinstance(value, types) or isinstance(value, bool):
                raise ValueError(f"{field.name}: {value!r} is not {name}")
        if self.program not in PROGRAMS:
            raise ValueError(f"program: {self.program!r} is unknown (expected one of {', '.join(PROGRAMS)})")
        for name, groups in (("groups_ms", self.groups_ms), ("bound_ms", self.bound_ms)):
            unknown = sorted(set(groups) - set(GROUPS))
            if unknown or not all(isinstance(ms, int | float) and ms >= 0 for ms in groups.values()):
                raise ValueError(f"{name}: {groups!r} (expected milliseconds of {', '.join(GROUPS)})")
        if not self.ms > 0 or not sum(self.bound_ms.values()) + self.launches > 0:
            raise ValueError(f"ms, bound_ms and launches: {self.ms!r}, {self.bound_ms!r}, {self.launches!r} (expected above 0)")

    @property
    def what(self) -> str:
        """What is run, whatever it is run on."""
        return json.dumps([self.program, self.dtype, self.config, self.decoding], sort_keys=True)

    @property
    def key(self) -> tuple[str, str, str]:
        return self.card, self.jax, self.what


def load(path: Path = PATH) -> list[Measurement]:
    """All measurements; none if there is no file.

    Raises:
      UserError: the file is not a list of measurements.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (expected a JSON list of measurements)") from error
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}: not JSON: {error.msg} (expected a JSON list of measurements)") from error
    if not isinstance(entries, list):
        raise UserError(f"{path}: a JSON {type(entries).__name__} (expected a list of measurements)")
    return [_parse(entry, f"{path}: entry {i + 1}") for i, entry in enumerate(entries)]


def _parse(entry, where: str) -> Measurement:
    names = [field.name for field in dataclasses.fields(Measurement)]
    if not isinstance(entry, dict) or set(entry) != set(names):
        keys = sorted(entry) if isinstance(entry, dict) else entry
        raise UserError(f"{where}: {keys!r} (expected an object with exactly {', '.join(names)})")
    try:
        return Measurement(**entry)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def record(new: Sequence[Measurement], path: Path = PATH) -> None:
    """Add measurements to the file, atomically. One of the same card, jax version and configuration is replaced; no other is
    touched.

    Raises:
      UserError: see load.
    """
    entries = {m.key: m for m in load(path)}
    entries |= {m.key: m for m in new}
    lines = [json.dumps(dataclasses.asdict(m), ensure_ascii=False) for m in entries.values()]
    files.write_text(path, "[\n" + ",\n".join(lines) + "\n]\n")
