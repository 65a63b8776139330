"""Going on: in a new process, from another run, on other settings; and which checkpoints there are to go on from."""

import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mateconv_jax import config as config_lib
from mateconv_jax.data import loader
from mateconv_jax.data.dataset import open_dataset
from mateconv_jax.errors import UserError
from mateconv_jax.interop import model_card
from mateconv_jax.prepare import main as prepare, parse_args
from mateconv_jax.training import checkpoints, loop, optimizer, train_state
from mateconv_jax.training.checkpoints import Progress
from mateconv_jax.training.optimizer import OptimizerOptions
from mateconv_jax.training.preemption import RESUMABLE
from tests import llama
from tests.training.processes import Training
from tests.training.runs import assert_equal_checkpoints, flags_of, losses_of, metrics_of, saved, steps_in, train

ROOT = Path(__file__).parents[2]


def test_going_on_in_a_new_process_equals_going_straight_to_the_bit(straight, tmp_path):
    """Stopped in the middle of an epoch, and before the step over its end."""
    config, folder = straight
    for stop in (4, 13, 14):
        training = Training(flags_of(config, tmp_path / "out"), tmp_path / f"log{stop}", stop_at=stop if stop < 14 else None)
        training.finish(0 if stop == 14 else RESUMABLE)
        assert steps_in(tmp_path / "out")[-1] == stop
    for step in (5, 10, 14):
        assert_equal_checkpoints(tmp_path / "out", folder, step)
    assert losses_of(tmp_path / "out") == losses_of(folder)
    state, progress = saved(folder, 14)
    assert progress["best_step"] and state["loss_scale"]["scale"] > 1 and state["loss_average"]["steps"] == 14


# ---- where a run starts ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_order_of_precedence(tiny_config, tmp_path):
    train(tiny_config, tmp_path / "a", max_steps=4, save_interval=2)
    go_on = dict(max_steps=4, resume_from=str(tmp_path / "a" / "checkpoints" / "2"))
    train(tiny_config, tmp_path / "b", **go_on)
    assert "start: step 2 of" in (tmp_path / "b" / "train.log").read_text()
    assert_equal_checkpoints(tmp_path / "a", tmp_path / "b", 4)
    train(tiny_config, tmp_path / "b", **go_on | {"max_steps": 5})  # its own checkpoint goes first
    assert "start: step 4, resumed" in (tmp_path / "b" / "train.log").read_text()
    train(tiny_config, tmp_path / "c", max_steps=5, resume_from=str(tmp_path / "a"))
    assert "start: step 4 of" in (tmp_path / "c" / "train.log").read_text()

    train(tiny_config, tmp_path / "d", max_steps=1, learning_rate=1e-9, min_lr=0.0, init_from=str(tmp_path / "a"))
    assert "start: the weights of" in (tmp_path / "d" / "train.log").read_text()
    weights, theirs = saved(tmp_path / "d", 1)[0]["params"], saved(tmp_path / "a", 4)[0]["params"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), weights, theirs)
    assert metrics_of(tmp_path / "d")[0]["step"] == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"resume": "never"}, r"training\.resume: never, but there is a run"),
        ({"use_ema": True}, r"training\.use_ema: True, but the run in .* has False"),
        ({"optimizer_type": "lion"}, r"training\.optimizer_type: lion, but the run in .* has adamw"),
        ({"dtype": "float16"}, r"training\.dtype: float16, but the run in .* has auto"),
        ({"resume_from": "x", "init_from": "y"}, r"training\.init_from: cannot be combined"),
    ],
)
def test_what_cannot_go_on(tiny_config, tmp_path, changes, message):
    train(tiny_config, tmp_path / "out", max_steps=1)
    with pytest.raises(UserError, match=message):
        train(tiny_config, tmp_path / "out", **{"max_steps": 2} | changes)


def test_nothing_there_to_start_from(tiny_config, tmp_path):
    with pytest.raises(UserError, match=r"training\.resume_from: no run at"):
        train(tiny_config, tmp_path / "out", resume_from=str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"training\.init_from: no model at"):
        train(tiny_config, tmp_path / "out", init_from=str(tmp_path / "none"))


