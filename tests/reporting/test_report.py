import base64
import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from mateconv_jax.errors import exit_code
from mateconv_jax.report import main, parse_args, write_report
from mateconv_jax.reporting import curves, history
from mateconv_jax.reporting.history import Curve

CONFIG = {
    "model": {"dim": 64},
    "data": {"seq_len": 32},
    "training": {"batch_size": 8, "accumulation_steps": 2, "max_steps": 60, "learning_rate": 0.01, "out_dir": "out"},
}  # fmt: skip
LINES = [
    {"step": 1, "train/loss": 6.0, "grad_norm": 2.0, "lr": 0.001, "bad_steps": 0.0},
    {"step": 10, "train/loss": 5.0, "grad_norm": 1.0, "lr": 0.01, "tokens/s": 5000.0, "step_time_s": 2.0},
    {"step": 20, "val/loss": 4.5},
    {"step": 20, "train/loss": 4.0, "grad_norm": 1.0, "lr": 0.01, "tokens/s": 7000.0, "step_time_s": 1.0},
    {"step": 30, "train/loss": 3.5, "lr": 0.009, "tokens/s": 6000.0, "step_time_s": 7.2},
    {"step": 40, "val/loss": 4.25},
    {"step": 50, "val/loss": 4.75},
]


@pytest.fixture
def make_run(tmp_path):
    def make(name, lines=LINES, tail="", **training):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        config = CONFIG | {"training": CONFIG["training"] | {"out_dir": str(folder)} | training}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
        return str(folder)

    return make


