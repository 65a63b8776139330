"""The page of a comparison: what stands on it, and that nothing a model writes is more than text."""

import html
import re
import shutil

import pytest

from mateconv_jax.reporting import compare_page

HOSTILE = "</div><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>&amp;"


def interval(value, low, high):
    return {"value": value, "low": low, "high": high}


COMPARED = {
    "models": [{"name": "runs/a", "step": 1200, "weights": "ema"}, {"name": "<b>runs/b</b>", "step": None, "weights": None}],
    "resamples": 5000,
    "seed": 0,
    "rows": [
        {
            "measure": "bits per byte", "group": group, "units": 12, "unit": "documents", "form": ".4f", "lower_is_better": True,
            "scores": [interval(1.25, 1.2, 1.3), interval(1.5, 1.4, 1.6)],
            "differences": [interval(0.25, 0.2, 0.3) | {"p": p}],
        }
        for group, p in (("", 0.0004), ("诗词", 0.31), ("<i>技术</i>", 0.04))
    ] + [
        {
            "measure": "gzip", "group": "", "units": None, "unit": "", "form": ".4f", "lower_is_better": None,
            "scores": [interval(3.5, None, None), interval(None, None, None)], "differences": [],
        }
    ],
}  # fmt: skip
SECTIONS = [
    {
        "title": "Answers",
        "chinese": "回答",
        "note": "",
        "items": [
            {
                "turns": [("user", "为什么天空是蓝色的？"), ("assistant", HOSTILE)],
                "cells": [[{"text": HOSTILE, "note": "3 characters, ended"}], [{"text": "长" * 400, "note": ""}]],
            }
        ]
        * 2,
    }
]


def page(compared=COMPARED, sections=SECTIONS):
    return compare_page.html(compared, sections, ["36 built-in prompts"])


def test_the_table():
    text = page()
    assert 'class="best">1.2500<span class="note">[1.2000, 1.3000]' in text
    assert '<span class="note worse">+0.2500 [+0.2000, +0.3000], p &lt;0.001' in text
    assert '<span class="note ">+0.2500 [+0.2000, +0.3000], p 0.310' in text
    assert "step 1,200, ema weights" in text and "12 documents" in text and "3.5000" in text and "5,000 paired" in text


def test_one_model_is_a_page_too():
    rows = [row | {"scores": row["scores"][:1], "differences": []} for row in COMPARED["rows"]]
    text = page(COMPARED | {"models": COMPARED["models"][:1], "rows": rows}, [])
    assert "1.2500" in text and "difference from" not in text and 'class="best"' not in text


def test_what_a_model_writes_is_text():
    text = page()
    assert "<script" not in text and "<img" not in text and "<b>runs" not in text and "<i>技术" not in text
    assert text.count(html.escape(HOSTILE, quote=False).replace("'", "&#39;")) == 4
    assert '[lang="zh"]' in text  # the style sheet is not escaped
    assert "default-src 'none'" in text and not re.search(r"(https?:)?//[\w-]+\.\w", text)


@pytest.mark.slow
def test_in_a_browser_nothing_runs_and_nothing_is_cut(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium")
    path = tmp_path / "a.html"
    path.write_text(page(), encoding="utf-8")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for width in (390, 1280):
            view = browser.new_page(viewport={"width": width, "height": 800})
            view.goto(path.as_uri())
            assert view.evaluate("window.hacked") is None
            assert view.evaluate("document.documentElement.scrollWidth") <= width
            assert view.locator(".said").first.inner_text() == HOSTILE
        browser.close()