def test_the_log_names_every_changed_key_that_makes_the_resumed_run_diverge(tiny_config, tmp_path):
    train(tiny_config, tmp_path / "out", max_steps=2)
    tiny_config.data.shuffle, tiny_config.model.aux_loss_alpha = False, 0.02
    train(tiny_config, tmp_path / "out", max_steps=3, learning_rate=2e-3, log_interval=2)
    log = (tmp_path / "out" / "train.log").read_text()
    for said in (
        "data.shuffle was True, now False",
        "model.aux_loss_alpha was 0.01, now 0.02",
        "training.learning_rate was 0.01, now 0.002",
        "training.max_steps was 2",
    ):
        assert f"not an exact continuation: {said}" in log
    assert "log_interval" not in log


@pytest.mark.parametrize("was, now", [(1.0, 0.0), pytest.param(0.0, 1.0, marks=pytest.mark.slow)])
def test_clipping_may_be_turned_off_and_on(tiny_config, tmp_path, was, now):
    train(tiny_config, tmp_path / "out", max_steps=2, grad_clip=was)
    train(tiny_config, tmp_path / "out", max_steps=3, grad_clip=now)
    log = (tmp_path / "out" / "train.log").read_text()
    assert f"not an exact continuation: training.grad_clip was {was}, now {now}" in log
    assert steps_in(tmp_path / "out") == [2, 3]


@pytest.mark.parametrize("optimizer_type", ["adamw", "adam", "muon"])
def test_an_older_checkpoint_without_clipping_is_read(tmp_path, optimizer_type):
    """Its optimizer's state is not the second of a pair."""
    options = OptimizerOptions(optimizer_type, 0.9, 0.95, 1e-8, 0.95, 0.1, matrix_lr_ratio=1.0, grad_clip=0.0)
    c = llama.model_config(n_layers=1)
    state = train_state.init(c, optimizer.make_optimizer(options, c), 0, False)
    older = state.replace(opt_state=jax.tree.map(lambda x: x + 3, state.opt_state[1]))
    with checkpoints.Checkpoints(tmp_path, 1, None, False) as saves:
        saves.save(2, older, Progress())
    restored, _ = checkpoints.restore(tmp_path / "checkpoints" / "2", jax.eval_shape(lambda: state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored.opt_state[1], older.opt_state)


def test_garbled_metrics_are_dropped_and_said(tiny_config, tmp_path):
    """A power loss may leave blocks of zeros, and anything else."""
    train(tiny_config, tmp_path / "out", max_steps=2)
    path = tmp_path / "out" / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(
        lines[0] + b"\x00" * 40 + b"\n" + b'{"step": 1, "train/lo\xff\n[1]\n{"loss": 2}\n' + b"".join(lines[1:]) + b'{"st'
    )
    train(tiny_config, tmp_path / "out", max_steps=3)
    assert [record["step"] for record in metrics_of(tmp_path / "out")] == [1, 2, 2, 3, 3]
    assert (
        "metrics.jsonl: dropped 4 lines that are not a JSON object with a step" in (tmp_path / "out" / "train.log").read_text()
    )
    bits = metrics_of(tmp_path / "out")[-1]["val/bits_per_byte"]
    path.write_bytes(b"\xff\n[1]\n" + path.read_bytes())
    assert model_card._bits_per_byte(path, 3) == bits


def test_data_that_cannot_be_read_is_not_blamed_on_the_run_folder(tiny_config, dataset_folder, tmp_path, monkeypatch):
    np.random.default_rng(0).integers(4, 400, 2000).astype("<u2").tofile(tmp_path / "tokens.bin")
    tiny_config.data.update(
        dict(train_data_path=str(tmp_path / "tokens.bin"), tokenizer_path=str(dataset_folder / "tokenizer"))
    )
    pread, calls = os.pread, itertools.count()

    def failing(*args):
        if next(calls) > 64 + 2 * 8:
            raise OSError(errno.EIO, "Input/output error")
        return pread(*args)

    monkeypatch.setattr(os, "pread", failing)
    with pytest.raises(UserError, match=r"^'.*tokens\.bin': cannot read token ids \(Input/output error\)"):
        train(tiny_config, tmp_path / "out", max_steps=60)


def test_a_file_elsewhere_is_not_blamed_on_the_run_folder(tiny_config, tmp_path, monkeypatch):
    def fails(*args):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(tmp_path / "elsewhere"))

    monkeypatch.setattr(loop.resume, "start", fails)
    with pytest.raises(UserError, match=rf"^{tmp_path}/elsewhere: No such file or directory$"):
        train(tiny_config, tmp_path / "out", max_steps=1)


