"""launch/venv.sh on machines in all the states that people have them in."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def checkout(tmp_path):
    """launch/ and requirements.txt, a python3 that is this one and makes an environment in no time, and no uv."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "bin").mkdir()
    for name in ("launch/venv.sh", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    make = f"mkdir -p .venv/bin && ln -s {sys.executable} .venv/bin/python"
    program(tmp_path, "python3", f'[ "$1" = -m ] && {{ {make}; exit; }}; exec {sys.executable} "$@"')
    return tmp_path


def program(checkout, name, text):
    path = checkout / "bin" / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def in_the_script(checkout, command, **env):
    env = {"PATH": f"{checkout}/bin:/usr/bin:/bin", "HOME": str(checkout), "LC_ALL": "C.UTF-8"} | env
    arguments = ["bash", "-c", f"source launch/venv.sh; {command}"]
    return subprocess.run(arguments, cwd=checkout, env=env, capture_output=True, text=True, timeout=120)


def environment(checkout, python=sys.executable):
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "bin" / "python").symlink_to(python)


def test_a_half_made_environment_is_made_anew(checkout):
    environment(checkout, python="/nonexistent/python3")
    (checkout / ".venv" / "pyvenv.cfg").touch()
    result = in_the_script(checkout, '"$PYTHON" -m pip --version')
    assert result.returncode == 0 and "making .venv anew" in result.stdout and "pip 2" in result.stdout


def test_a_folder_that_is_no_environment_is_not_removed(checkout):
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "thesis.txt").write_text("mine")
    result = in_the_script(checkout, "true")
    assert result.returncode == 2 and "move it away" in result.stderr
    assert (checkout / ".venv" / "thesis.txt").read_text() == "mine"


def test_without_venv_the_package_to_install_is_named_and_nothing_is_left(checkout):
    program(checkout, "python3", f'[ "$1" = -m ] && {{ mkdir .venv; exit 1; }}; exec {sys.executable} "$@"')
    result = in_the_script(checkout, "true")
    assert result.returncode == 2 and "python3-venv" in result.stderr and not (checkout / ".venv").exists()


PRINT_INDEXES = 'echo "uv $* default=$UV_DEFAULT_INDEX more=$UV_INDEX"'


@pytest.mark.parametrize("given", ["environment", "pip.conf"])
def test_uv_takes_pips_mirror(checkout, given, monkeypatch):
    environment(checkout)
    program(checkout, "uv", PRINT_INDEXES)
    env = {"XDG_CONFIG_HOME": str(checkout / "config")}
    if given == "environment":
        env |= {"PIP_INDEX_URL": "https://mirror.example/simple", "PIP_EXTRA_INDEX_URL": "https://more.example/simple"}
    else:
        (checkout / "config" / "pip").mkdir(parents=True)
        (checkout / "config" / "pip" / "pip.conf").write_text(
            "[global]\nindex-url = https://mirror.example/simple\nextra-index-url = https://more.example/simple\n"
        )
    result = in_the_script(checkout, "install_requirements requirements.txt", **env)
    assert "default=https://mirror.example/simple" in result.stdout, result
    assert "more=https://more.example/simple" in result.stdout


def test_two_at_once_install_once(checkout):
    environment(checkout)
    program(checkout, "uv", "sleep 0.5; echo installed >>log")
    env = {"PIP_INDEX_URL": "https://mirror.example", "PIP_EXTRA_INDEX_URL": "https://mirror.example"}
    result = in_the_script(
        checkout, "install_requirements requirements.txt & install_requirements requirements.txt; wait", **env
    )
    assert result.returncode == 0 and (checkout / "log").read_text() == "installed\n"


@pytest.mark.parametrize(
    "gpus, cuda",
    [
        ("7.0, 580.126.09", "cuda12"),  # V100
        ("6.1, 580.126.09", "cuda12"),  # P40
        ("7.5, 580.126.09", "cuda13"),  # T4
        ("9.0, 580.126.09", "cuda13"),  # H100
        ("9.0, 570.86.15", "cuda12"),
        ("9.0, 580.126.09\n7.0, 580.126.09", "cuda12"),  # both in one machine
    ],
)
def test_cuda_is_what_every_gpu_and_the_driver_support(checkout, gpus, cuda):
    environment(checkout)
    program(checkout, "uv", "true")
    program(checkout, "nvidia-smi", f'[ "$1" = --query-gpu=compute_cap,driver_version ] && echo "{gpus}"')
    result = in_the_script(checkout, "install_requirements() { :; }; install_cuda")
    assert result.returncode == 0
    assert f"jax[{cuda}]>=" in (checkout / ".venv" / "requirements-cuda.txt").read_text()


def test_without_a_gpu_no_cuda_is_installed(checkout):
    environment(checkout)
    program(checkout, "uv", "true")
    result = in_the_script(checkout, "install_cuda")
    assert result.returncode == 0 and not (checkout / ".venv" / "requirements-cuda.txt").exists()
