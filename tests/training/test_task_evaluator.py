"""Benchmark questions asked during training, and what they decide."""

import shutil

import pytest

from mateconv_jax.errors import UserError
from mateconv_jax.reporting import history, report_page
from mateconv_jax.training import loop
from mateconv_jax.training.best_metric import BestMetric
from mateconv_jax.training.checkpoints import Progress
from mateconv_jax.training.task_evaluator import TaskEvaluator
from tests.tasks import exams
from tests.training.processes import Training  # noqa: F401
from tests.training.runs import assert_equal_checkpoints, metrics_of, saved, steps_in, train
from tests.training.test_devices import config, start, start_two  # noqa: F401


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """training.eval_tasks: an exam and a continuation."""
    folder = tmp_path_factory.mktemp("tasks")
    exams.jsonl(folder / "next.jsonl", [{"context": "明明在", "continuation": "公园"}])
    return f"exam={exams.ceval(folder / 'ceval')}, {folder / 'next.jsonl'}"


def test_a_run_that_asks_is_the_run_that_does_not(tiny_config, tmp_path, tasks, caplog):
    """To the last bit, whether stopped in between or not."""
    asking = dict(eval_tasks=tasks, eval_tasks_interval=2, eval_iters=1)
    train(tiny_config, tmp_path / "plain", eval_iters=1)
    train(tiny_config, tmp_path / "asks", **asking)
    assert_equal_checkpoints(tmp_path / "plain", tmp_path / "asks", 6)
    scores = {m["step"]: m for m in metrics_of(tmp_path / "asks") if "tasks/exam/acc" in m}
    assert list(scores) == [2, 4, 6]
    names = ["exam/acc", "exam/acc_macro", "exam/chance", "next/acc", "next/perplexity"]
    assert [name for name in scores[6] if name.startswith("tasks/")] == [f"tasks/{name}" for name in names]
    assert "val/loss" in scores[6] and "val/loss" not in scores[2] and scores[2]["tasks/exam/chance"] == 0.25
    log = (tmp_path / "asks" / "train.log").read_text(encoding="utf-8")
    assert "task exam: 7 questions of 2 subjects, 25.0% by guessing; 7 prompts lose their beginning" in log
    assert f"exam {scores[6]['tasks/exam/acc']:6.1%}  next {scores[6]['tasks/next/acc']:6.1%}" in log

    shutil.rmtree(tmp_path / "asks" / "checkpoints" / "6")  # killed before it was saved
    train(tiny_config, tmp_path / "asks", **asking)
    assert_equal_checkpoints(tmp_path / "plain", tmp_path / "asks", 6)
    assert {m["step"]: m for m in metrics_of(tmp_path / "asks") if "tasks/exam/acc" in m} == scores
    page = report_page.html(history.read_runs([str(tmp_path / "asks"), str(tmp_path / "plain")]), 0)
    assert "exam/acc, highest" in page and "guessing 25.0%, at step 6" in page


def test_what_is_best(tiny_config, tmp_path, tasks, monkeypatch):
    """The checkpoint with the most right answers; the run stops when they do not become more."""
    accuracies = iter([0.2, 0.5, 0.5, 0.4])
    monkeypatch.setattr(TaskEvaluator, "__call__", lambda self, params, should_stop: {"tasks/exam/acc": next(accuracies)})
    deciding = dict(eval_tasks=tasks, best_metric="tasks/exam/acc", eval_interval=1, early_stopping=True, patience=2)
    train(tiny_config, tmp_path / "out", **deciding)
    assert steps_in(tmp_path / "out") == [3, 4]
    assert [path.name for path in (tmp_path / "out" / "best").iterdir() if path.name.isdigit()] == ["2"]
    progress = saved(tmp_path / "out", 4)[1]
    assert (progress["best_loss"], progress["best_step"], progress["bad_evaluations"]) == (0.5, 2, 2)
    log = (tmp_path / "out" / "train.log").read_text(encoding="utf-8")
    assert "early stopping: 2 evaluations without a higher tasks/exam/acc than 0.5000, of step 2" in log
    monkeypatch.setattr(loop, "validation_losses", lambda *args: {"val/loss": 1.0})
    train(tiny_config, tmp_path / "out", max_steps=5)
    log = (tmp_path / "out" / "train.log").read_text(encoding="utf-8")
    assert "what decides the best checkpoint is measured on other rows than before" in log
    assert saved(tmp_path / "out", 5)[1]["best_loss"] == 1.0


def test_progress_of_what_shall_be_high():
    progress = Progress()
    found = [progress.evaluated(step, value, True) for step, value in enumerate([0.2, 0.1, float("nan"), 0.3, float("inf")])]
    assert found == [True, False, False, True, False] and progress == Progress(0.3, 3, 1, 4)


@pytest.mark.parametrize(
    "name, high",
    [(None, False), ("val/code/loss", False), ("tasks/a/acc", True), ("tasks/a/perplexity", False), ("val/kl", False)],
)
def test_what_is_better(name, high):
    assert BestMetric(name).shall_be_high == high


def test_metrics_that_there_are_not(tiny_config, tmp_path, tasks):
    for changes, message in (
        (dict(best_metric="tasks/exam/accuracy"), "'tasks/exam/accuracy' is no number of this run's evaluations .expected tasks/exam/acc,"),
        (dict(best_metric="val/code/loss"), "expected .*, val/loss, val/bits_per_byte"),
        (dict(eval_tasks="nowhere"), "training.eval_tasks: there is no 'nowhere'"),
        (dict(eval_tasks_shots=9), "training.eval_tasks_shots: 9, but there are 5 examples"),
        (dict(eval_tasks_interval="0.5x"), "training.eval_tasks_interval: '0.5x' is not possible"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            train(tiny_config, tmp_path / "out", **{"eval_tasks": tasks} | changes)
    assert not (tmp_path / "out" / "config.json").exists()
    of_other_loss = BestMetric("val/margin")
    of_other_loss.check([""], [], None)  # only an evaluation knows
    with pytest.raises(UserError, match="expected val/loss"):
        BestMetric("val/x/margin").check([""], [], None)


@pytest.mark.slow
def test_two_processes_of_four_devices_find_what_one_does(config, tmp_path, tasks):  # noqa: F811
    """Their weights split over two devices each; the first alone writes answers."""
    exams.jsonl(tmp_path / "sums.jsonl", [{"question": "1+1=?", "answer": 2}])
    flags = (
        f"--config.training.eval_tasks={tasks},{tmp_path / 'sums.jsonl'}",
        "--config.training.best_metric=tasks/next/perplexity",
    )
    start(config, tmp_path / "one", 1, flags).finish()
    for training in start_two(config, tmp_path / "two", (*flags, "--config.mesh.fsdp=2")):
        training.finish()
    one, two = ([m for m in metrics_of(tmp_path / name) if "tasks/exam/acc" in m] for name in ("one", "two"))
    assert [m["step"] for m in one] == [m["step"] for m in two] == [3, 6]
    for ours, theirs in zip(two, one, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-2) and "tasks/sums/number_match" in ours
    best = [(tmp_path / name / "best") for name in ("one", "two")]
    assert [path.name for path in best[0].iterdir()] == [path.name for path in best[1].iterdir()]