class Page(HTMLParser):
    """Tables as lists of rows of cells' texts, and what a browser would fetch; complains about tags that do not match."""

    VOID = {"meta", "img", "br", "link"}

    def __init__(self, path):
        super().__init__()
        self.open, self.tables, self.tags, self.fetched, self.text = [], [], [], [], ""
        self.feed(Path(path).read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.fetched += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "th" in self.open or "td" in self.open:
            self.tables[-1][-1][-1] += data

    def rows(self, table):
        """{first cell, without the Chinese: the other cells}"""
        return {re.sub(r"\s*(EMA )?[\u4e00-\u9fff].*", "", first): cells for first, *cells in self.tables[table]}

    def svg(self):
        (image,) = self.fetched
        return ET.fromstring(base64.b64decode(image.removeprefix("data:image/svg+xml;base64,")))


def lines_in(svg, color, dashed=False):
    """Curves of that colour in the panels; a legend's line is level."""
    styles = [(path.get("style", ""), path.get("d", "")) for path in svg.iter("{http://www.w3.org/2000/svg}path")]
    return [d for style, d in styles if f"stroke: {color}" in style and ("dasharray" in style) == dashed and spread(d)]


def spread(curve):
    """Of the y coordinates of an SVG path."""
    return np.ptp([float(y) for y in re.findall(r"[ML] \S+ (\S+)", curve)])


# ---- the page -----------------------------------------------------------------------------------------------------


def test_the_results_of_a_run(make_run):
    path = write_report([make_run("base")])
    rows = Page(path).rows(0)
    assert path.name == "report.html" and path.parent.name == "base"
    assert rows[""] == ["base"]
    assert rows["Steps completed"] == ["50 of 60"]
    assert rows["Tokens seen"] == [f"{50 * 8 * 2 * 32:,} 512 per step"]
    assert rows["Training loss, last"] == ["3.5000 at step 30"]
    assert rows["Validation loss, last"] == [f"4.7500 perplexity {math.exp(4.75):.5g}, at step 50"]
    assert rows["Validation loss, best"] == [f"4.2500 perplexity {math.exp(4.25):.5g}, at step 40"]
    assert rows["Median tokens/s"] == ["6,000"]
    assert rows["Training time, steps only"] == ["1 min 40 s"]  # 9 x 2 + 10 x 1 + 10 x 7.2 s
    assert "Validation loss of EMA weights, best" not in rows and "Non-finite steps" not in rows


def test_settings_that_differ_have_a_table_of_their_own(make_run):
    ema = [line | {"val/ema_loss": line["val/loss"] - 1} if "val/loss" in line else line for line in LINES]
    page = Page(write_report([make_run("a"), make_run("b", ema, learning_rate=0.02, z_loss=1e-4)]))
    assert page.rows(0)["Validation loss of EMA weights, best"] == ["–", "3.2500 perplexity 25.79, at step 40"]
    assert page.rows(1) == {
        "": ["a", "b"],
        "training.learning_rate": ["0.01", "0.02"],
        "training.z_loss": ["–", "0.0001"],
    }
    assert page.rows(2)["model.dim"] == ["64", "64"]


def test_each_validation_set_is_drawn_and_has_its_row(make_run):
    sets = [
        line | {"val/wiki/loss": line["val/loss"], "val/code/loss": 2.0 + line["step"] / 50}
        for line in LINES
        if "val/loss" in line
    ]
    page = Page(write_report([make_run("base", [*LINES, *sets])]))
    assert page.rows(0)["Validation loss of code, last code"] == [f"3.0000 perplexity {math.exp(3):.5g}, at step 50"]
    assert page.rows(0)["Validation loss of wiki, best wiki"][0].startswith("4.2500")
    assert len(lines_in(page.svg(), curves.colors(1)[0], dashed=True)) == 2


def test_runs_are_drawn_over_each_other(make_run):
    ema = [line | {"val/ema_loss": line["val/loss"] - 1} if "val/loss" in line else line for line in LINES]
    svg = Page(write_report([make_run("a"), make_run("b", ema)], smooth=5)).svg()
    first, second = curves.colors(2)
    for color in (first, second):  # lr and validation loss once, the others thin and thick
        assert len(lines_in(svg, color)) == 2 + 2 * 3
    assert len(lines_in(svg, first, dashed=True)) == 0
    assert len(lines_in(svg, second, dashed=True)) == 1


@pytest.mark.filterwarnings("error")  # a character without a glyph
def test_the_page_needs_nothing_else_and_shows_names_as_they_are(make_run):
    name = '<b>$\\q$ & 名字 "q" 😀'
    page = Page(write_report([make_run(name), make_run("_b")]))
    assert page.rows(0)[""] == [name, "_b"]
    assert "b" not in page.tags and "script" not in page.tags and "link" not in page.tags
    page.svg()  # the only thing that is fetched


def test_equal_runs_give_equal_pages_whatever_the_settings_of_matplotlib(make_run):
    folder = make_run("a")
    first = write_report([folder]).read_bytes()
    with matplotlib.rc_context({"font.size": 30, "axes.linewidth": 9}):
        assert write_report([folder]).read_bytes() == first
        assert matplotlib.rcParams["font.size"] == 30


def test_fifty_thousand_steps_make_a_small_page_that_keeps_a_spike(make_run):
    spike = 31_234
    lines = [
        {"step": s, "train/loss": 40.0 if s == spike else 3 + s % 7 / 10, "lr": 1e-3, "tokens/s": 5e3, "step_time_s": 0.1}
        for s in range(1, 50_001)
    ]
    path = write_report([make_run("long", lines)])
    assert path.stat().st_size < 600_000
    heights = sorted(map(spread, lines_in(Page(path).svg(), curves.colors(1)[0])))
    assert heights[-1] > 150  # of a panel of about 200: the thin line; the average hardly moves
    assert heights[-2] < 100


def test_many_runs_have_different_colors_and_share_the_room():
    for n in (1, 8, 9, 30):
        assert len(set(curves.colors(n))) == n
    assert curves._buckets([None] * 3) == curves.BUCKETS and 40 * curves._buckets([None] * 40) <= curves.ALL_BUCKETS


# ---- what is read -------------------------------------------------------------------------------------------------


def test_a_line_that_is_still_being_written_is_ignored(make_run, capsys):
    rows = Page(write_report([make_run("a", tail='{"step": 90, "train/loss": 1.0, "gr')])).rows(0)
    assert rows["Steps completed"] == ["50 of 60"]
    assert not capsys.readouterr().err


def test_a_broken_line_among_others_is_left_out_and_said(make_run, capsys):
    rows = Page(write_report([make_run("a", tail='{"step": 9\n[1]\n{"step": 55, "train/loss": null, "lr": "x"}\n')])).rows(0)
    assert rows["Steps completed"] == ["55 of 60"] and rows["Training loss, last"] == ["3.5000 at step 30"]
    assert "skipped 2 lines that are not a JSON object with a step" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["html", "png"])
def test_values_that_are_not_finite_do_not_break_the_report(make_run, suffix):
    bad = {"train/loss": math.nan, "grad_norm": math.inf, "lr": math.nan, "tokens/s": math.inf, "val/loss": math.nan}
    mixed = [*LINES, *({"step": step} | bad for step in (52, 54))]
    folders = [make_run("mixed", mixed), make_run("all", [{"step": 7} | bad]), make_run("huge", [{"step": 3, "val/loss": 1e4}])]
    path = write_report(folders, f"{folders[0]}/report.{suffix}")
    if suffix == "html":
        rows = Page(path).rows(0)
        assert rows["Non-finite steps"] == ["2 of the logged steps, first at 52", "1 of the logged steps, first at 7", "–"]
        assert rows["Training loss, last"] == ["3.5000 at step 30", "–", "–"]
        assert rows["Validation loss, last"][2] == "10000.0000 perplexity inf, at step 3"


