"""The training curves of one or more runs in one figure."""

import io
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from mateconv_jax import plotting
from mateconv_jax.plotting import DARK, drawable, log_ticks, short
from mateconv_jax.reporting.history import MADE_BY, Curve, Run, smoothed, thinned
from mateconv_jax.reporting.page_style import PALETTE

LineStyle = Literal["-", "--", "-.", ":"]
POINTS = 30  # curves of at most this many points get markers
BUCKETS = 600  # per curve, two points each: more than a panel has pixels ...
ALL_BUCKETS = 4000  # ... and per panel, so that many runs do not make the page huge
WIDE = 10  # ratio of the largest value to the median above which an axis is logarithmic
SET_LINES: list[LineStyle] = [":", "-.", "--"]  # of the validation sets that have names
TASK_LINES: list[LineStyle] = ["-", "--", "-.", ":"]
LONGEST_NAME = 40  # characters of a run's name in the legend


def draw(runs: list[Run], smooth: int, file_format: str) -> bytes:
    """Draw loss, validation loss, learning rate, gradient norm and tokens/s over the steps; where a run learns preferences also
    margin and accuracy, where it learns from reward also reward, length and entropy of the answers, where it asks benchmark
    questions also their scores.

    The same runs give the same bytes: the user's matplotlib settings are neither used nor changed.

    Args:
      smooth: averaging length of the thick lines in steps, see `history.smoothed`; 0: no thick lines.
      file_format: "svg" or "png".

    Returns:
      The image file's content.
    """
    ours = {
        "axes.titlepad": 8,
        "axes.grid": True,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "svg.hashsalt": "mateconv_jax",
    }
    preferences = any(run.learns_preferences for run in runs)
    from_reward = any(run.learns_from_reward for run in runs)
    rows = [["loss", "loss"], ["validation", "lr"], ["grad_norm", "speed"]]
    rows[1:1] = [["margin", "accuracy"]] * preferences + [["reward", "reward"], ["length", "entropy"]] * from_reward
    rows[2:2] = [["tasks", "tasks"]] * any(run.task_metrics for run in runs)
    with plotting.style(**ours):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, wspace=0.03, hspace=0.02)
        figure = Figure(figsize=(12, 12 + 3.7 * (len(rows) - 3)), dpi=150, layout=layout)
        FigureCanvasAgg(figure)
        heights = [1.25, *[1.0] * (len(rows) - 1)]
        panels = figure.subplot_mosaic(rows, height_ratios=heights)  # pyrefly: ignore[no-matching-overload]
        if preferences:
            _draw_preferences(panels["margin"], panels["accuracy"], runs, smooth)
        if from_reward:
            _draw_reward(panels["reward"], runs, smooth)
            _draw_answers(panels["length"], panels["entropy"], runs, smooth)
        if "tasks" in panels:
            _draw_tasks(panels["tasks"], runs)
        _draw_loss(panels["loss"], runs, smooth)
        _draw_validation(panels["validation"], runs)
        _draw_learning_rate(panels["lr"], runs)
        _draw_grad_norm(panels["grad_norm"], runs, smooth)
        _draw_speed(panels["speed"], runs, smooth)
        for axes in panels.values():
            _step_axis(axes, runs)
        _token_axis(panels["loss"], runs)
        _draw_names(figure, runs)
        image = io.BytesIO()
        figure.savefig(image, format=file_format, metadata={"Date": None} if file_format == "svg" else {"Software": MADE_BY})
    return image.getvalue()


def colors(n: int) -> list[str]:
    """A color for each of n runs."""
    if n <= len(PALETTE):
        return PALETTE[:n]
    return [to_hex(color) for color in matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, n))]


# ---- panels -------------------------------------------------------------------------------------------------------


def _draw_loss(axes: Axes, runs: list[Run], smooth: int) -> None:
    axes.set_title("Training loss 训练损失")
    axes.set_ylabel(_nats_per(runs))
    if _draw_metric(axes, runs, "train/loss", smooth):
        _log_if_wide(axes, runs, "train/loss")
        if smooth:
            handles = [Line2D([], [], color=DARK, linewidth=0.7, alpha=0.6), Line2D([], [], color=DARK, linewidth=1.8)]
            axes.legend(handles, ["as logged 原始", f"averaged over about {smooth:,} steps 约 {smooth:,} 步的滑动平均"])


