"""compare.html: what evaluations say of one or more models, side by side in one self-contained file.

What is on it may come from a model or a file: it is escaped, and the page's policy forbids scripts and all that is elsewhere.
"""

import jinja2

from mateconv_jax.reporting.page_style import PALETTE, STYLE

MADE_BY = "mateconv_jax evaluate"  # in the page's metadata: tells a comparison from what is not to be replaced
SIGNIFICANT = 0.05

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="{{ made_by }}">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Evaluation: {{ models | map(attribute="name") | join(", ") }}</title>
<style>{{ style | safe }}
td { min-width: 5rem; }
.group th { padding-left: 1.2rem; color: var(--quiet); min-width: 0; overflow-wrap: anywhere; }
.best { font-weight: 600; }
p.note { margin: .2rem 0; } h2 + .note { margin-bottom: .6rem; }
.better { color: var(--better); } .worse { color: var(--worse); }
.item { border-top: 1px solid var(--line); padding: .8rem 0; }
.prompt { margin: 0 0 .5rem; font-weight: 600; }
.role { color: var(--quiet); font-weight: normal; font-size: .8rem; margin-right: .4rem; }
.cells { display: grid; grid-template-columns: repeat({{ [models | length, 3] | min }}, minmax(0, 1fr)); gap: .8rem; }
.said { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; background: var(--raised); border-radius: .4rem;
  padding: .5rem .7rem; margin: .3rem 0; font-size: .9rem; }
@media (max-width: 40rem) { .cells { grid-template-columns: minmax(0, 1fr); } }
</style>
</head>
<body>
{% macro name(i) %}<span class="color" style="background: {{ colors[i] }}"></span>{{ models[i].name }}{% endmacro %}
<h1>Evaluation <span lang="zh">评测</span></h1>
{% for line in about %}<p class="note">{{ line }}</p>
{% endfor %}
<h2>Measures <span lang="zh">指标</span></h2>
<div class="scroll">
<table>
<thead><tr><th></th>{% for model in models %}<th>{{ name(loop.index0) }}
{%- if model.note %}<span class="note">{{ model.note }}</span>{% endif %}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr{% if row.group %} class="group"{% endif %}><th>{{ row.group or row.measure }}
{%- if row.units %}<span class="note">{{ row.units }}</span>{% endif %}</th>
{%- for cell in row.cells %}<td{% if cell.best %} class="best"{% endif %}>{{ cell.value }}
{%- if cell.interval %}<span class="note">{{ cell.interval }}</span>{% endif %}
{%- if cell.difference %}<span class="note {{ cell.kind }}">{{ cell.difference }}</span>{% endif %}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
<p class="note">Brackets hold 95 % of {{ resamples }} paired bootstrap resamples.
{% if models | length > 1 %}
Below them is the difference from {{ models[0].name }}, with its interval and two-sided p; coloured where p &lt;
{{ significant }}.
Each p is of one comparison: among twenty groups of equal models one is coloured by chance.
{% endif %}
<span lang="zh">方括号内为 95% 自助法区间{% if models | length > 1 %}，其下为与第一个模型之差及双侧 p 值{% endif %}。</span></p>
{% for section in sections %}
<h2>{{ section.title }} <span lang="zh">{{ section.chinese }}</span></h2>
{% if section.note %}<p class="note">{{ section.note }}</p>{% endif %}
{% for item in section["items"] %}
<div class="item">
{% for role, text in item.turns %}<p class="prompt">{% if role %}<span class="role">{{ role }}</span>{% endif %}
<span class="turn">{{ text }}</span></p>
{% endfor %}
<div class="cells">
{% for answers in item.cells %}<div><span class="note">{{ name(loop.index0) }}</span>
{% for answer in answers %}<div class="said" lang="zh-Hans">{{ answer.text }}</div>
{%- if answer.note %}<span class="note">{{ answer.note }}</span>{% endif %}
{% endfor %}</div>
{% endfor %}
</div>
</div>
{% endfor %}
{% endfor %}
</body>
</html>
"""


def html(compared: dict, sections: list[dict], about: list[str]) -> str:
    """The page.

    Args:
      compared: see evaluation/comparison.py's `compare`.
      sections: [{title, chinese, note, items: [{turns: [(role or "", text)], cells: for each model [{text, note}]}]}].
      about: lines on what was evaluated.
    """
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    models = [{"name": model["name"], "note": _about(model)} for model in compared["models"]]
    return environment.from_string(PAGE).render(
        made_by=MADE_BY,
        style=STYLE,
        models=models,
        colors=[PALETTE[i % len(PALETTE)] for i in range(len(models))],
        about=about,
        rows=[_row(row) for row in compared["rows"]],
        resamples=f"{compared['resamples']:,}",
        significant=SIGNIFICANT,
        sections=sections,
    )


def _about(model: dict) -> str:
    step = [] if model["step"] is None else [f"step {model['step']:,}"]
    return ", ".join([*step, *([f"{model['weights']} weights"] if model["weights"] else [])])


def _row(row: dict) -> dict:
    values = [score["value"] for score in row["scores"] if score["value"] is not None]
    best = {True: min, False: max}.get(row["lower_is_better"]) if len(set(values)) > 1 else None
    best_value = best(values) if best else None
    cells = []
    for score, difference in zip(row["scores"], [None, *row["differences"]], strict=False):
        cells.append(_cell(score, difference, row["form"], row["lower_is_better"]) | {"best": score["value"] == best_value})
    cells += [_cell(score, None, row["form"], None) | {"best": False} for score in row["scores"][len(cells) :]]
    units = "" if row["units"] is None else f"{row['units']:,} {row['unit']}"
    return {"measure": row["measure"], "group": row["group"], "units": units, "cells": cells}


def _cell(score: dict, difference: dict | None, form: str, lower_is_better: bool | None) -> dict:
    def written(value: float | None, sign: str = "") -> str:
        return "–" if value is None else f"{value:{sign}{form}}"

    interval = "" if score["low"] is None else f"[{written(score['low'])}, {written(score['high'])}]"
    cell = {"value": written(score["value"]), "interval": interval, "difference": "", "kind": ""}
    if difference is None or difference["low"] is None:
        return cell
    bounds = f"[{written(difference['low'], '+')}, {written(difference['high'], '+')}]"
    p = "<0.001" if difference["p"] < 0.001 else f"{difference['p']:.3f}"
    cell["difference"] = f"{written(difference['value'], '+')} {bounds}, p {p}"
    if difference["p"] < SIGNIFICANT and lower_is_better is not None:
        cell["kind"] = "better" if (difference["value"] < 0) == lower_is_better else "worse"
    return cell
