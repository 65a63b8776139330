"""What an installation gets: commands, dependencies, the configurations."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from mateconv_jax import config as config_lib
from mateconv_jax.errors import program

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return {Requirement(line) for line in lines if line and not line.startswith("#")}


def test_every_command_is_on_the_path_under_its_name():
    doors = {
        path for path in (ROOT / "mateconv_jax").rglob("*.py") if 'if __name__ == "__main__":' in path.read_text().splitlines()
    }
    scripts = {}
    for name, target in PROJECT["scripts"].items():
        module, _, function = target.partition(":")
        assert name == f"mateconv-{module.rpartition('.')[2]}"
        assert callable(getattr(importlib.import_module(module), function))
        scripts[name] = ROOT / f"{module.replace('.', '/')}.py"
    assert set(scripts.values()) == doors


def test_usage_shows_what_was_typed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/mateconv-demo", "--help"])
    assert program("data.demo") == "mateconv-demo"
    monkeypatch.setattr(sys, "argv", ["/checkout/mateconv_jax/data/demo.py", "--help"])
    assert program("data.demo") == "python -m mateconv_jax.data.demo"


def test_extras_and_requirements_say_the_same():
    extras = {name: set(map(Requirement, lines)) for name, lines in PROJECT["optional-dependencies"].items()}
    [ours] = [requirement for requirement in extras["dev"] if requirement.name == PROJECT["name"]]
    included = set().union(*(extras[extra] for extra in ours.extras))
    assert extras["dev"] - {ours} | included == requirements("requirements-dev.txt")
    needed = {requirement.name for requirement in requirements("requirements.txt")}
    assert not {name for name in needed if name.startswith("tensorflow") and name != "tensorflow-datasets"}
    assert extras["cuda12"] == {Requirement("jax[cuda12]")} and extras["cuda13"] == {Requirement("jax[cuda13]")}


def test_an_installed_package_brings_the_configurations_along(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def load(*arguments):
        monkeypatch.setattr(sys, "argv", ["train", *arguments])
        return config_lib.from_command_line(sys.argv)

    assert load("--config=configs/demo.py", "--config.model.dim=64").model.dim == 64
    assert load("--config", "configs/demo.py").model.vocab_size == 1024
    (tmp_path / "config.yaml").write_text("training:\n  epochs: 2\n")
    assert load("--config=configs/yaml.py:config.yaml").training.epochs == 2
    (tmp_path / "configs").mkdir()  # one's own comes first
    code = (ROOT / "configs" / "demo.py").read_text().replace("vocab_size = 1024", "vocab_size = 999")
    (tmp_path / "configs" / "demo.py").write_text(code)
    assert load("--config=configs/demo.py").model.vocab_size == 999


@pytest.mark.slow
def test_pip_installs_it_and_it_works_in_another_folder(tmp_path):
    """Without its dependencies, which this environment has."""
    source, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    ignored = shutil.ignore_patterns(".git", ".venv", ".cache", "data", "runs", "out", "__pycache__", "tests")
    shutil.copytree(
        ROOT, source, ignore=lambda folder, names: ignored(folder, names) if Path(folder) == ROOT else set(), symlinks=True
    )
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "site", source], check=True
    )
    elsewhere.mkdir()
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}

    def run(*command):
        return subprocess.run(command, cwd=elsewhere, env=env, capture_output=True, text=True)

    where = run(
        sys.executable, "-c", "from mateconv_jax import TextGenerator; import mateconv_jax; print(mateconv_jax.__file__)"
    )
    assert where.stdout.strip() == str(tmp_path / "site" / "mateconv_jax" / "__init__.py")
    train = run(tmp_path / "site" / "bin" / "mateconv-train", "--config=configs/base.py")
    assert train.returncode == 2 and "error: data.train_data_path: missing" in train.stderr
    page = Path("mateconv_jax/serving/page")
    files = {path.relative_to(ROOT) for path in (ROOT / page).rglob("*") if path.is_file()}
    assert files == {path.relative_to(tmp_path / "site") for path in (tmp_path / "site" / page).rglob("*") if path.is_file()}
    assert set(PROJECT["scripts"]) == {path.name for path in (tmp_path / "site" / "bin").iterdir()}
    assert re.search(r"^License-Expression: MIT$", next((tmp_path / "site").glob("mateconv_jax-*/METADATA")).read_text(), re.M)
