"""Accuracy by subject, drawn."""

import io
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from mateconv_jax import plotting
from mateconv_jax.evaluation import outputs
from mateconv_jax.evaluation.benchmark_table import titled
from mateconv_jax.plotting import BLUE, DARK, RED, drawable


def write_plot(result: dict, path: Path) -> None:
    """A PNG of what `evaluate_tasks` found: accuracy by subject with 95 % intervals, and guessing as a line."""
    heights = [len(_points(task)) + 3 for task in result["tasks"]]
    with plotting.style():
        figure = Figure(figsize=(9, 0.27 * sum(heights) + 0.6), dpi=150, layout=ConstrainedLayoutEngine())
        FigureCanvasAgg(figure)
        panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, task in zip(panels, result["tasks"], strict=True):
            _draw_task(axes, task)
        figure.suptitle(drawable(result["model_path"]), x=0.01, ha="left", fontsize=11)
        image = io.BytesIO()
        figure.savefig(image, format="png", metadata={"Software": outputs.MADE_BY})
    outputs.write(path, image.getvalue())


def _points(task: dict) -> list[tuple[str, dict, float | None]]:
    """Name, figures and chance, from top to bottom: the subjects, where there are several, and all of them."""
    metric = next(iter(task["metrics"]))
    subjects = task["subjects"] if len(task["subjects"]) > 1 else []
    points = [(titled(subject), subject["metrics"][metric], subject["chance"]) for subject in subjects]
    points.append(("all 合计 (micro)", task["metrics"][metric], task["chance"]))
    return points + ([("all 合计 (macro)", task["macro"][metric], task["chance"])] if subjects else [])


def _draw_task(axes: Axes, task: dict) -> None:
    metric, points = next(iter(task["metrics"])), _points(task)
    n_subjects = len(points) - 2 if len(points) > 1 else 0
    for y, (_, figures, chance) in enumerate(points):
        if figures["value"] is None:
            continue
        color = BLUE if y < n_subjects else DARK
        if figures["interval"] is not None:
            axes.plot([100 * x for x in figures["interval"]], [y, y], color=color, linewidth=2, alpha=0.45)
        axes.plot([100 * figures["value"]], [y], "o", color=color, markersize=5)
        if chance is not None and y < n_subjects:
            axes.plot([100 * chance], [y], "|", color=RED, markersize=9)  # of a subject with other numbers of choices
    if task["chance"] is not None:
        axes.axvline(100 * task["chance"], color=RED, linestyle="--", linewidth=1.2)
        axes.text(100 * task["chance"], -0.9, " guessing 随机猜测", color=RED, fontsize=8, ha="left", va="center")
    axes.set_yticks(range(len(points)), [drawable(name) for name, *_ in points], fontsize=8)
    axes.set_ylim(len(points) - 0.4, -1.5)
    if all(0 <= figures["value"] <= 1 for _, figures, _ in points if figures["value"] is not None):
        axes.set_xlim(-2, 102)  # a reward may be any number
    axes.set_xlabel("% of questions, with 95 % intervals 准确率（%）与 95% 置信区间", fontsize=9)
    axes.set_title(f"{drawable(task['name'])}: {metric}, {task['questions']:,} questions 题")
    axes.grid(axis="x")