def test_a_step_that_was_done_again_counts_once(make_run):
    again = [{"step": 20, "train/loss": 9.0, "step_time_s": 3.0}, {"step": 5, "train/loss": 8.0}]
    (run,) = history.read_runs([make_run("a", [*LINES, *again])])
    assert run.curve("train/loss").steps.tolist() == [1, 5, 10, 20, 30]
    assert run.curve("train/loss").values.tolist() == [6.0, 8.0, 5.0, 9.0, 3.5]


def test_names_are_as_short_as_tells_them_apart(make_run):
    folders = [make_run("a/x"), make_run("b/x"), make_run("c")]
    assert [run.name for run in history.read_runs(folders)] == ["a/x", "b/x", "c"]
    assert [run.name for run in history.read_runs(folders[:1])] == ["x"]


def test_the_average_is_a_weighted_mean_of_the_points_so_far():
    steps, values = np.array([1, 10, 20, 21, 60]), np.array([8.0, 5.0, 6.0, 2.0, 4.0])
    average = history.smoothed(Curve(steps, values), 15)
    for i in range(len(steps)):
        weights = np.exp(-(steps[i] - steps[: i + 1]) / 15)
        assert average.values[i] == pytest.approx(np.average(values[: i + 1], weights=weights))
    assert history.smoothed(Curve(steps, values), 0).values.tolist() == values.tolist()


def test_thinning_keeps_ends_and_extremes():
    values = np.random.default_rng(0).normal(size=5000)
    values[[1234, 3210]] = 50, -50
    thin = history.thinned(Curve(np.arange(5000), values), 100)
    assert len(thin) <= 202 and (np.diff(thin.steps) > 0).all()
    assert {0, 1234, 3210, 4999} <= set(thin.steps.tolist())
    assert (thin.values == values[thin.steps]).all()


# ---- the command --------------------------------------------------------------------------------------------------


def run_main(capsys, *arguments):
    code = exit_code(main, parse_args([*arguments]))
    return code, capsys.readouterr()


def test_the_command_says_where_the_report_is(make_run, tmp_path, capsys):
    output = tmp_path / "new" / "curves.png"
    code, printed = run_main(capsys, make_run("a"), make_run("b"), "--output", str(output), "--smooth", "20")
    assert code == 0 and printed.out.strip() == str(output)
    assert output.read_bytes().startswith(b"\x89PNG") and [*output.parent.iterdir()] == [output]


@pytest.mark.parametrize("suffix", [".html", ".png"])
def test_only_a_report_is_replaced(make_run, tmp_path, capsys, suffix):
    run, output = make_run("a"), tmp_path / f"page{suffix}"
    output.write_bytes(b"<html><title>Mine</title>")
    code, printed = run_main(capsys, run, "--output", str(output))
    assert code == 2 and f"--output: {str(output)!r} is not a report and is not replaced" in printed.err
    assert output.read_bytes() == b"<html><title>Mine</title>"
    output.unlink()
    for _ in range(2):
        assert run_main(capsys, run, "--output", str(output))[0] == 0
    output.write_bytes(b"<!DOCTYPE html>\n<title>Training report: a</title>")  # of an earlier version
    assert run_main(capsys, run, "--output", str(output))[0] == 0


def test_wrong_input_names_argument_value_and_what_was_expected(make_run, tmp_path, capsys):
    good, no_metrics, empty, torn = (
        make_run("good"),
        make_run("none"),
        make_run("empty", []),
        make_run("torn", [], '{"step": 1'),
    )
    Path(no_metrics, "metrics.jsonl").unlink()
    not_json, foreign = make_run("not_json"), make_run("foreign")
    Path(not_json, "config.json").write_text("{", encoding="utf-8")
    Path(foreign, "config.json").write_text('{"vocab_size": 3}', encoding="utf-8")
    cases = [
        ([str(tmp_path / "no")], "no' (expected a run folder, which has a config.json)"),
        ([good, str(tmp_path)], f"RUN: no run at {str(tmp_path)!r}"),
        ([good, no_metrics], f"RUN: no metrics yet in {no_metrics!r}"),
        ([empty], f"RUN: no metrics yet in {empty!r}"),
        ([torn], f"RUN: no metrics yet in {torn!r}"),
        ([not_json], "config.json' is not valid JSON"),
        ([foreign], "config.json' is not a run's configuration"),
        ([good, good + "/."], "is given twice (expected different run folders)"),
        ([good, "--output", "x.pdf"], "--output: 'x.pdf' is invalid (expected a name that ends in .html or .png)"),
        ([good, "--output", f"{good}/config.json/x.png"], "--output: cannot write"),
        ([good, "--smooth", "-1"], "--smooth: -1 is invalid (expected a number of steps"),
    ]
    for arguments, message in cases:
        code, printed = run_main(capsys, *arguments)
        assert code == 2 and message in printed.err and len(printed.err.splitlines()) == 1, (arguments, printed.err)