def _draw_validation(axes: Axes, runs: list[Run]) -> None:
    axes.set_title("Validation loss 验证损失")
    axes.set_ylabel(_nats_per(runs))
    sets = list(dict.fromkeys(name for run in runs for name in run.validation_sets))
    lines: list[tuple[str, LineStyle, str]] = [
        ("val/loss", "-", "trained weights 训练权重"),
        ("val/ema_loss", "--", "EMA weights EMA 权重"),
        *((f"val/{name}/loss", SET_LINES[i % len(SET_LINES)], name) for i, name in enumerate(sets)),
    ]
    drawn = {}
    for key, line, label in lines:
        for run, color in zip(runs, colors(len(runs)), strict=True):
            if len(run.curve(key)):
                _plot(axes, thinned(run.curve(key), _buckets(runs)), color=color, linestyle=line, linewidth=1.6)
                drawn[label] = Line2D([], [], color=DARK, linestyle=line, linewidth=1.6)
    if not drawn:
        return _draw_empty(axes)
    if len(drawn) > 1:
        axes.legend(drawn.values(), drawn.keys())
    _linear_ticks(axes)


def _draw_tasks(axes: Axes, runs: list[Run]) -> None:
    """A line for each task and run, a thin one for guessing."""
    axes.set_title("Benchmark questions 评测题")
    axes.set_ylabel("% right 正确率（%）")
    drawn = {}
    for i, key in enumerate(dict.fromkeys(key for run in runs for key in run.task_metrics)):
        line = TASK_LINES[i % len(TASK_LINES)]
        for run, color in zip(runs, colors(len(runs)), strict=True):
            curve, chance = run.curve(key), run.curve(key.rpartition("/")[0] + "/chance")
            if len(curve):
                share = Curve(curve.steps, 100 * curve.values)
                _plot(axes, thinned(share, _buckets(runs)), color=color, linestyle=line, linewidth=1.6)
                drawn[drawable("/".join(key.split("/")[1:]))] = Line2D([], [], color=DARK, linestyle=line, linewidth=1.6)
            if len(chance):
                axes.axhline(100 * chance.values[-1], color=DARK, linewidth=0.8, alpha=0.6)
                drawn["guessing 随机猜测"] = Line2D([], [], color=DARK, linewidth=0.8, alpha=0.6)
    axes.legend(drawn.values(), drawn.keys())
    _linear_ticks(axes)


def _nats_per(runs: list[Run]) -> str:
    if any(run.learns_from_reward for run in runs):
        return ""
    of_pairs = {run.learns_preferences for run in runs}
    return "nats" if len(of_pairs) > 1 else "nats per pair 每对" if of_pairs.pop() else "nats per token 每 token"


def _draw_preferences(margin: Axes, accuracy: Axes, runs: list[Run], smooth: int) -> None:
    margin.set_title("Margin between the rewards 奖励差")
    margin.set_ylabel("nats")
    _draw_metric(margin, runs, "dpo/margin", smooth)
    accuracy.set_title("Preference accuracy 偏好准确率")
    accuracy.set_ylabel("share of pairs 占比")
    _draw_metric(accuracy, runs, "dpo/accuracy", smooth)
    accuracy.set_ylim(0, 1.05)


def _draw_reward(axes: Axes, runs: list[Run], smooth: int) -> None:
    axes.set_title("Mean reward 平均奖励")
    _draw_metric(axes, runs, "grpo/reward", smooth)
    if not any(len(run.curve("val/reward")) for run in runs):
        return
    for run, color in zip(runs, colors(len(runs)), strict=True):
        _plot(axes, thinned(run.curve("val/reward"), _buckets(runs)), color=color, linestyle="--", linewidth=1.6)
    handles = [Line2D([], [], color=DARK, linestyle=line, linewidth=1.6) for line in ("-", "--")]
    axes.legend(handles, ["sampled answers, training 训练（采样）", "likeliest answers, validation 验证（贪心）"])


def _draw_answers(length: Axes, entropy: Axes, runs: list[Run], smooth: int) -> None:
    length.set_title("Length of answers 回答长度")
    length.set_ylabel("tokens")
    if _draw_metric(length, runs, "grpo/length", smooth):
        _from_zero(length, runs, "grpo/length")
    entropy.set_title("Entropy of the policy 策略熵")
    entropy.set_ylabel("nats per token 每 token")
    if _draw_metric(entropy, runs, "grpo/entropy", smooth):
        _from_zero(entropy, runs, "grpo/entropy")


