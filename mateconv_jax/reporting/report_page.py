"""report.html: the runs' results, settings and curves in one self-contained file."""

import base64
import time

import jinja2
import numpy as np

from mateconv_jax.reporting import curves
from mateconv_jax.reporting.history import MADE_BY, Run, smoothed
from mateconv_jax.reporting.page_style import STYLE

ABSENT = "–"

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="{{ made_by }}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Training report: {{ names | join(", ") }}</title>
<style>{{ style | safe }}</style>
</head>
<body>
{% macro table(rows, kind) %}
<div class="scroll">
<table class="{{ kind }}">
<thead><tr><th></th>{% for name in names %}<th><span class="color" style="background: {{ colors[loop.index0] }}"></span>
{{- name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for label, chinese, cells in rows %}
<tr><th>{{ label }}{% if chinese %} <span lang="zh">{{ chinese }}</span>{% endif %}</th>
{%- for value, note in cells %}<td>{{ value }}{% if note %} <span class="note">{{ note }}</span>{% endif %}</td>
{%- endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endmacro %}
<h1>Training report <span lang="zh">训练报告</span></h1>
<h2>Results <span lang="zh">结果</span></h2>
{{ table(results, "results") }}
{% if differences %}
<h2>Settings that differ <span lang="zh">不同的配置</span></h2>
{{ table(differences, "key") }}
{% elif names | length > 1 %}
<p>The runs have the same settings. <span lang="zh">各次训练配置相同。</span></p>
{% endif %}
<h2>Curves <span lang="zh">曲线</span></h2>
<img alt="Training loss, validation loss, learning rate, gradient norm and throughput over the steps"
 src="data:image/svg+xml;base64,{{ image }}">
<details>
<summary>All settings <span lang="zh">全部配置</span></summary>
{{ table(settings, "key") }}
</details>
</body>
</html>
"""


def html(runs: list[Run], smooth: int) -> str:
    """The HTML page of these runs, with curves smoothed over `smooth` steps."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    every_setting = settings(runs)
    return environment.from_string(PAGE).render(
        names=[run.name for run in runs],
        colors=curves.colors(len(runs)),
        results=results(runs, smooth),
        differences=[(key, "", cells) for key, _, cells in every_setting if len(set(cells)) > 1 and key != "training.out_dir"],
        settings=every_setting,
        style=STYLE,
        made_by=MADE_BY,
        image=base64.b64encode(curves.draw(runs, smooth, "svg")).decode(),
    )


def settings(runs: list[Run]) -> list[tuple[str, str, list]]:
    """Table rows (key, "", cells) of all config keys; one cell (value, "") per run."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    return [(key, "", [(str(run.config.get(key, ABSENT)), "") for run in runs]) for key in keys]


def results(runs: list[Run], smooth: int) -> list[tuple[str, str, list]]:
    """Table rows (English label, Chinese label, cells) of the results; one cell (value, note) per run. Rows without any value
    are omitted.
    """
    sets = dict.fromkeys(name for run in runs for name in run.validation_sets)
    rows = [
        ("Steps completed", "完成步数", [_steps(run) for run in runs]),
        ("Tokens seen", "已训练 token 数", [_tokens(run) for run in runs]),
    ]
    average = (f", averaged over about {smooth:,} steps", "（平滑）") if smooth else (", last", "（最后）")
    rows.append((f"Training loss{average[0]}", f"训练损失{average[1]}", [_last(run, "train/loss", smooth) for run in runs]))
    for key, label, chinese in (
        ("val/loss", "Validation loss", "验证损失"),
        ("val/ema_loss", "Validation loss of EMA weights", "EMA 权重验证损失"),
        *((f"val/{name}/loss", f"Validation loss of {name}", f"{name} 的验证损失") for name in sets),
    ):
        rows += [
            (f"{label}, last", f"{chinese}（最后）", [_loss_at(run, key, -1) for run in runs]),
            (f"{label}, best", f"{chinese}（最低）", [_loss_at(run, key, None) for run in runs]),
        ]
    for key, label, chinese in (
        ("dpo/margin", "Margin between the rewards", "奖励差"),
        ("dpo/accuracy", "Preference accuracy", "偏好准确率"),
        ("dpo/kl", "KL from the reference, estimated", "与参考模型的 KL（估计）"),
        ("grpo/reward", "Mean reward", "平均奖励"),
        *((name, name, "") for name in sorted({name for run in runs for name in run.curves if name.startswith("reward/")})),
        ("grpo/length", "Tokens of an answer", "回答的 token 数"),
        ("grpo/entropy", "Entropy of the policy", "策略熵"),
        ("grpo/kl", "KL from the start, estimated", "与初始模型的 KL（估计）"),
        ("grpo/clip_share", "Share of clipped tokens", "被裁剪的 token 占比"),
        ("grpo/dropped_groups", "Prompts whose answers had equal rewards, a step", "每步奖励全同的提示数"),
        ("grpo/unrewarded", "Answers without a reward, a step", "每步无奖励的回答数"),
        ("grpo/seconds_rollout", "Seconds of a rollout", "采样用时（秒）"),
        ("grpo/seconds_reward", "Seconds waiting for rewards", "等待奖励（秒）"),
        ("grpo/seconds_update", "Seconds of an update", "更新用时（秒）"),
    ):
        rows.append((f"{label}{average[0]}", f"{chinese}{average[1]}", [_last(run, key, smooth) for run in runs]))
    for key, label, chinese in (
        ("val/margin", "Validation margin, last", "验证奖励差（最后）"),
        ("val/accuracy", "Validation accuracy, last", "验证偏好准确率（最后）"),
        ("val/reward", "Validation reward, last", "验证奖励（最后）"),
    ):
        rows.append((label, chinese, [_last(run, key, 0) for run in runs]))
    rows += [
        *_task_rows(runs),
        ("Bits per byte, last", "每字节比特数（最后）", [_last(run, "val/bits_per_byte", 0) for run in runs]),
        ("Median tokens/s", "每秒 token 数（中位数）", [_median_speed(run) for run in runs]),
        ("Training time, steps only", "训练用时（仅训练步）", [_training_time(run) for run in runs]),
        ("Non-finite steps", "非有限步数", [_not_finite(run) for run in runs]),
        (
            "Last updated",
            "最后写入",
            [(time.strftime("%Y-%m-%d %H:%M", time.localtime(r.last_written)), "") for r in runs],
        ),
    ]
    return [row for row in rows if any(value != ABSENT for value, _ in row[2])]


def _task_rows(runs: list[Run]) -> list[tuple[str, str, list]]:
    rows = []
    for key in dict.fromkeys(key for run in runs for key in run.task_metrics):
        name = "/".join(key.split("/")[1:])
        rows += [
            (f"{name}, last", f"{name}（最后）", [_share_at(run, key, -1) for run in runs]),
            (f"{name}, highest", f"{name}（最高）", [_share_at(run, key, None) for run in runs]),
        ]
    return rows


# ---- cells: (value, note) -----------------------------------------------------------------------------------------


def _steps(run: Run) -> tuple[str, str]:
    planned = run.config.get("training.max_steps")
    return f"{run.last_step:,}", f"of {planned:,}" if isinstance(planned, int) else ""


def _tokens(run: Run) -> tuple[str, str]:
    if run.tokens_per_step is None:
        return ABSENT, ""
    return f"{run.last_step * run.tokens_per_step:,}", f"{run.tokens_per_step:,} per step"


def _last(run: Run, key: str, smooth: int) -> tuple[str, str]:
    curve = smoothed(run.curve(key), smooth)
    return (f"{curve.values[-1]:.4f}", f"at step {curve.steps[-1]:,}") if len(curve) else (ABSENT, "")


def _loss_at(run: Run, key: str, index: int | None) -> tuple[str, str]:
    """The loss at `index` of the curve; None: at its minimum."""
    curve = run.curve(key)
    if not len(curve):
        return ABSENT, ""
    index = int(np.argmin(curve.values)) if index is None else index
    if run.learns_preferences or run.learns_from_reward:  # the loss is not one per token: no perplexity
        return f"{curve.values[index]:.4f}", f"at step {curve.steps[index]:,}"
    with np.errstate(over="ignore"):  # inf if the run diverged
        perplexity = np.exp(curve.values[index])
    return f"{curve.values[index]:.4f}", f"perplexity {perplexity:,.5g}, at step {curve.steps[index]:,}"


def _share_at(run: Run, key: str, index: int | None) -> tuple[str, str]:
    """A task's score at `index` of the curve; None: at its maximum."""
    curve, chance = run.curve(key), run.curve(key.rpartition("/")[0] + "/chance")
    if not len(curve):
        return ABSENT, ""
    index = int(np.argmax(curve.values)) if index is None else index
    guessing = f"guessing {chance.values[-1]:.1%}, " if len(chance) else ""
    return f"{curve.values[index]:.1%}", f"{guessing}at step {curve.steps[index]:,}"


def _median_speed(run: Run) -> tuple[str, str]:
    curve = run.curve("tokens/s")
    return (f"{np.median(curve.values):,.0f}" if len(curve) else ABSENT), ""


def _training_time(run: Run) -> tuple[str, str]:
    seconds = run.training_seconds()
    if seconds is None:
        return ABSENT, ""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours:,} h {rest // 60:02} min" if hours else f"{rest // 60} min {rest % 60:02} s", ""


def _not_finite(run: Run) -> tuple[str, str]:
    steps = run.not_finite
    return (f"{len(steps):,}", f"of the logged steps, first at {steps[0]:,}") if steps else (ABSENT, "")
