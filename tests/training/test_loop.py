import dataclasses
import itertools
import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mateconv_jax import config as config_lib
from mateconv_jax.data import loader
from mateconv_jax.data.dataset import open_dataset
from mateconv_jax.data.tokenizer import token_bytes, tokenizer as tokenizer_lib
from mateconv_jax.errors import UserError
from mateconv_jax.model import flops
from mateconv_jax.model.config import ModelConfig, ModelOptions
from mateconv_jax.runtime import sharding
from mateconv_jax.training import batches, loop, objective
from mateconv_jax.training.batch_shape import Position
from mateconv_jax.training.batches import RowBatches
from mateconv_jax.training.checkpoints import Checkpoints
from mateconv_jax.training.open_data import DataOptions, open_data, validation_paths
from tests.training.runs import losses_of, metrics_of, saved, train

ROOT = Path(__file__).parents[2]


@pytest.fixture
def spy(monkeypatch):
    """Batches as the loop reads them, and the states it saves."""

    class Spy:
        def __init__(self):
            self.batches, self.states = {}, {}

    spy = Spy()
    original_batches, original_save = loader.training_batches, Checkpoints.save

    def batches(rows, batch_size, seed, shuffle, start_row, num_workers, accumulation_steps, order):
        original = original_batches(rows, batch_size, seed, shuffle, start_row, num_workers, accumulation_steps, order)
        for step, batch in enumerate(original, start_row // (batch_size * accumulation_steps) + 1):
            spy.batches[step] = batch["tokens"].copy()
            yield batch

    def save(self, step, state, progress):
        spy.states[step] = jax.device_get(state)
        original_save(self, step, state, progress)

    monkeypatch.setattr(loader, "training_batches", batches)
    monkeypatch.setattr(Checkpoints, "save", save)
    return spy


def test_what_a_run_writes(tiny_config):
    tiny_config.training.update(dict(use_ema=True, ema_decay=0.5, max_steps=8, save_interval=2, keep_latest=2))
    loop.train(config_lib.resolve(tiny_config))
    folder = Path(tiny_config.training.out_dir)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["6", "8"]
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))
    assert (
        json.loads((folder / "config.json").read_text())["model"]["hidden_dim"] == 128
    )  # resolved: int(8 * 32 / 3) = 85 and up
    metrics = metrics_of(folder)
    training = [m for m in metrics if "train/loss" in m]
    assert [m["step"] for m in training] == list(range(1, 9))
    expected = {
        "train/loss",
        "grad_norm",
        "lr",
        "update_to_weight",
        "bad_steps",
        "tokens/s",
        "step_time_s",
        "input_wait",
        "memory_gb",
    }
    assert set(training[-1]) == {"step"} | expected
    assert training[-1]["tokens/s"] == pytest.approx(8 * 32 / training[-1]["step_time_s"])
    assert [m["step"] for m in metrics if "val/loss" in m] == [3, 6, 8]
    assert metrics[-1]["val/loss"] != metrics[-1]["val/ema_loss"]
    assert training[-1]["train/loss"] < training[0]["train/loss"] - 0.5
    # Bits per byte: the nats of all targets over the text that they write, of the EMA.
    rows = open_dataset(tiny_config.data.train_data_path, "", 32).rows("validation")
    batch = rows.read(np.arange(len(rows)))
    n_tokens = int((batch["length"] - 1).sum())
    n_bytes = token_bytes.target_bytes(token_bytes.bytes_per_token(tokenizer_lib.load(folder / "tokenizer", "")), batch)
    assert metrics[-1]["val/bits_per_byte"] == pytest.approx(metrics[-1]["val/ema_loss"] * n_tokens / np.log(2) / n_bytes)
    log = (folder / "train.log").read_text()
    assert "FLOPs per token" in log and "peak per device: unknown" in log
    assert "ln(400) = 5.9915" in log and f"initial loss: {training[0]['train/loss']:.6f}" in log