# ---- another global batch -------------------------------------------------------------------------------------------------


@pytest.fixture
def rows_read(monkeypatch):
    """The tokens of every row that the loop takes, in order."""
    tokens, original = [], loader.training_batches

    def batches(*args):
        for batch in original(*args):
            tokens.extend(batch["tokens"].tolist())
            yield batch

    monkeypatch.setattr(loader, "training_batches", batches)
    return tokens


def in_order(config, n):
    rows = open_dataset(config.data.train_data_path, "", 32).rows("train")
    return rows.read(loader.rows_at(np.arange(n), len(rows), config.training.seed, True))["tokens"].tolist()


def test_a_changed_global_batch_goes_on_at_the_next_row(tiny_config, tmp_path, rows_read):
    train(tiny_config, tmp_path / "out", max_steps=3)
    train(tiny_config, tmp_path / "out", max_steps=5, batch_size=4, accumulation_steps=4)
    train(tiny_config, tmp_path / "other", max_steps=6, batch_size=16, resume_from=str(tmp_path / "out"))
    assert rows_read == in_order(tiny_config, 3 * 8 + 3 * 16)
    log = (tmp_path / "out" / "train.log").read_text()
    assert "the global batch was 8 rows, now 16: the run goes on at the next row" in log
    assert "start: step 3, resumed, 24 rows read" in log
    other = (tmp_path / "other" / "train.log").read_text()
    assert "checkpoints/5, 56 rows read" in other and "the global batch was" not in other  # 16 x 1 for 4 x 4
    assert saved(tmp_path / "other", 6)[1]["rows"] == 72


def test_checkpoints_that_do_not_know_their_rows_go_on_where_they_were(tiny_config, tmp_path, rows_read):
    train(tiny_config, tmp_path / "out", max_steps=3)
    path = tmp_path / "out" / "checkpoints" / "3" / "progress" / "metadata"
    progress = json.loads(path.read_text())
    assert progress.pop("rows") == 24
    path.write_text(json.dumps(progress))
    train(tiny_config, tmp_path / "out", max_steps=4, batch_size=16)
    assert rows_read == in_order(tiny_config, 40)


@pytest.mark.slow
def test_epochs_are_rows_whatever_the_batches_were(tiny_config, tmp_path, rows_read):
    """Half of an epoch in batches of 8, the other half in batches of 16; a damaged checkpoint makes no difference."""
    n_rows = len(open_dataset(tiny_config.data.train_data_path, "", 32).rows("train"))
    half = n_rows // 16
    train(tiny_config, tmp_path / "out", max_steps=half, save_interval=half - 1, eval_interval=1000)
    (tmp_path / "out" / "checkpoints" / str(half) / "state" / "manifest.ocdbt").write_bytes(b"")
    rows_read.clear()
    train(tiny_config, tmp_path / "out", max_steps=None, epochs=1, batch_size=16, eval_interval=1000, save_interval=1000)
    first = 8 * (half - 1)
    whole_steps = (n_rows - first) // 16
    assert rows_read == in_order(tiny_config, n_rows)[first : first + 16 * whole_steps]
    assert steps_in(tmp_path / "out")[-1] == half - 1 + whole_steps


# ---- checkpoints that are kept, and early stopping ----------------------------------------------------------------------


def test_which_checkpoints_are_kept(tiny_config, tmp_path, monkeypatch):
    losses = iter([5.0, 3.0, 4.0, 4.5, 3.5])
    monkeypatch.setattr(loop, "validation_losses", lambda *args: {"val/loss": next(losses)})
    train(tiny_config, tmp_path / "out", max_steps=10, save_interval=1, eval_interval=2, keep_latest=2, keep_every=3)
    assert steps_in(tmp_path / "out") == [3, 6, 9, 10]
    assert [path.name for path in (tmp_path / "out" / "best").iterdir() if path.name.isdigit()] == ["4"]
    progress = saved(tmp_path / "out", 10)[1]
    fingerprints = progress.pop("train_data"), progress.pop("measured")
    assert progress == {
        "best_loss": 3.0,
        "best_step": 4,
        "bad_evaluations": 3,
        "evaluated_step": 10,
        "rows": 80,
        "reference": None,
        "mixture": None,
    }
    assert all(len(fingerprint) == 16 for fingerprint in fingerprints)
    monkeypatch.setattr(loop, "validation_losses", lambda *args: {"val/loss": 1.0})
    train(tiny_config, tmp_path / "none", max_steps=2, eval_interval=1, keep_best=False)
    assert not (tmp_path / "none" / "best").exists()


