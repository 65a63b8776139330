"""How a CPU training step scales with batch, length, depth and model size:  python -m benchmarks.growth [--repeat 1]

The base model's step in float32 compared with PyTorch's compiled one, as in benchmarks/train.py, varying one of these at a
time. Steps have 4,096 tokens when the length varies, and 4 rows of 512 when depth or size varies. Prints and draws a table for
each, and then prints one JSON line. Needs requirements-dev.txt (PyTorch) and 24 GB.
"""

import argparse
import json
import sys

import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from benchmarks.plan_matrix import SIZES, shape
from benchmarks.train import base_config, measure, product_rate
from mateconv_jax import config as config_lib, plotting
from mateconv_jax.model.config import ModelConfig, ModelOptions
from mateconv_jax.model.flops import parameters

PEER = "PyTorch, compile"
MAX_COMPARED_PARAMETERS = 100_000_000  # two larger models do not fit into memory together


def main(args):
    base = SIZES[2]
    by_batch = {B: (base, B, 512) for B in (1, 4, 16)}
    by_length = {S: (base, 4096 // S, S) for S in (256, 1024, 4096)}
    by_depth = {n: ((base[0], n, *base[2:]), 4, 512) for n in (2, 8, 16)}
    by_size = {count(size): (size, 4, 512) for size in SIZES[:-1]}
    panels = {"rows per step": by_batch, "tokens per row": by_length, "layers": by_depth, "parameters": by_size}
    peak = product_rate()
    measured = {case: None for panel in panels.values() for case in panel.values()}
    for size, B, S in measured:
        config = base_config(**shape(size), max_seq_len=S)
        n_parameters = count(size)
        peers = ["compile"] if n_parameters < MAX_COMPARED_PARAMETERS else []
        measured[size, B, S] = measure(config, B, peers, args.repeat)
        print(f"{n_parameters:,} parameters, {B} x {S}: {measured[size, B, S]['seconds']}", file=sys.stderr, flush=True)

    panels = {what: {x: us_per_token(measured[case], peak) for x, case in panel.items()} for what, panel in panels.items()}
    console = Console()
    for what, panel in panels.items():
        table = Table(what, "ours", PEER, "at matmul speed", "ours / theirs", title="microseconds per token")
        for x, m in panel.items():
            theirs = [f"{m[PEER]:,.1f}", f"{m[PEER] / m['ours']:.2f}"] if PEER in m else ["", ""]
            table.add_row(f"{x:,}", f"{m['ours']:,.1f}", theirs[0], f"{m['least']:,.1f}", theirs[1])
        console.print(table)
    draw(panels, args.output)
    print(json.dumps({"product_gflops": round(peak / 1e9, 1), "us_a_token": panels}))


def count(size: tuple[int, ...]) -> int:
    return parameters(ModelConfig.make(config_lib.options(ModelOptions, base_config(**shape(size)).model), "float32"))[0]


def us_per_token(case: dict, peak: float) -> dict[str, float]:
    """Microseconds per token of each side, and "least", the model FLOPs at `peak` FLOP/s."""
    tokens = case["batch_size"] * case["seq_len"]
    return {name: seconds / tokens * 1e6 for name, seconds in (case["seconds"] | {"least": case["flops"] / peak}).items()}


def draw(panels: dict[str, dict[int, dict[str, float]]], path: str) -> None:
    lines = (("ours", "o-", plotting.BLUE, "ours"), (PEER, "s-", plotting.GREEN, "PyTorch, compiled"))
    lines += (("least", "--", plotting.RED, "at matmul speed"),)
    with plotting.style():
        figure, axes = plt.subplots(1, 4, figsize=(13, 3.4), layout="constrained")
        for axis, (what, panel) in zip(axes, panels.items(), strict=True):
            for key, line, color, label in lines:
                points = {x: m[key] for x, m in panel.items() if key in m}
                axis.plot(points.keys(), points.values(), line, color=color, label=label, markersize=4)
            axis.set(xscale="log", xlabel=what)
            if what in ("layers", "parameters"):
                axis.set(yscale="log")
                plotting.log_ticks(axis.yaxis)
            else:
                axis.set_ylim(0)
            axis.grid(True)
            axis.xaxis.set_major_locator(plt.FixedLocator(list(panel)))
            axis.xaxis.set_major_formatter(plt.FuncFormatter(plotting.short))
            axis.minorticks_off()
        axes[0].set_title("microseconds per token")
        axes[0].legend(frameon=False, fontsize=9)
        figure.savefig(path, dpi=80)
        plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--output", default="benchmarks/growth.png", metavar="FILE")
    main(parser.parse_args())