def test_a_finished_run_is_left_as_it_is(tiny_config):
    loop.train(config_lib.resolve(tiny_config))
    before = metrics_of(tiny_config.training.out_dir)
    loop.train(config_lib.resolve(tiny_config))
    assert metrics_of(tiny_config.training.out_dir) == before
    assert "is at step 6 of 6" in (Path(tiny_config.training.out_dir) / "train.log").read_text()


@pytest.mark.slow
def test_epochs_decide_where_max_steps_does_not(tiny_config, spy):
    tiny_config.training.update(dict(max_steps=None, epochs=1, batch_size=64))
    rows = len(open_dataset(tiny_config.data.train_data_path, "", 32).rows("train"))
    loop.train(config_lib.resolve(tiny_config))
    assert max(spy.states) == rows // 64


@pytest.fixture(scope="module")
def loss_by_default(base_tiny_config, tmp_path_factory):
    return loss_after_4_steps(base_tiny_config, tmp_path_factory.mktemp("default"))


def loss_after_4_steps(config, folder):
    train(config, folder, max_steps=4, eval_interval=100)
    return metrics_of(folder)[-1]["val/loss"]


@pytest.mark.parametrize(
    "section, key, value",
    [
        ("training", "seed", 1), ("training", "learning_rate", 3e-2), pytest.param("training", "beta1", 0.5, marks=pytest.mark.slow), pytest.param("training", "beta2", 0.5, marks=pytest.mark.slow),
        pytest.param("training", "weight_decay", 0.9, marks=pytest.mark.slow), pytest.param("training", "grad_clip", 0.01, marks=pytest.mark.slow), pytest.param("training", "warmup_ratio", 0.5, marks=pytest.mark.slow),
        pytest.param("training", "min_lr", 1e-2, marks=pytest.mark.slow), pytest.param("training", "dtype", "bfloat16", marks=pytest.mark.slow), pytest.param("model", "norm_eps", 0.1, marks=pytest.mark.slow), pytest.param("model", "rope_theta", 10.0, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_an_option_changes_the_training(tiny_config, tmp_path, loss_by_default, section, key, value):
    tiny_config[section][key] = value
    assert loss_after_4_steps(tiny_config, tmp_path) != loss_by_default


def test_all_of_val_data_path_is_for_validation(tiny_config, dataset_folder, tmp_path):
    shutil.copytree(dataset_folder, tmp_path / "other")
    data = config_lib.options(DataOptions, tiny_config.data)
    _, own, _ = open_data(data, 400, document_mask=False)
    _, other, _ = open_data(dataclasses.replace(data, val_data_path=str(tmp_path / "other")), 400, document_mask=False)
    splits = open_dataset(dataset_folder, "", 32).splits
    assert len(own[""]) == splits["validation"] and len(other[""]) == splits["train"] + splits["validation"]


def test_several_validation_sets_have_their_losses_and_the_first_decides(tiny_config, dataset_folder, tmp_path):
    shutil.copytree(dataset_folder, tmp_path / "wiki")
    np.random.default_rng(0).integers(400, size=32 * 20 + 1, dtype=np.uint16).tofile(tmp_path / "noise.bin")
    tiny_config.data.val_data_path = f"wiki={tmp_path}/wiki,noise={tmp_path}/noise.bin"
    train(tiny_config, max_steps=4, eval_interval=2, eval_iters=2)
    folder = Path(tiny_config.training.out_dir)
    evaluations = [m for m in metrics_of(folder) if "val/loss" in m]
    assert [set(m) for m in evaluations] == [
        {"step"} | {f"val/{name}{metric}" for name in ("", "wiki/", "noise/") for metric in ("loss", "bits_per_byte")}
    ] * 2
    for m in evaluations:
        assert m["val/loss"] == m["val/wiki/loss"] < m["val/noise/loss"] - 0.1
    assert saved(folder, 4)[1]["best_loss"] == min(m["val/wiki/loss"] for m in evaluations)
    log = (folder / "train.log").read_text()
    assert f"noise {evaluations[-1]['val/noise/loss']:.4f}" in log and "val/loss is that of wiki" in log


@pytest.mark.parametrize(
    "sets, message",
    [
        ("wiki=a,wiki=b", "'wiki=b' is there twice"),
        ("wiki=a,b", r"'b' is not possible \(expected different names with their paths, such as wiki=data/wiki"),
        ("wiki=", "'wiki=' is not possible"),
        ("wiki=no/such", "no dataset at 'no/such'"),
    ],
)
def test_validation_sets_that_are_none(tiny_config, sets, message):
    tiny_config.data.val_data_path = sets
    with pytest.raises(UserError, match=f"data.val_data_path: {message}"):
        train(tiny_config)


def test_a_path_with_an_equals_sign_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert validation_paths("data/a=b") == {"": "data/a=b"} and validation_paths("a=b,c=d/e=f") == {"a": "b", "c": "d/e=f"}
    monkeypatch.setenv("HOME", "/home/me")
    assert validation_paths("a=~/b") == {"a": "/home/me/b"}
    (tmp_path / "a=b").mkdir()
    assert validation_paths("a=b") == {"": "a=b"}


@pytest.mark.slow
def test_validation_reads_at_most_eval_iters_batches_of_val_data_path(tiny_config, tmp_path):
    """The same seed trains the same model each time: only what is measured differs."""
    from mateconv_jax.prepare import main as prepare, parse_args

    lines = [f'{{"text": "另一些文字，第{i}句。"}}\n' for i in range(200)]
    (tmp_path / "other.jsonl").write_text("".join(lines))
    flags = ["--tokenizer", tiny_config.data.train_data_path + "/tokenizer", "--seq_len", "32", "--val_fraction", "0.5"]
    prepare(parse_args(["--input", str(tmp_path / "other.jsonl"), "--output", str(tmp_path / "other"), *flags]))

    losses = set()
    for section, changes in [
        ("training", {}),
        ("training", {"eval_iters": 1}),
        ("data", {"val_data_path": str(tmp_path / "other")}),
    ]:
        config = tiny_config.copy_and_resolve_references()
        config[section].update(changes)
        config.training.out_dir = str(tmp_path / f"run{len(losses)}")
        loop.train(config_lib.resolve(config))
        losses.add(metrics_of(config.training.out_dir)[-1]["val/loss"])
    assert len(losses) == 3


def test_without_shuffle_a_run_reads_the_rows_in_order(tiny_config, spy):
    tiny_config.data.shuffle = False
    loop.train(config_lib.resolve(tiny_config))
    rows = open_dataset(tiny_config.data.train_data_path, "", 32).rows("train")
    for step, tokens in spy.batches.items():
        np.testing.assert_array_equal(tokens, rows.read(np.arange(8 * step - 8, 8 * step))["tokens"])


# ---- flat .bin files ------------------------------------------------------------------------------------------------


@pytest.fixture
def flat_config(tiny_config, tmp_path):
    """The streams of the dataset's splits, one shard each, as .bin files."""
    folder = tiny_config.data.train_data_path
    for split in ("train", "validation"):
        rows = open_dataset(folder, "", 32).rows(split)
        batch = rows.read(np.arange(len(rows)))
        parts = [row[i > 0 : length] for i, (row, length) in enumerate(zip(batch["tokens"], batch["length"], strict=True))]
        np.concatenate(parts).tofile(tmp_path / f"{split}.bin")
    tiny_config.data.train_data_path = str(tmp_path / "train.bin")
    tiny_config.data.val_data_path = str(tmp_path / "validation.bin")
    tiny_config.data.tokenizer_path = f"{folder}/tokenizer"
    return tiny_config


def test_flat_files_train_to_the_losses_of_the_folder_of_the_same_stream(flat_config, dataset_folder, tmp_path):
    losses = []
    for rows, validation in ((flat_config.data.train_data_path, flat_config.data.val_data_path), (str(dataset_folder), None)):
        flat_config.data.update(dict(train_data_path=rows, val_data_path=validation))
        flat_config.training.out_dir = str(tmp_path / f"run{len(losses)}")
        loop.train(config_lib.resolve(flat_config))
        losses.append(losses_of(flat_config.training.out_dir))
    assert losses[0] == losses[1] and {key for _, key in losses[0]} == {"train/loss", "val/loss"}


def test_a_flat_file_alone_has_no_validation_and_the_log_says_so(flat_config):
    flat_config.data.val_data_path = None
    loop.train(config_lib.resolve(flat_config))
    assert {key for _, key in losses_of(flat_config.training.out_dir)} == {"train/loss"}
    assert "validation: none" in (Path(flat_config.training.out_dir) / "train.log").read_text()


def test_mfu_is_known_where_the_peak_is(tiny_config, monkeypatch):
    monkeypatch.setitem(flops.PEAKS, "cpu", 1e9)
    monkeypatch.setattr(flops, "peak_flops", lambda kind, dtype: flops.PEAKS[kind])
    loop.train(config_lib.resolve(tiny_config))
    last = [m for m in metrics_of(tiny_config.training.out_dir) if "mfu" in m][-1]
    per_token = flops.training_flops_per_token(
        ModelConfig.make(config_lib.options(ModelOptions, config_lib.resolve(tiny_config).model), "float32"), 32
    )
    assert last["mfu"] == pytest.approx(last["tokens/s"] * per_token / 1e9)


def test_log_interval_decides_which_steps_are_written(tiny_config):
    tiny_config.training.log_interval = 4
    loop.train(config_lib.resolve(tiny_config))
    assert [m["step"] for m in metrics_of(tiny_config.training.out_dir) if "train/loss" in m] == [1, 4]


@pytest.mark.slow
def test_wandb_gets_the_numbers_and_a_run_that_goes_on_is_the_same_there(tiny_config, monkeypatch):
    """Into wandb's own offline files, without a network."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    runs, logged = [], []
    init = wandb.init

    def initialise(**options):
        runs.append(init(**options))
        log = runs[-1].log
        monkeypatch.setattr(runs[-1], "log", lambda scalars, step: logged.append((step, scalars)) or log(scalars, step=step))
        return runs[-1]

    monkeypatch.setattr(wandb, "init", initialise)
    tiny_config.wandb.update(dict(enable=True, project="tests", run_name="one"))
    for max_steps in (3, 6):
        tiny_config.training.max_steps = max_steps
        loop.train(config_lib.resolve(tiny_config))
    folder = Path(tiny_config.training.out_dir)
    assert runs[0].id == runs[1].id == (folder / "wandb_id").read_text()
    assert (runs[1].project, runs[1].name) == ("tests", "one")
    assert runs[1].config["model"]["dim"] == 32
    assert [step for step, scalars in logged if "train/loss" in scalars] == [1, 2, 3, 4, 5, 6]
    losses = {(step, key): value for step, scalars in logged for key, value in scalars.items() if "loss" in key}
    assert losses == losses_of(folder)
    files = list((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2 and all(runs[0].id in path.name and path.stat().st_size > 1000 for path in files)
    monkeypatch.setitem(sys.modules, "wandb", None)
    tiny_config.training.max_steps = 7
    assert "wandb.enable: the package is not installed" in error_of(tiny_config)


# ---- what does not fit is an error that names the key --------------------------------------------------------------


def error_of(config):
    with pytest.raises(UserError) as error:
        loop.train(config_lib.resolve(config))
    return str(error.value)


def test_no_dataset(tiny_config):
    tiny_config.data.train_data_path = "no/such/folder"
    assert error_of(tiny_config).startswith("data.train_data_path: no dataset at 'no/such/folder'")
    tiny_config.data.train_data_path = None
    assert error_of(tiny_config).startswith("data.train_data_path: missing")
    assert not Path(tiny_config.training.out_dir).exists()


def test_a_flat_file_without_its_tokenizer(flat_config):
    flat_config.data.tokenizer_path = None
    assert error_of(flat_config).startswith("data.tokenizer_path: missing (expected the tokenizer of ")


@pytest.mark.parametrize("key, name", [("train_data_path", "train.bin"), ("val_data_path", "validation.bin")])
def test_a_flat_file_with_an_id_that_the_model_has_not(flat_config, tmp_path, key, name):
    with (tmp_path / name).open("ab") as file:
        np.array([400], np.uint16).tofile(file)
    message = f"data.{key}: {str(tmp_path / name)!r} has the token id 400 (model.vocab_size is 400)"
    assert error_of(flat_config) == message


@pytest.mark.parametrize("key", ["train_data_path", "val_data_path"])
def test_no_flat_file(flat_config, key):
    flat_config.data[key] = "no/such.bin"
    assert error_of(flat_config) == f"data.{key}: no file at 'no/such.bin'"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"warmup_steps": 6}, "training.warmup_steps: 6, but the run has 6 steps"),
        ({"warmup_steps": 5, "lr_scheduler": "wsd", "decay_ratio": 0.5}, "training.decay_ratio: 0.5 are 3 of the run's 6 steps, but the warm-up takes 5"),
        ({"profile_step": 7}, "training.profile_step: 7, but the run has 6 steps"),
        ({"samples_interval": 2, "sample_prompts": ()}, "training.sample_prompts: empty, but training.samples_interval"),
    ],
)  # fmt: skip
def test_keys_that_contradict_each_other(tiny_config, changes, message):
    tiny_config.training.update(changes)
    assert error_of(tiny_config).startswith(message)
    assert not Path(tiny_config.training.out_dir).exists()


def test_early_stopping_needs_validation(flat_config):
    flat_config.training.early_stopping, flat_config.data.val_data_path = True, None
    assert error_of(flat_config).startswith("training.early_stopping: there are no validation rows")


def test_validation_on_the_training_data(flat_config):
    flat_config.data.val_data_path = flat_config.data.train_data_path
    assert "is the training data (expected another dataset" in error_of(flat_config)


def test_another_row_length(tiny_config):
    tiny_config.data.seq_len = 16
    assert error_of(tiny_config).startswith("data.seq_len: 16, but")


def test_a_tokenizer_larger_than_the_models_vocabulary(tiny_config):
    tiny_config.model.vocab_size = 300
    assert error_of(tiny_config) == ("model.vocab_size: 300 is smaller than the tokenizer's vocabulary (expected at least 400)")


def test_a_tokenizer_that_did_not_make_the_dataset(tiny_config, tmp_path):
    from mateconv_jax.data.tokenizer import bpe

    bpe.train(["另一个"], 300).save_pretrained(tmp_path / "other")
    tiny_config.data.tokenizer_path = str(tmp_path / "other")
    assert "was tokenised with another tokenizer" in error_of(tiny_config)


def test_a_given_tokenizer_goes_into_the_run_folder(tiny_config, tmp_path):
    from mateconv_jax.data.tokenizer import tokenizer

    own = tokenizer.load(Path(tiny_config.data.train_data_path) / "tokenizer", "")
    own.chat_template = "{{ messages[0]['content'] }}"
    own.save_pretrained(tmp_path / "own")
    tiny_config.data.tokenizer_path = str(tmp_path / "own")
    loop.train(config_lib.resolve(tiny_config))
    saved = tokenizer.load(Path(tiny_config.training.out_dir) / "tokenizer", "")
    assert saved.chat_template == own.chat_template


def test_more_rows_in_a_batch_than_there_are(tiny_config):
    tiny_config.training.update(dict(max_steps=None, epochs=1, batch_size=10**6))
    assert error_of(tiny_config).startswith("training.batch_size: a step takes 1000000 rows, more than")


def test_a_batch_that_the_devices_cannot_share(monkeypatch, tiny_config):
    from mateconv_jax.runtime import sharding

    class EightDevices:
        size = 8

    monkeypatch.setattr(sharding, "make_mesh", lambda data, fsdp: EightDevices)
    tiny_config.training.batch_size = 12
    assert "12 rows cannot be split over 8 devices" in error_of(tiny_config)
    assert "8 or 16" in error_of(tiny_config)


def test_another_model_in_the_run_folder(tiny_config):
    loop.train(config_lib.resolve(tiny_config))
    tiny_config.model.n_layers = 3
    assert error_of(tiny_config).startswith("model.n_layers: 3, but the run in")


# ---- the loop itself ----------------------------------------------------------------------------------------------------------


def test_the_source_of_batches_gets_the_parameters_of_its_step(tiny_config, tmp_path, monkeypatch):
    given = {}

    class Source(RowBatches):
        def __call__(self, step, params):
            given.setdefault(step, jax.device_get(params["norm"]["scale_D"][...]))
            return super().__call__(step, params)

    monkeypatch.setattr(batches, "RowBatches", Source)
    train(tiny_config, tmp_path / "out", max_steps=3, save_interval=1, keep_latest=9, eval_interval=100)
    assert given.keys() == {0, 1, 2} and not np.array_equal(given[0], given[2])
    for step in (1, 2):
        np.testing.assert_array_equal(given[step], saved(tmp_path / "out", step)[0]["params"]["norm"]["scale_D"]["value"])


def test_a_batch_is_a_function_of_its_step(tiny_config):
    config = config_lib.resolve(tiny_config)
    mesh = sharding.make_mesh()
    rows = open_dataset(config.data.train_data_path, "", 32).rows("train")
    training, shape = config.training, objective.of(config).shape
    in_order, source = (RowBatches(rows, shape, training.seed, config.data.shuffle, 2, mesh, Position()) for _ in range(2))
    expected = [in_order(step, None) for step in range(6)]
    for step in (3, 3, 4, 1, 0, 5):
        jax.tree.map(np.testing.assert_array_equal, source(step, None), expected[step])


def test_a_steps_metrics_are_read_after_the_next_step_is_dispatched(tiny_config, tmp_path, monkeypatch):
    events = []
    compile_step, write = loop.compile_step, loop.Metrics._write_step

    def compiling(*args):
        step = compile_step(*args)
        counter = itertools.count(1)
        return lambda state, batch: (events.append(("dispatch", next(counter))), step(state, batch))[1]

    monkeypatch.setattr(loop, "compile_step", compiling)
    monkeypatch.setattr(
        loop.Metrics, "_write_step", lambda self, step, m: (events.append(("read", step)), write(self, step, m))
    )
    train(tiny_config, tmp_path / "out", max_steps=5, eval_interval=100, save_interval=100)
    for step in range(1, 5):
        assert events.index(("read", step)) > events.index(("dispatch", step + 1))


def test_nothing_goes_to_the_device_unasked_and_nothing_compiles_twice(tiny_config, tmp_path, monkeypatch):
    guarded, steps_of_compilations, at = [], [], [0]
    push = loop.Metrics.push

    def pushing(self, step, metrics):
        at[0] = step
        if step == 1:  # from the first step on, as in a long run
            guarded.append(jax.transfer_guard_host_to_device("disallow"))
            guarded[0].__enter__()
        return push(self, step, metrics)

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            steps_of_compilations.append(at[0])

    monkeypatch.setattr(loop.Metrics, "push", pushing)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        train(tiny_config, tmp_path / "out", max_steps=8, use_ema=True, eval_interval=2, save_interval=2)
    finally:
        guarded[0].__exit__(None, None, None)
        jax.monitoring.unregister_event_duration_listener(listen)
    # Before the first step, and the first evaluation and save.
    assert set(steps_of_compilations) <= {0, 2} and 0 in steps_of_compilations