@pytest.mark.parametrize("use_ema", [pytest.param(False, marks=pytest.mark.slow), True])
def test_early_stopping_counts_over_a_restart(tiny_config, tmp_path, monkeypatch, use_ema):
    def run(max_steps, *losses):
        values = iter(losses)

        def evaluate(*args):
            loss = next(values)
            return {"val/loss": 9.0 - loss, "val/ema_loss": loss} if use_ema else {"val/loss": loss}

        monkeypatch.setattr(loop, "validation_losses", evaluate)
        options = dict(early_stopping=True, patience=3, eval_interval=1, use_ema=use_ema, lr_scheduler="constant")
        return train(tiny_config, tmp_path / "out", max_steps=max_steps, **options)

    run(3, 2.0, 1.0, 1.5)
    run(20, 1.2, 1.1)  # the second and third in a row without a lower one
    assert steps_in(tmp_path / "out")[-1] == 5
    assert (
        "early stopping: 3 evaluations without a lower loss than 1.0000, of step 2"
        in (tmp_path / "out" / "train.log").read_text()
    )
    run(20)  # it is at its end
    assert steps_in(tmp_path / "out")[-1] == 5


def test_progress_by_hand():
    progress = Progress()
    assert [progress.evaluated(step, loss) for step, loss in enumerate([3.0, 3.0, 2.0, float("nan")])] == [
        True,
        False,
        True,
        False,
    ]
    assert progress == Progress(2.0, 2, 1, 3)


