"""The recipe command: a dataset, a GPU and one dial in; a configuration that trains out."""

import json
import shutil
from pathlib import Path

import pytest

from mateconv_jax import config as config_lib, recipe as command
from mateconv_jax.errors import exit_code
from mateconv_jax.planning import programs, target
from mateconv_jax.training import loop

H100 = "NVIDIA H100 80GB HBM3"


def run(capsys, *arguments):
    code = exit_code(lambda: command.main(command.parse_args([str(argument) for argument in arguments])))
    return code, *capsys.readouterr()


def load(path):
    return config_lib.resolve(config_lib.from_command_line(["train", f"--config={path}"]))


@pytest.fixture
def no_compiler(monkeypatch):
    """Estimates: in milliseconds, and the same on every machine."""
    monkeypatch.setattr(target, "can_compile", lambda: False)


def test_a_recipe_is_a_file_that_trains(capsys, dataset_folder, tmp_path, monkeypatch):
    """On this machine: the step is compiled and timed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(programs.measure, "__defaults__", (0.2,))  # seconds, in place of 5
    path = tmp_path / "configs" / "mine.py"
    code, out, _ = run(capsys, "--data", dataset_folder, "--params=100k", "--gpu=this", "--output", path)
    assert code == 0 and f"train --config={path}" in out and "measured here" in out
    config = load(path)
    assert config.data.train_data_path == str(dataset_folder) and config.training.out_dir == "out_mine"
    config.training.max_steps = 2
    assert loop.train(config) == 0
    assert Path("out_mine/checkpoints/2").is_dir()


def test_the_file_has_a_reason_above_every_number(capsys, dataset_folder, no_compiler):
    code, out, _ = run(capsys, "--data", dataset_folder, "--hours=1", "--gpu=4090")
    lines = out.splitlines()
    numbers = [i for i, line in enumerate(lines) if line.startswith("    config.")]
    assert code == 0 and len(numbers) > 15 and all(lines[i - 1].startswith("    # ") for i in numbers)
    assert lines[0].startswith("# Made by mateconv_jax.recipe: ") and max(map(len, lines[1:])) <= 128


def test_file_table_and_json_say_the_same(capsys, dataset_folder, tmp_path, no_compiler):
    flags = ("--data", dataset_folder, "--params=30M", "--tokens=1B", "--gpu=h100", "--devices=8", "--dollars_per_gpu_hour=2.5")
    path = tmp_path / "mine.py"
    code, out, _ = run(capsys, *flags, "--json", "--output", path)
    recipe, config = json.loads(out), load(path)
    assert code == 0 and (recipe["device"], recipe["devices"]) == (H100, 8)
    for key, choice in recipe["config"].items():
        section, name = key.split(".")
        assert config[section][name] == choice["value"] and choice["reason"]
    training = config.training
    tokens = training.max_steps * training.batch_size * training.accumulation_steps * config.data.seq_len
    assert recipe["tokens"] == tokens == pytest.approx(1e9, rel=0.01) and training.batch_size % 8 == 0
    assert recipe["dollars"] == pytest.approx(recipe["hours"] * 8 * 2.5)
    assert recipe["epochs"] == pytest.approx(tokens / recipe["unique_tokens"])
    assert any("learn them by heart" in warning for warning in recipe["warnings"])
    assert any("estimates" in warning for warning in recipe["warnings"])
    _, table, _ = run(capsys, *flags, "--explain")
    assert all(key in table for key in recipe["config"]) and "Cost: " in table


def test_only_a_recipe_is_replaced_and_only_when_asked(capsys, dataset_folder, tmp_path, no_compiler):
    path = tmp_path / "mine.py"
    flags = ("--data", dataset_folder, "--params=1M", "--gpu=l4", "--output", path)
    assert run(capsys, *flags)[0] == 0
    before = path.read_text()
    code, _, error = run(capsys, *flags)
    assert code == 2 and "give --overwrite" in error
    assert run(capsys, *flags, "--tokens=10M", "--overwrite")[0] == 0 and path.read_text() != before
    path.write_text("mine = 1")
    code, _, error = run(capsys, *flags, "--overwrite")
    assert code == 2 and "choose another file" in error and path.read_text() == "mine = 1"


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "--hours is missing"),
        (["--hours=1", "--params=1M", "--tokens=1M"], "two of them determine the third"),
        (["--hours=1", "--gpu=h900"], "--gpu: 'h900' is unknown"),
        (["--hours=1", "--devices=3", "--hosts=2"], "cannot be spread over 2 hosts"),
        (["--hours=1", "--gpu=this", "--devices=2"], "--devices: has no effect with --gpu=this"),
        (["--hours=1", "--output=mine.txt"], "--output: 'mine.txt' is invalid"),
        (["--hours=1", "--data=none"], "--data: no dataset at 'none'"),
        (["--hours=1", "--data=x.bin"], "--data: 'x.bin' does not say its vocabulary"),
        (["--params=100B"], "parameters do not fit on 1 x NVIDIA L4"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(capsys, dataset_folder, no_compiler, flags, message):
    code, _, error = run(capsys, "--data", dataset_folder, "--gpu=l4", *flags)
    assert code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize("flag", ["--params=many", "--params=0", "--tokens=1Q", "--hours=-1", "--hours=nan"])
def test_a_number_that_is_none_is_named(capsys, flag):
    with pytest.raises(SystemExit) as error:
        command.parse_args(["--data=x", "--gpu=l4", flag])
    assert error.value.code == 2 and flag.partition("=")[2] in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, value", [("100M", 1e8), ("1.5b", 1.5e9), ("2e9", 2e9), ("26,878,464", 26_878_464), ("3k", 3000)]
)
def test_counts(text, value):
    assert command.count(text) == value


def test_a_path_cannot_break_the_file(capsys, dataset_folder, tmp_path, no_compiler):
    odd = tmp_path / 'a"""\n\\b'
    shutil.copytree(dataset_folder, odd)
    path = tmp_path / "mine.py"
    assert run(capsys, "--data", odd, "--params=1M", "--gpu=l4", "--output", path)[0] == 0
    assert load(path).data.train_data_path == str(odd)
