"""Fit the rules of docs/recipes.md to benchmarks/transfer.jsonl and draw them:  python -m benchmarks.transfer_fit

Prints the tables of docs/recipes.md and then one JSON line. Nothing is trained.
"""

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console
from rich.table import Table

from mateconv_jax import plotting
from mateconv_jax.planning import rules

COLORS = {64: plotting.BLUE, 128: plotting.GREEN, 192: plotting.RED, 256: plotting.DARK, 448: "black"}
DRAWS = 2000  # of the noise, for intervals


def main(args):
    runs = [json.loads(line) for line in Path(args.results).read_text(encoding="utf-8").splitlines()]
    noise = seed_noise(runs)
    curves = by_setting(runs)
    best = {setting: optimum(curve, noise) for setting, curve in curves.items() if is_bracketed(curve)}
    console = Console(width=120)
    console.print(f"standard deviation over seeds: {noise:.4f} bits/byte")
    console.print(table_of(best))
    widest = (("one", 256), ("one", 448), ("matrices", 448))  # from 256 on one rate falls more steeply
    exponents = {f"{rule}, up to {dim}": width_exponent(best, rule, dim) for rule, dim in widest}
    loss_fits = {rule: fit_loss(curves, best, rule) for rule in ("one", "matrices")}
    draw(curves, best, loss_fits["matrices"], args.output)
    print(json.dumps({"noise": noise, "width_exponent": exponents, "loss": loss_fits}))


def seed_noise(runs: list[dict]) -> float:
    """Standard deviation of bits/byte between runs that differ in their seed alone."""
    same = defaultdict(list)
    for run in runs:
        key = tuple(run[name] for name in ("dim", "log2_lr", "tokens", "batch_tokens", "rule"))
        same[key].append(run["bits_per_byte"])
    groups = [np.var(losses, ddof=1) for losses in same.values() if len(losses) > 1]
    return float(np.sqrt(np.mean(groups))) if groups else math.nan


def by_setting(runs: list[dict]) -> dict[tuple, dict[float, dict]]:
    """{(dim, tokens, batch_tokens, rule): {log2_lr: run}} of the first seed."""
    curves = defaultdict(dict)
    for run in runs:
        if run["seed"] == 1 and run["bits_per_byte"] is not None:
            curves[run["dim"], run["tokens"], run["batch_tokens"], run["rule"]][run["log2_lr"]] = run
    return dict(sorted(curves.items(), key=lambda item: str(item[0])))


def losses(curve: dict[float, dict]) -> dict[float, float]:
    return {x: run["bits_per_byte"] for x, run in curve.items()}


def is_bracketed(curve: dict[float, dict]) -> bool:
    best = min(curve, key=losses(curve).__getitem__)
    return best - 1 in curve and best + 1 in curve


def optimum(curve: dict[float, dict], noise: float) -> dict:
    """Of the parabola through the best learning rate and its neighbours, with what the noise does to it (one deviation)."""
    y = losses(curve)
    middle = min(y, key=y.__getitem__)
    values = np.array([y[middle - 1], y[middle], y[middle + 1]])

    def lowest(values):
        slope, curvature = (values[2] - values[0]) / 2, values[2] - 2 * values[1] + values[0]
        return middle - slope / curvature, values[1] - slope**2 / curvature / 2

    drawn = [lowest(values + noise * np.random.default_rng(seed).standard_normal(3))[0] for seed in range(DRAWS)]
    low, high = np.percentile(drawn, (15.9, 84.1))  # where a draw is flat its optimum is anywhere: no standard deviation
    x, loss = lowest(values)
    return {"log2_lr": float(x), "loss": float(loss), "sd": float(high - low) / 2, "run": curve[middle]}


