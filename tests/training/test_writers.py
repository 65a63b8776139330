"""Where the numbers go: TensorBoard reads them without TensorFlow, and a resumed run leaves none of a step twice."""

import logging
import shutil

import pytest
from absl import logging as absl_logging
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mateconv_jax.training import logging_setup
from mateconv_jax.training.writers import TensorBoardWriter
from tests.training.runs import metrics_of, train


def points(folder, name):
    """Of a curve, as TensorBoard itself reads it: (step, value) in the order of the files."""
    board = EventAccumulator(str(folder))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(name)]


def test_tensorboard_reads_what_was_written(tmp_path):
    writer = TensorBoardWriter(tmp_path, first_step=1)
    writer.write_scalars(1, {"train/loss": 2.5, "grad_norm": float("inf")})
    writer.write_texts(2, {"samples/0": "长江\n黄河"})
    # Before it is closed: a run can be watched.
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    assert board.Tags()["scalars"] == ["train/loss", "grad_norm"] and board.Tags()["tensors"] == ["samples/0"]
    assert board.SummaryMetadata("samples/0").plugin_data.plugin_name == "text"
    assert board.Tensors("samples/0")[0].tensor_proto.string_val[0].decode() == "长江\n黄河"
    assert points(tmp_path, "train/loss") == [(1, 2.5)] and points(tmp_path, "grad_norm") == [(1, float("inf"))]
    writer.close()


def test_a_restart_replaces_the_points_ahead_of_it(tmp_path):
    """Also where both start within the same second."""
    for first_step, value in ((1, 1.0), (4, 2.0), (3, 3.0)):
        writer = TensorBoardWriter(tmp_path, first_step)
        for step in range(first_step, 6):
            writer.write_scalars(step, {"loss": value})
        writer.close()
    assert points(tmp_path, "loss") == [(1, 1.0), (2, 1.0), (3, 3.0), (4, 3.0), (5, 3.0)]


def test_a_run_that_lost_its_last_checkpoint_has_every_step_once(tiny_config, tmp_path):
    train(tiny_config, tmp_path / "out", max_steps=6, keep_latest=9)
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "6")  # as if killed before it was finished
    train(tiny_config, tmp_path / "out", max_steps=6, keep_latest=9)
    for name in ("train/loss", "val/loss"):
        written = [(m["step"], pytest.approx(m[name])) for m in metrics_of(tmp_path / "out") if name in m]
        assert points(tmp_path / "out" / "tensorboard", name) == written
        assert [step for step, _ in written] == ([1, 2, 3, 4, 5, 6] if name == "train/loss" else [3, 6])


def test_the_log_has_a_line_a_step(tiny_config, tmp_path):
    train(tiny_config, tmp_path / "out", max_steps=3)
    lines = [line.partition(" step ")[2] for line in (tmp_path / "out" / "train.log").read_text().splitlines()]
    first, second, third, evaluation = [line for line in lines if line[1:3] == "/3"]
    [loss] = [m["train/loss"] for m in metrics_of(tmp_path / "out") if m["step"] == 2]
    assert second.startswith(f"2/3  loss {loss:.4f}  lr ") and second.endswith("eta 0:00") and " tok/s  " in second
    assert "tok/s" not in first and evaluation.startswith("3/3  val/loss ") and evaluation.endswith("bits/byte")


def test_only_this_packages_lines_and_warnings_are_logged(tmp_path):
    """Wherever it is installed: a checkout may be called mateconv_jax, and hold the environment with all libraries."""
    checkout = logging_setup._PACKAGE.removesuffix("mateconv_jax/")

    def log(path, level, text):
        absl_logging.get_absl_logger().handle(logging.LogRecord("absl", level, path, 1, text, (), None))

    with logging_setup.logging_to(tmp_path / "train.log"):
        log(checkout + "mateconv_jax/training/loop.py", logging.INFO, "ours")
        log("/home/me/mateconv_jax/.venv/lib/orbax/checkpoint.py", logging.INFO, "theirs")
        log("/home/me/mateconv_jax/.venv/lib/orbax/checkpoint.py", logging.WARNING, "their warning")
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["ours", "their warning"]
