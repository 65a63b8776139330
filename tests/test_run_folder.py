import os
from pathlib import Path

import pytest

from mateconv_jax import run_folder
from mateconv_jax.errors import UserError
from mateconv_jax.interop.formats import detect_format, open_model
from mateconv_jax.training import resume
from tests.training.runs import train


@pytest.fixture
def run(tmp_path):
    """The folders of a run, without content."""
    for path in ("checkpoints/2", "checkpoints/10", "checkpoints/11.orbax-checkpoint-tmp", "best/4", "unreadable/12"):
        (tmp_path / "7" / path / "state").mkdir(parents=True)
    (tmp_path / "7" / "config.json").touch()
    return tmp_path / "7"  # a name that looks like a step


@pytest.mark.parametrize(
    "path, step",
    [("", 10), ("checkpoints", 10), ("checkpoints/2", 2), ("best", 4), ("best/4", 4), ("best/", 4), ("checkpoints/../best", 4)],
)
def test_which_checkpoint_a_path_means(run, path, step):
    checkpoint = run_folder.find_checkpoint(os.path.join(run, path), "key")
    assert (checkpoint.run, checkpoint.step) == (run, step)
    assert checkpoint.path == run / ("best" if step == 4 else "checkpoints") / str(step)


def test_a_relative_path_inside_a_run(run, monkeypatch):
    monkeypatch.chdir(run / "best")
    assert run_folder.find_checkpoint(".", "key").step == run_folder.find_checkpoint("4", "key").step == 4
    monkeypatch.chdir(run)
    assert run_folder.find_checkpoint("", "key").step == 10


@pytest.mark.parametrize(
    "path, message",
    [
        ("checkpoints/3", r"--model_path: no checkpoint at '.*checkpoints/3' \(available: 2, 10\)"),
        ("unreadable/12", "--model_path: no run at"),
        ("..", "--model_path: no run at"),
        ("none", "--model_path: no run at"),
    ],
)
def test_what_is_no_checkpoint(run, path, message):
    with pytest.raises(UserError, match=message):
        run_folder.find_checkpoint(run / path, "--model_path")


def test_a_run_without_a_finished_checkpoint(tmp_path):
    (tmp_path / "config.json").touch()
    with pytest.raises(UserError, match="--model_path: no finished checkpoint in"):
        run_folder.find_checkpoint(tmp_path, "--model_path")


def test_a_model_is_opened_from_each_of_a_runs_checkpoints(tiny_config, tmp_path):
    """And a training is resumed or started from one."""
    train(tiny_config, tmp_path / "a", max_steps=4, save_interval=2, eval_interval=2)
    for path, step in (("", 4), ("checkpoints/2", 2), ("best", 4), ("best/4", 4)):
        assert detect_format(tmp_path / "a" / path, "--from") == "run"
        assert open_model(tmp_path / "a" / path, "--model_path").step == step
    for name, options in (
        ("b", {"resume_from": str(tmp_path / "a" / "best")}),
        ("c", {"init_from": str(tmp_path / "a" / "best")}),
    ):
        train(tiny_config, tmp_path / name, max_steps=5, **options)
    assert "start: step 4 of" in (tmp_path / "b" / "train.log").read_text()
    assert "start: the weights of" in (tmp_path / "c" / "train.log").read_text()


@pytest.mark.parametrize(
    "content", ['{"architectures": ["LlamaForCausalLM"]}', "[]", "{", '{"model": 3, "data": {}, "training": {}}']
)
def test_somebody_elses_configuration_is_not_replaced_by_a_run(tiny_config, content):
    folder = Path(tiny_config.training.out_dir)
    folder.mkdir()
    resume.find_origin(tiny_config)
    (folder / "config.json").write_text(content)
    with pytest.raises(UserError, match="^training.out_dir: '.*config.json' is not a run's and would be replaced"):
        resume.find_origin(tiny_config)
    run_folder.write_config(folder, tiny_config)
    resume.find_origin(tiny_config)
