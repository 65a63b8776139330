"""Add measured times to those that `plan` expects times from:
python -m benchmarks.gpu.record runs/gpu/gpu.json [--to mateconv_jax/planning/measurements.json]

Each timed program is compiled once more, as `plan` compiles it, for its lower bounds by kernel group. That needs no GPU, but
the package jax-cuda13-pjrt in jax's version (jax[cuda13] brings it).
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from benchmarks.gpu import sizes
from mateconv_jax.errors import UserError, exit_code
from mateconv_jax.generation_config import GenerationConfig
from mateconv_jax.planning import measurements, programs, target
from mateconv_jax.planning.measurements import Measurement
from mateconv_jax.planning.roofline import Roofline, roofline
from mateconv_jax.planning.target import Gpu
from mateconv_jax.training import setup

# Groups of a trace (timing.GROUPS) as groups of a program's kernels.
GROUPS = {"matmuls": "products", "attention": "attention", "copies": "copies"}


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # a GPU that is here stays free
    results = json.loads(Path(args.results).read_text(encoding="utf-8"))
    gpu = card(results)
    with target.compiling_for(gpu):
        new = list(timed(results, gpu, compiled_bounds))
    measurements.record(new, Path(args.to))
    for m in new:
        print(f"{m.program}, {m.shape}: {m.ms:.3f} ms, without launches at best {sum(m.bound_ms.values()):.3f}")
    print(f"{len(new)} measurements on {gpu.device_kind} recorded in {args.to}")


def card(results: dict) -> Gpu:
    """Raises UserError if it has no data sheet."""
    name = results["card"].split(",")[0]
    gpu = target.by_device_kind(name)
    if gpu is None:
        known = ", ".join(gpu.device_kind for gpu in target.GPUS.values())
        raise UserError(f"--record: no data sheet for {name!r}, so nothing is recorded (expected one of {known})")
    return gpu


def timed(results: dict, gpu: Gpu, bounds: Callable[[dict, Gpu], Roofline]) -> Iterator[Measurement]:
    """The timed programs of gpu.json. `bounds(row, gpu)` gives a row's roofline."""
    rows = [row for part in results["parts"].values() for row in part["rows"] if "config" in row]
    traced = {json.dumps(row["config"]): by_kernel_group(row["groups"]) for row in rows if "groups" in row}
    rows = [row for row in rows if "seconds" in row]
    with ThreadPoolExecutor(4) as pool:
        for row, found in zip(rows, pool.map(lambda row: bounds(row, gpu), rows), strict=True):
            decoding = row.get("decoding", {})
            yield Measurement(
                card=gpu.device_kind,
                date=results["started"].split()[0],
                jax=results["versions"]["jax"],
                program="decoding step" if decoding else "training step",
                shape=row["what"],
                dtype=row["dtype"],
                config=row["config"],
                decoding=decoding,
                ms=significant(1e3 * row["seconds"]),
                groups_ms={} if decoding else traced.get(json.dumps(row["config"]), {}),
                bound_ms={group: significant(1e3 * seconds) for group, seconds in found.groups.items()},
                launches=found.kernels,
                bound_jax=jax.__version__,
            )


def by_kernel_group(traced: dict[str, dict[str, float]]) -> dict[str, float]:
    """Milliseconds of a trace's groups, by hlo_report.GROUPS. What is none of GROUPS is a fusion of XLA's."""
    sums: dict[str, float] = {}
    for name, group in traced.items():
        name = GROUPS.get(name, "elementwise")
        sums[name] = sums.get(name, 0.0) + group["ms"]
    return {name: significant(ms) for name, ms in sums.items()}


def significant(value: float) -> float:
    return float(f"{value:.4g}")


def compiled_bounds(row: dict, gpu: Gpu) -> Roofline:
    """Of the program that `plan` compiles for a row's configuration; inside of target.compiling_for(gpu).

    Raises:
      UserError: XLA's CUDA compiler is not installed.
    """
    config = sizes.config_from(row["config"])
    c = setup.model_config(config, gpu.device)
    [device] = target.devices(gpu, 1)
    if decoding := row.get("decoding"):
        how = GenerationConfig(do_sample=decoding["do_sample"])
        program = programs.decode_loop(c, device, decoding["rows"], how, decoding["cache"])
    else:
        program = programs.compile_step(programs.training_step(config, c, [device], 1000))
    return roofline(program.report, gpu, 1, 1)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.record", description=__doc__)
    parser.add_argument("results", metavar="GPU.JSON")
    parser.add_argument("--to", default=str(measurements.PATH), metavar="FILE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