def width_exponent(best: dict, rule: str, widest: int) -> dict | None:
    """a in lr = c / dim^a, over widths up to `widest` with the same tokens and batch, each weighted by 1 / its deviation."""
    points = {key[0]: o for key, o in of_rule(best, rule).items() if key[1:3] == (2**19, 2048) and key[0] <= widest}
    if len(points) < 2:
        return None
    x = np.log2(list(points))
    y, sd = (np.array([o[name] for o in points.values()]) for name in ("log2_lr", "sd"))
    random = np.random.default_rng(0)
    slopes = [np.polyfit(x, y + sd * random.standard_normal(len(y)), 1, w=1 / sd)[0] for _ in range(DRAWS)]
    slope, intercept = np.polyfit(x, y, 1, w=1 / sd)
    at_64 = 2 ** (intercept + 6 * slope)
    return {"a": -float(slope), "sd": float(np.std(slopes)), "at_width_64": float(at_64), "widths": sorted(points)}


def of_rule(settings: dict, rule: str) -> dict:
    """Those of `rule`; at width 64 both rules are one."""
    return {key: value for key, value in settings.items() if key[3] == rule or key[0] == rules.MATRICES_WIDTH}


def fit_loss(curves: dict, best: dict, rule: str) -> dict:
    """log L = log k - a log N - b log D, on all widths but the largest, and its error on that one.

    N are non-embedding parameters, D tokens, L bits per byte; of each (width, tokens) the lowest loss.
    """
    points = []
    for key, curve in of_rule(curves, rule).items():
        dim, tokens, batch_tokens, _ = key
        if batch_tokens == 2048:
            loss = best[key]["loss"] if key in best else min(losses(curve).values())
            run = next(iter(curve.values()))
            points.append((dim, run["parameters"] - run["embedding"], tokens, loss))
    dims, n, d, loss = (np.array(column, float) for column in zip(*points, strict=True))
    held_out = dims == dims.max()
    known = ~held_out
    columns = np.stack([np.ones_like(n), -np.log(n), -np.log(d)], axis=1)
    solution, *_ = np.linalg.lstsq(columns[known], np.log(loss[known]), rcond=None)
    everything, *_ = np.linalg.lstsq(columns, np.log(loss), rcond=None)
    predicted = np.exp(columns @ solution)
    names = ("dim", "non_embedding", "tokens", "loss", "predicted")
    return {
        "points": [dict(zip(names, (*p, q), strict=True)) for p, q in zip(points, predicted.tolist(), strict=True)],
        "fitted_on": sorted({int(x) for x in dims[known]}),
        "held_out": int(dims.max()),
        "k": float(np.exp(solution[0])), "a": float(solution[1]), "b": float(solution[2]),
        "all": {"k": float(np.exp(everything[0])), "a": float(everything[1]), "b": float(everything[2])},
        "error_fitted": float(np.abs(predicted / loss - 1)[known].max()),
        "error_held_out": float(np.abs(predicted / loss - 1)[held_out].max()),
    }  # fmt: skip


def step_law(non_embedding: float, tokens: float, batch: float) -> float:
    """Learning rate of Li et al., 2025, for their best batch, with the root of another one's ratio to it."""
    return 1.79 * non_embedding**-0.713 * tokens**0.307 * math.sqrt(batch / rules.batch_tokens(tokens))


def table_of(best: dict) -> Table:
    table = Table("parameters", "width", "tokens", "batch", "rule", "best lr", "log2 ± sd", "bits/byte", "Step Law's lr")
    for (dim, tokens, batch_tokens, rule), found in best.items():
        run = found["run"]
        law = step_law(run["parameters"] - run["embedding"], tokens, batch_tokens)
        table.add_row(
            f"{run['parameters']:,}", str(dim), f"{tokens:,}", f"{batch_tokens:,}", rule, f"{2 ** found['log2_lr']:.2e}",
            f"{found['log2_lr']:.2f} ± {found['sd']:.2f}", f"{found['loss']:.3f}", f"{law:.1e}",
        )  # fmt: skip
    return table


def draw(curves: dict, best: dict, loss_fit: dict, path: str) -> None:
    with plotting.style():
        figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
        draw_curves(axes[0], curves, best)
        draw_optima(axes[1], best)
        draw_loss(axes[2], loss_fit)
        for axis in axes:
            axis.grid(True)
        figure.savefig(path, dpi=80)
        plt.close(figure)


