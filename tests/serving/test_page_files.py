"""The chat page's files: types, policy, texts, nothing from elsewhere."""

import json
import re

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from mateconv_jax.generation_config import PRESETS
from mateconv_jax.serving import chat_page

PAGE = chat_page.FOLDER
OURS = sorted(path for path in PAGE.iterdir() if path.is_file())
SCRIPTS = [path for path in OURS if path.suffix == ".js"]


@pytest.fixture(scope="module")
def client():
    return TestClient(Starlette(routes=chat_page.routes(96, True)))


@pytest.mark.parametrize(
    "path, kind",
    [
        ("/", "text/html"),
        ("/page/app.js", "text/javascript"),
        ("/page/page.css", "text/css"),
        ("/page/vendor/marked.esm.js", "text/javascript"),
        ("/page/vendor/purify.min.js", "text/javascript"),
        ("/page/vendor/highlight.min.js", "text/javascript"),
        ("/page/settings.json", "application/json"),
    ],
)
def test_files_have_their_type_and_a_policy_without_other_hosts(client, path, kind):
    response = client.get(path)
    assert response.status_code == 200 and response.headers["content-type"].startswith(kind)
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["script-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in str(policy) and "http" not in str(policy)
    assert response.headers["x-content-type-options"] == "nosniff"


def test_the_page_knows_the_context_and_the_presets(client):
    settings = client.get("/page/settings.json").json()
    assert settings["context"] == 96 and settings["needs_key"] is True and set(settings["presets"]) == set(PRESETS)
    assert settings["presets"]["chat"] == {name: getattr(PRESETS["chat"], name) for name in ("temperature", "top_k", "top_p")}


def test_nothing_comes_from_elsewhere_and_all_that_is_named_exists():
    for path in OURS:
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"(https?:)?//[\w-]+\.\w", text), path.name
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    for name in re.findall(r'(?:src|href)="page/([^"]+)"', html):
        assert (PAGE / name).is_file(), name
    for path in SCRIPTS:
        for name in re.findall(r'(?:from|import) "\./([^"]+)"', path.read_text(encoding="utf-8")):
            assert (PAGE / name).is_file(), name
    for name in re.findall(r'\$\("([\w-]+)"\)|getElementById\("([\w-]+)"\)', "".join(p.read_text("utf-8") for p in SCRIPTS)):
        assert f'id="{"".join(name)}"' in html
    vendored = {path.stem.partition(".")[0] for path in (PAGE / "vendor").glob("*.js")}
    assert vendored == {path.stem for path in (PAGE / "vendor").glob("*.LICENSE")}


def test_every_text_is_used_and_exists_in_both_languages():
    source = (PAGE / "texts.js").read_text(encoding="utf-8")
    table = source[source.index("TEXTS = {") : source.index("\n};")]
    lines = table.splitlines()[1:]
    texts = {}
    for line in lines:
        name, pair = line.strip().rstrip(",").split(": ", 1)
        texts[name] = json.loads(pair)
    assert all(len(pair) == 2 and all(pair) for pair in texts.values())
    for chinese, english in texts.values():
        assert set(re.findall(r"\{\d\}", chinese)) == set(re.findall(r"\{\d\}", english))
    others = "".join(path.read_text(encoding="utf-8") for path in OURS if path.name != "texts.js")
    named = set(re.findall(r'data-(?:text|label|placeholder)="(\w+)"', others)) | set(re.findall(r'\bt\("(\w+)"', others))
    assert named <= set(texts)
    assert not [name for name in texts if f'"{name}"' not in others]


def test_the_package_brings_the_page_along():
    import tomllib
    from pathlib import Path

    root = Path(__file__).parents[2]
    [patterns] = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"].values()
    packed = {path for pattern in patterns for path in (root / "mateconv_jax").glob(pattern)}
    assert {path for path in PAGE.rglob("*") if path.is_file()} <= packed
