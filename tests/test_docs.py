"""What the pages say about files, keys and each other is so. (That their commands run is tested in test_readme.py.)"""

import re
from pathlib import Path

import pytest

from mateconv_jax.config import default_config

ROOT = Path(__file__).parents[1]
PAGES = ("data", "training", "evaluation", "reinforcement", "sampling", "serving", "interop", "planning", "configuration")
BOTH = [("README.md", "README.zh-CN.md"), *((f"docs/{name}.md", f"docs/zh/{name}.md") for name in PAGES)]
ALL = [*(page for pair in BOTH for page in pair), "docs/ARCHITECTURE.md", "benchmarks/README.md", "CONTRIBUTING.md"]
FENCED = re.compile(r"^```.*?^```$", re.S | re.M)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ALL)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", read(page))):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), f"{link}: there are {sorted(anchors(target))}"


@pytest.mark.parametrize("page", ALL)
def test_configuration_keys_exist(page):
    config = default_config()
    for section, key in re.findall(
        r"`(?:config\.)?(model|data|mesh|loss|rollout|reward|training|wandb)\.(\w+)[`=]", read(page)
    ):
        assert key in config[section], f"{section}.{key}"


@pytest.mark.parametrize("english, chinese", BOTH)
def test_both_languages_show_the_same(english, chinese):
    """Code and output to the letter, and as many sections and rows of tables."""
    english, chinese = read(english), read(chinese)
    assert FENCED.findall(english) == FENCED.findall(chinese)
    for beginning in (r"^#+ ", r"^\|"):
        assert len(re.findall(beginning, english, re.M)) == len(re.findall(beginning, chinese, re.M)), beginning
    keys = r"`((?:model|data|mesh|loss|rollout|reward|training|wandb)\.\w+)"
    assert set(re.findall(keys, english)) == set(re.findall(keys, chinese))


def test_the_readme_is_read_in_a_minute():
    for readme in ("README.md", "README.zh-CN.md"):
        assert len(read(readme).splitlines()) <= 130
    assert (ROOT / "docs" / "images" / "curves.png").stat().st_size < 100_000
