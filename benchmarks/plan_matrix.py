"""How a training step scales with row length and model size, predicted from its compiled program for an H100:
python -m benchmarks.plan_matrix [--output benchmarks/plan_matrix.png]

16,384 tokens per step on one device, bfloat16, with EMA; nothing is run. Prints and draws two tables, and then prints one JSON
line. Needs jax-cuda13-pjrt in jax's version.
"""

import argparse
import json
import sys
import time

import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from mateconv_jax import config as config_lib, plotting
from mateconv_jax.model import flops
from mateconv_jax.model.config import ModelConfig, ModelOptions
from mateconv_jax.planning import programs, target
from mateconv_jax.planning.roofline import roofline

TOKENS = 16_384
LENGTHS = (256, 512, 1024, 2048, 4096)
# dim, layers, heads, key/value heads
SIZES = ((96, 3, 3, 3), (256, 6, 8, 4), (512, 8, 16, 8), (768, 12, 12, 6), (1280, 18, 20, 10), (2048, 22, 32, 8))


def main(args):
    by_length, by_size = [], []
    for length in LENGTHS:
        by_length.append(measure(SIZES[2], length))
        print(f"length {length}: {by_length[-1]['compile_s']} s", file=sys.stderr, flush=True)
    for size in SIZES:
        by_size.append(next(m for m in by_length if m["length"] == 512) if size == SIZES[2] else measure(size, 512))
        print(
            f"{by_size[-1]['parameters']:,} parameters: compiled in {by_size[-1]['compile_s']} s", file=sys.stderr, flush=True
        )
    console = Console(width=110)
    console.print(table("by row length, base model", "length", by_length))
    console.print(table("by model size, 512 tokens per row", "parameters", by_size))
    draw(by_length, by_size, args.output)
    print(json.dumps({"gpu": args.gpu, "tokens": TOKENS, "by_length": by_length, "by_size": by_size}))


def shape(size: tuple[int, ...]) -> dict[str, int]:
    """One of SIZES as keys of config.model."""
    return dict(zip(("dim", "n_layers", "n_heads", "n_kv_heads"), size, strict=True))


def measure(size: tuple[int, ...], length: int) -> dict:
    gpu = target.by_name(args.gpu)
    config = config_lib.default_config()
    config.model.update(shape(size), max_seq_len=length)
    config.data.seq_len = length
    config.training.update(dict(batch_size=TOKENS // length, use_ema=True))
    config = config_lib.resolve(config)
    c = ModelConfig.make(config_lib.options(ModelOptions, config.model), "auto", gpu.device)
    begin = time.perf_counter()
    with target.compiling_for(gpu):
        step = programs.compile_step(programs.training_step(config, c, target.devices(gpu, 1), 1000))
    seconds = time.perf_counter() - begin
    bounds = roofline(step.report, gpu, 1, 1)
    return {
        "length": length,
        "parameters": step.arguments["parameters"] // 4,
        "model_flops_per_token": flops.training_flops_per_token(c, length),
        "flops_per_token": step.report.flops() / TOKENS,
        "peak_gb": round(step.peak / 1e9, 3),
        "bytes_per_token": sum(k.times * k.bytes for k in step.report.kernels) / TOKENS,
        "launches": step.report.launches(),
        "ns_per_token": round(bounds.seconds / TOKENS * 1e9, 1),
        "bound": bounds.bound,
        "mfu": round(TOKENS * flops.training_flops_per_token(c, length) / bounds.seconds / gpu.half, 3),
        "compile_s": round(seconds, 1),
    }


def table(title: str, first: str, measured: list[dict]) -> Table:
    result = Table(title=title, title_justify="left")
    names = (
        first,
        "MFLOP/token",
        "ratio to model FLOPs",
        "peak GB",
        "MB moved/token",
        "launches",
        "ns/token at best",
        "MFU at best",
        "bound",
    )
    for name in names:
        result.add_column(name, justify="right")
    for m in measured:
        result.add_row(
            f"{m[first]:,}", f"{m['flops_per_token'] / 1e6:,.1f}", f"{m['flops_per_token'] / m['model_flops_per_token']:.3f}",
            f"{m['peak_gb']:,.2f}", f"{m['bytes_per_token'] / 1e6:,.2f}", f"{m['launches']:,}", f"{m['ns_per_token']:,.0f}",
            f"{m['mfu']:.1%}", m["bound"],
        )  # fmt: skip
    return result


def draw(by_length: list[dict], by_size: list[dict], path: str) -> None:
    half = target.by_name(args.gpu).half
    with plotting.style():
        figure, axes = plt.subplots(2, 4, figsize=(13, 6), layout="constrained")
        for row, (key, label, measured) in enumerate(
            (("length", "tokens per row", by_length), ("parameters", "parameters", by_size))
        ):
            x = [m[key] for m in measured]
            needed = [m["model_flops_per_token"] for m in measured]
            least = [n / half * 1e9 for n in needed]
            panels = (
                ("FLOPs per token", [m["flops_per_token"] for m in measured], needed, "model FLOPs"),
                ("peak memory, GB", [m["peak_gb"] for m in measured], None, None),
                ("bytes moved per token", [m["bytes_per_token"] for m in measured], None, None),
                ("ns per token, at best", [m["ns_per_token"] for m in measured], least, "arithmetic only"),
            )
            for axis, (title, y, dashed, name) in zip(axes[row], panels, strict=True):
                axis.plot(x, y, "o-", color=plotting.BLUE, markersize=4)
                if dashed:
                    axis.plot(x, dashed, "--", color=plotting.RED, label=name)
                    axis.legend(frameon=False, fontsize=9)
                axis.set(xscale="log", yscale="log", title=title, xlabel=label)
                axis.grid(True)
                axis.set_ylim(min(y + (dashed or [])) / 1.6, max(y) * 1.6)
                plotting.log_ticks(axis.yaxis)
                axis.xaxis.set_major_locator(plt.FixedLocator(x))
                axis.xaxis.set_major_formatter(plt.FuncFormatter(plotting.short))
                axis.minorticks_off()
                axis.tick_params(axis="x", labelsize=7)
        figure.savefig(path, dpi=80)
        plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_matrix", description=__doc__)
    parser.add_argument("--gpu", default="h100", choices=tuple(target.GPUS))
    parser.add_argument("--output", default="benchmarks/plan_matrix.png", metavar="FILE")
    args = parser.parse_args()
    main(args)