def fixed_ticks(axis, ticks: list[float]) -> None:
    """With the style's text.parse_math off, matplotlib's own labels of logarithmic axes would show their markup."""
    axis.set_major_locator(plt.FixedLocator(ticks))
    axis.set_major_formatter(plt.FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_formatter(plt.NullFormatter())


def draw_curves(axis, curves: dict, best: dict) -> None:
    for rule, line in (("one", "s--"), ("matrices", "o-")):
        for (dim, tokens, batch_tokens, _), curve in of_rule(curves, rule).items():
            if (tokens, batch_tokens) == (2**19, 2048) and (dim != rules.MATRICES_WIDTH or rule == "matrices"):
                y = losses(curve)
                x = [log2_lr for log2_lr in sorted(y) if y[log2_lr] < 3.1]
                label = plotting.short(curve[x[0]]["parameters"]) + (", matrices' by 1/width" if rule == "matrices" else "")
                axis.plot([2**i for i in x], [y[i] for i in x], line, color=COLORS[dim], label=label, markersize=4)
    axis.set(xscale="log", xlabel="peak learning rate", title="bits per byte of validation text, 524k tokens")
    fixed_ticks(axis.xaxis, [0.00025, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016])
    axis.set_ylim(bottom=2.45)  # room for the legend
    axis.legend(frameon=False, fontsize=7.5, loc="lower left", ncols=2)


def draw_optima(axis, best: dict) -> None:
    for rule, marker, color, label in (
        ("one", "s", plotting.BLUE, "one rate for all"),
        ("matrices", "o", plotting.GREEN, "matrices' by 1/width"),
    ):
        points = {key[0]: o for key, o in of_rule(best, rule).items() if key[1:3] == (2**19, 2048)}
        y = [o["log2_lr"] for o in points.values()]
        sd = [2 * o["sd"] for o in points.values()]
        low, high = ([2 ** (a + sign * b) for a, b in zip(y, sd, strict=True)] for sign in (-1, 1))
        values = np.exp2(y)
        axis.errorbar(list(points), values, [values - low, high - values], fmt=marker, color=color, label=label, capsize=3)
    x = np.array([64, 128, 192, 256, 448, 512])
    axis.plot(x, [rules.learning_rate(dim, 2048) for dim in x], "--", color=plotting.RED, label="the rule")
    shapes = [rules.Shape(dim, 4) for dim in (64, 128, 256, 512)]
    law = [step_law(shape.non_embedding, 2**19, 2048) for shape in shapes]
    axis.plot([shape.dim for shape in shapes], law, ":", color=plotting.DARK, label="Step Law, extrapolated")
    axis.set(xscale="log", yscale="log", xlabel="width", title="best learning rate, 524k tokens")
    fixed_ticks(axis.xaxis, [64, 128, 192, 256, 512])
    fixed_ticks(axis.yaxis, [0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032])
    axis.legend(frameon=False, fontsize=8)


def draw_loss(axis, loss_fit: dict) -> None:
    by_dim = defaultdict(list)
    for point in loss_fit["points"]:
        by_dim[point["dim"]].append(point)
    for dim, points in by_dim.items():
        points.sort(key=lambda point: point["tokens"])
        compute = [6 * p["non_embedding"] * p["tokens"] for p in points]
        held_out = dim == loss_fit["held_out"]
        label = f"{plotting.short(points[0]['non_embedding'])} parameters" + (", held out" if held_out else "")
        axis.plot(compute, [p["loss"] for p in points], "o", color=COLORS[dim], label=label, markersize=5)
        axis.plot(
            compute, [p["predicted"] for p in points], "_--" if len(points) == 1 else "--", color=COLORS[dim], markersize=14
        )
    fixed = [1e12, 2e12, 4e12, 8e12]
    axis.set(
        xscale="log",
        xlabel="6 N D, FLOPs (N without the embedding)",
        title="bits per byte, matrices' by 1/width; dashed: the fit",
    )
    fixed_ticks(axis.xaxis, fixed)
    axis.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer_fit", description=__doc__)
    parser.add_argument("--results", default="benchmarks/transfer.jsonl", metavar="FILE")
    parser.add_argument("--output", default="docs/images/recipes.png", metavar="FILE")
    main(parser.parse_args())