def _draw_learning_rate(axes: Axes, runs: list[Run]) -> None:
    axes.set_title("Learning rate 学习率")
    if _draw_metric(axes, runs, "lr", 0):
        _from_zero(axes, runs, "lr")


def _draw_grad_norm(axes: Axes, runs: list[Run], smooth: int) -> None:
    axes.set_title("Gradient norm 梯度范数")
    axes.set_ylabel("before clipping 裁剪前")
    if _draw_metric(axes, runs, "grad_norm", smooth):
        _log_if_wide(axes, runs, "grad_norm")


def _draw_speed(axes: Axes, runs: list[Run], smooth: int) -> None:
    axes.set_title("Throughput 吞吐量")
    axes.set_ylabel("tokens/s 每秒 token")
    if _draw_metric(axes, runs, "tokens/s", smooth):
        _from_zero(axes, runs, "tokens/s")


def _draw_metric(axes: Axes, runs: list[Run], key: str, smooth: int) -> bool:
    """Draw each run's values as a thin line and their average as a thick one, or one line without smoothing. False: no run has
    the metric.
    """
    for run, color in zip(runs, colors(len(runs)), strict=True):
        curve, average = (thinned(c, _buckets(runs)) for c in (run.curve(key), smoothed(run.curve(key), smooth)))
        if smooth:
            _plot(axes, curve, color=color, linewidth=0.7, alpha=0.35)
        _plot(axes, average, color=color, linewidth=1.8, zorder=3)  # above all thin lines
    _linear_ticks(axes)
    if not any(len(run.curve(key)) for run in runs):
        _draw_empty(axes)
        return False
    return True


def _plot(axes: Axes, curve: Curve, **style) -> None:
    axes.plot(curve.steps, curve.values, marker="o" if len(curve) <= POINTS else "", markersize=3.5, **style)


def _draw_empty(axes: Axes) -> None:
    axes.text(0.5, 0.5, "no data 无数据", transform=axes.transAxes, ha="center", va="center", color=DARK, fontsize=12)
    axes.set_yticks([])


def _draw_names(figure: Figure, runs: list[Run]) -> None:
    handles = [Line2D([], [], color=color, linewidth=4) for color in colors(len(runs))]
    names = [run.name if len(run.name) <= LONGEST_NAME else "…" + run.name[1 - LONGEST_NAME :] for run in runs]
    columns = max(1, 120 // (max(map(len, names)) + 6))
    figure.legend(handles, map(drawable, names), loc="outside upper left", ncols=columns, fontsize=11)


def _buckets(runs: list[Run]) -> int:
    return min(BUCKETS, ALL_BUCKETS // len(runs))


# ---- axes ---------------------------------------------------------------------------------------------------------


def _step_axis(axes: Axes, runs: list[Run]) -> None:
    axes.set_xlim(0, 1.02 * max(1, *(run.last_step for run in runs)))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10), integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(short))
    axes.set_xlabel("Step 步数")


def _token_axis(axes: Axes, runs: list[Run]) -> None:
    """An axis of tokens on top, if all runs have equally many tokens per step."""
    sizes = {run.tokens_per_step for run in runs}
    tokens = sizes.pop()
    if sizes or not tokens:
        return
    top = axes.secondary_xaxis("top", functions=(lambda step: np.multiply(step, tokens), lambda n: np.divide(n, tokens)))
    top.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10), integer=True))
    top.xaxis.set_major_formatter(FuncFormatter(short))
    top.set_xlabel("Tokens seen 已训练 token 数", labelpad=6)
    top.spines["top"].set_visible(True)
    axes.set_title(axes.get_title(loc="left"), pad=40)


def _linear_ticks(axes: Axes) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 2.5, 5, 10)))
    axes.yaxis.set_major_formatter(FuncFormatter(short))


def _from_zero(axes: Axes, runs: list[Run], key: str) -> None:
    axes.set_ylim(0, 1.08 * max(run.curve(key).values.max(initial=0) for run in runs) or 1)


def _log_if_wide(axes: Axes, runs: list[Run], key: str) -> None:
    """Make the axis logarithmic if spikes or a steep start would hide the rest of the curve on a linear one."""
    values = np.concatenate([run.curve(key).values for run in runs])
    if values.min() >= 0 and values.max() > WIDE * np.median(values):
        axes.set_yscale("log", nonpositive="mask")
        log_ticks(axes.yaxis)