@pytest.mark.parametrize("nothing", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_beaten(nothing):
    progress = Progress()
    assert [progress.evaluated(step, loss) for step, loss in enumerate([nothing, 3.0, nothing])] == [False, True, False]
    assert progress == Progress(3.0, 1, 1, 2)
    assert Progress(best_loss=nothing, best_step=0).evaluated(1, 9.0)  # as an older version left it


# ---- the best checkpoint, and what it is best on --------------------------------------------------------------------------


def best_of(folder):
    return sorted(path.name for path in (folder / "best").iterdir() if path.name.isdigit())


@pytest.fixture
def losses(monkeypatch):
    """The validation losses of the coming evaluations."""
    values = []
    monkeypatch.setattr(loop, "validation_losses", lambda *args: {"val/loss": values.pop(0)})
    return values


@pytest.mark.slow
def test_a_run_from_another_brings_its_best_along(tiny_config, tmp_path, losses):
    losses.extend([2.0, 3.0, 4.0, 1.0])
    train(tiny_config, tmp_path / "a", max_steps=2, eval_interval=1)
    train(tiny_config, tmp_path / "b", max_steps=3, eval_interval=1, resume_from=str(tmp_path / "a"))
    assert best_of(tmp_path / "b") == ["1"] and saved(tmp_path / "b", "../best/1")[1]["best_loss"] == 2.0
    train(tiny_config, tmp_path / "b", max_steps=4, eval_interval=1, resume_from=str(tmp_path / "a"))
    assert best_of(tmp_path / "b") == ["4"] and best_of(tmp_path / "a") == ["1"]


def test_patience_starts_anew_where_something_else_is_measured():
    progress = Progress(rows=8)
    assert progress.reads("train", "validation") == [] and progress.evaluated(1, 1.0)
    assert progress.reads("train", "validation") == progress.reads("train", None) == []
    assert not progress.evaluated(2, 2.0) and progress.bad_evaluations == 1
    said = progress.reads("train", "other")
    assert said == ["what decides the best checkpoint is measured on other rows than before: best and patience start anew"]
    assert progress == Progress(None, None, 0, 2, 8, "train", "other") and progress.evaluated(3, 2.0)


@pytest.mark.parametrize("changes, same", [(dict(eval_iters=2), False), (dict(batch_size=4, eval_iters=2), True)])
def test_what_is_measured(tiny_config, changes, same):
    rows = open_dataset(tiny_config.data.train_data_path, "", 32).rows("validation")
    tiny_config.training.update(dict(eval_iters=1, batch_size=8))
    before = loop._fingerprints(rows, {"": rows}, tiny_config.training)
    tiny_config.training.update(changes)
    assert (loop._fingerprints(rows, {"": rows}, tiny_config.training) == before) == same
    named = loop._fingerprints(rows, {"first": rows, "second": rows}, tiny_config.training)
    assert named == loop._fingerprints(rows, {"": rows}, tiny_config.training)  # only the first decides
    tiny_config.training.document_mask = True
    assert loop._fingerprints(rows, {"": rows}, tiny_config.training)[1] not in before


def another_dataset(folder, dataset_folder, jsonl, *flags):
    """Of the same documents, but for the first quarter."""
    shorter = folder.parent / "shorter.jsonl"
    shorter.write_text("".join(jsonl.read_text().splitlines(keepends=True)[100:]))
    shutil.rmtree(folder, ignore_errors=True)
    options = ["--seq_len", "32", "--val_fraction", "0.05", "--num_workers", "1", *flags]
    prepare(parse_args(["--input", str(shorter), "--output", str(folder), *options]))


@pytest.mark.slow
def test_a_dataset_prepared_anew_under_the_same_path_is_named(tiny_config, dataset_folder, demo_jsonl, tmp_path):
    tiny_config.data.train_data_path = str(tmp_path / "data")
    shutil.copytree(dataset_folder, tmp_path / "data")
    train(tiny_config, tmp_path / "out", max_steps=3, eval_interval=1)
    another_dataset(tmp_path / "data", dataset_folder, demo_jsonl, "--tokenizer", str(dataset_folder / "tokenizer"))
    train(tiny_config, tmp_path / "out", max_steps=4, eval_interval=1)
    log = (tmp_path / "out" / "train.log").read_text()
    assert "not an exact continuation: the training rows are not those that it read so far" in log
    assert "measured on other rows than before" in log
    assert saved(tmp_path / "out", 4)[1]["best_step"] == 4
    train(tiny_config, tmp_path / "out", max_steps=5, eval_interval=1)  # said once, not again
    assert (tmp_path / "out" / "train.log").read_text().count("rows are not those") == 1


def test_another_tokenizer_is_refused_and_the_runs_own_stays(tiny_config, dataset_folder, demo_jsonl, tmp_path):
    tiny_config.data.train_data_path = str(tmp_path / "data")
    shutil.copytree(dataset_folder, tmp_path / "data")
    train(tiny_config, tmp_path / "out", max_steps=2)
    before = (tmp_path / "out" / "tokenizer" / "tokenizer.json").read_bytes()
    another_dataset(tmp_path / "data", dataset_folder, demo_jsonl, "--train_tokenizer", "--vocab_size", "390")
    for folder, options in (("out", {}), ("other", dict(resume_from=str(tmp_path / "out")))):
        with pytest.raises(UserError, match="data.tokenizer_path: the run in .* has another tokenizer than the data"):
            train(tiny_config, tmp_path / folder, max_steps=3, **options)
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").read_bytes() == before


def test_durations_on_the_command_line(tiny_config):
    flags = ["--config.training.eval_interval=5%", "--config.training.save_interval=1epoch", "--config.training.log_interval=3"]
    result = subprocess.run(
        [sys.executable, "-c", "import sys; from mateconv_jax import config as c; t = c.resolve(c.from_command_line(sys.argv)).training;"
         "print(t.eval_interval, t.save_interval, t.log_interval)", f"--config={ROOT / 'configs' / 'base.py'}", *flags],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert result.stdout.split() == ["5%", "1epoch", "3"], result.stderr
    tiny_config.training.eval_interval = "often"
    with pytest.raises(UserError, match=r"training\.eval_interval: 'often' is not possible \(expected a number of steps, or"):
        config_lib.resolve(tiny_config)


def test_intervals_as_shares_of_the_run(tiny_config, tmp_path):
    train(
        tiny_config, tmp_path / "out", max_steps=8, eval_interval="25%", save_interval="50%", log_interval="25%", keep_latest=9
    )
    assert steps_in(tmp_path / "out") == [4, 8]
    assert [m["step"] for m in metrics_of(tmp_path / "out") if "val/loss" in m] == [2, 4, 6, 8]
    assert [m["step"] for m in metrics_of(tmp_path / "out") if "train/loss" in m] == [1, 2, 4, 6, 8]