def test_the_report_does_not_import_jax_tensorflow_or_transformers(make_run):
    """Their imports cost seconds."""
    heavy = ("jax", "flax", "tensorflow", "transformers", "orbax", "clu")
    code = f"""
import sys
from mateconv_jax.report import write_report
assert "matplotlib" not in sys.modules
write_report([{make_run("a")!r}])
print([name for name in {heavy} if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_a_real_run_has_a_report(tiny_config):
    from mateconv_jax import config as config_lib
    from mateconv_jax.training import loop

    tiny_config.training.use_ema = True
    loop.train(config_lib.resolve(tiny_config))
    page = Page(write_report([tiny_config.training.out_dir]))
    rows = page.rows(0)
    assert rows["Steps completed"] == ["6 of 6"] and rows["Tokens seen"] == [f"{6 * 8 * 32:,} 256 per step"]
    assert {"Validation loss, best", "Validation loss of EMA weights, best", "Median tokens/s"} <= rows.keys()
    assert (
        len(lines_in(page.svg(), curves.colors(1)[0])) == 5 and len(lines_in(page.svg(), curves.colors(1)[0], dashed=True)) == 1
    )


def test_preferences_have_their_own_curves_and_rows(make_run, tmp_path):
    lines = [
        {"step": 1, "train/loss": 0.6931, "dpo/margin": 0.0, "dpo/accuracy": 0.0, "dpo/kl": 0.0, "lr": 1e-6},
        {"step": 10, "train/loss": 0.5, "dpo/margin": 0.61, "dpo/accuracy": 0.875, "dpo/kl": 0.2, "lr": 1e-6},
        {"step": 10, "val/loss": 0.55, "val/margin": 0.4, "val/accuracy": 0.75},
    ]
    [run] = history.read_runs([make_run("dpo", lines)])
    assert run.tokens_per_step == 2 * 2 * 8 * 32
    page = write_report([make_run("dpo2", lines)], str(tmp_path / "report.html"), 0)
    cells = {row[0]: row[1] for table in Page(page).tables for row in table if len(row) > 1}
    found = {
        key: value for key, value in cells.items() if "argin" in key or "ccuracy" in key or key.startswith("Validation loss")
    }
    assert [value for value in found.values()] == [
        "0.5500 at step 10", "0.5500 at step 10", "0.6100 at step 10", "0.8750 at step 10", "0.4000 at step 10", "0.7500 at step 10",
    ], found  # fmt: skip
    with_panels, without = (
        curves.draw(history.read_runs([make_run(name, some)]), 0, "svg") for name, some in (("a", lines), ("b", LINES))
    )
    assert "Preference accuracy" in with_panels.decode() and "Preference accuracy" not in without.decode()


def test_learning_from_reward_has_its_own_curves_and_rows(make_run, tmp_path):
    lines = [
        {"step": 1, "train/loss": 0.0, "grpo/reward": 0.25, "reward/number_match": 0.25, "grpo/length": 9.0, "grpo/entropy": 0.2},
        {"step": 10, "train/loss": 0.0, "grpo/reward": 0.75, "reward/number_match": 0.75, "grpo/length": 8.0, "grpo/entropy": 0.1},
        {"step": 10, "val/loss": -0.5, "val/reward": 0.5},
    ]  # fmt: skip
    page = Page(write_report([make_run("grpo", lines)], str(tmp_path / "report.html"), 0))
    cells = {row[0]: row[1] for table in page.tables for row in table if len(row) > 1}
    expected = {
        "Mean reward": "0.7500",
        "reward/number_match": "0.7500",
        "Tokens of an answer": "8.0000",
        "Validation reward": "0.5",
    }
    for label, value in expected.items():
        [found] = [cell for key, cell in cells.items() if key.startswith(label)]
        assert found.startswith(value)
    assert next(cell for key, cell in cells.items() if key.startswith("Validation loss")) == "-0.5000 at step 10"
    with_panels, without = (
        curves.draw(history.read_runs([make_run(name, some)]), 0, "svg") for name, some in (("a", lines), ("b", LINES))
    )
    assert "Entropy of the policy" in with_panels.decode() and "Entropy of the policy" not in without.decode()
