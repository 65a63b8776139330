"""Training on preferences: the reference, what is watched, and going on after a stop."""

import copy
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from mateconv_jax import config as config_lib
from mateconv_jax.data.dataset import open_dataset
from mateconv_jax.errors import UserError
from mateconv_jax.evaluation import held_out
from mateconv_jax.training import reference, writers
from mateconv_jax.training.preemption import RESUMABLE
from tests.data.build.preparing import prepare, write_jsonl
from tests.training.runs import assert_equal_checkpoints, metrics_of, saved, steps_in, train

N = 44


@pytest.fixture(scope="module")
def preferred(base_tiny_config, dataset_folder, tmp_path_factory):
    """A configuration that prefers short answers, and where it starts: a model of 4 steps."""
    folder = tmp_path_factory.mktemp("preferences")
    records = [{"prompt": f"{i}？", "chosen": "好。", "rejected": "好" * (2 + i % 4) + "。"} for i in range(N)]
    flags = ("--tokenizer", dataset_folder / "tokenizer", "--seq_len", 32, "--val_fraction", "0.25")
    prepare(write_jsonl(folder / "raw.jsonl", records), folder / "pairs", *flags)
    config = copy.deepcopy(base_tiny_config)
    config.model.n_layers = 1
    train(config, folder / "start", max_steps=4, eval_interval=99, save_interval=99)
    config.data.train_data_path = str(folder / "pairs")
    config.loss.kind = "sigmoid"
    config.training.update(dict(init_from=str(folder / "start"), batch_size=4, max_steps=6, learning_rate=1e-3))
    config.training.update(dict(warmup_steps=0, eval_interval=3, save_interval=2, keep_latest=99))
    return config


@pytest.fixture(scope="module")
def straight(preferred, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "out"
    assert train(preferred, folder) == 0
    return folder


def log_of(folder):
    return (folder / "train.log").read_text(encoding="utf-8")


def test_the_first_loss_is_ln_2_and_the_log_says_what_it_should_be(straight):
    first, log = metrics_of(straight)[0], log_of(straight)
    assert first["train/loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert first["dpo/margin"] == pytest.approx(0, abs=1e-5) and first["dpo/kl"] == pytest.approx(0, abs=1e-8)
    assert "expected initial loss: ln 2 = 0.693147" in log and f"initial loss: {first['train/loss']:.6f}" in log


def test_the_margin_grows_on_pairs_it_has_seen_and_on_others(straight):
    training = [m for m in metrics_of(straight) if "train/loss" in m]
    validation = [m for m in metrics_of(straight) if "val/loss" in m]
    assert training[-1]["dpo/margin"] > 0.1 and training[-1]["dpo/accuracy"] > 0.9 and training[-1]["dpo/kl"] > 0
    assert {"val/loss", "val/margin", "val/accuracy", "val/chosen_logp", "val/rejected_logp", "val/kl"} <= validation[-1].keys()
    assert validation[-1]["val/loss"] < validation[0]["val/loss"] < np.log(2) and validation[-1]["val/accuracy"] > 0.9
    assert " margin " in log_of(straight) and " accuracy " in log_of(straight)
    assert sorted(path.name for path in (straight / "best").iterdir()) == ["6"]


def test_a_run_that_goes_on_is_the_same_to_the_bit(preferred, straight, tmp_path, monkeypatch):
    out = tmp_path / "out"
    train(preferred, out, max_steps=6, save_interval=2)
    shutil.rmtree(out / "checkpoints" / "6"), shutil.rmtree(out / "checkpoints" / "4")
    monkeypatch.setattr(reference.Reference, "_compute", None)  # nothing is scored again
    train(preferred, out)
    assert_equal_checkpoints(out, straight, 6)


@pytest.mark.slow
def test_each_validation_set_has_its_reference(preferred, tmp_path):
    config = copy.deepcopy(preferred)
    for name in ("a", "b"):
        shutil.copytree(config.data.train_data_path, tmp_path / name)
    config.data.val_data_path = f"a={tmp_path}/a,b={tmp_path}/b"
    train(config, tmp_path / "out", max_steps=1)
    assert sorted(path.stem for path in (tmp_path / "out" / "reference").iterdir()) == ["train", "validation-a", "validation-b"]
    assert {"val/margin", "val/a/margin", "val/b/margin"} <= metrics_of(tmp_path / "out")[-1].keys()


@pytest.fixture
def stopped_while_scoring(monkeypatch):
    """Scoring ends as with a kill after two batches: nothing more is written."""

    def stop(monkeypatch, after):
        scores = reference.Reference._scores

        def few(self, split, rows, params, first, should_stop):
            for i, log_probs in enumerate(scores(self, split, rows, params, first, should_stop)):
                if i == after:
                    raise KeyboardInterrupt
                yield log_probs

        monkeypatch.setattr(reference.Reference, "_scores", few)

    return stop


def test_a_kill_while_the_reference_is_scored_costs_one_batch(
    preferred, straight, tmp_path, monkeypatch, stopped_while_scoring
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stopped_while_scoring(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train(preferred, out)
    [partial] = (out / "reference").glob("train.*.partial")
    partial.write_bytes(partial.read_bytes() + b"cut short")
    train(preferred, out)
    assert "8 of them are done" in log_of(out)
    assert sorted(path.name for path in (out / "reference").iterdir()) == ["train.npz", "validation.npz"]
    assert_equal_checkpoints(out, straight, 6)


def test_a_signal_while_the_reference_is_scored_is_not_waited_for(preferred, tmp_path, monkeypatch):
    join, out = reference.Reference.join, tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(reference.Reference, "join", lambda self, *args: join(self, *args[:-1], lambda: True))
        assert train(preferred, out) == RESUMABLE
    assert "reference: stopped after" in log_of(out) and not steps_in(out)


@pytest.mark.slow
def test_a_broken_or_lost_reference_is_scored_again_with_the_weights_of_the_start(preferred, straight, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(straight, out)
    shutil.rmtree(out / "checkpoints" / "6"), shutil.rmtree(out / "best")
    content = (out / "reference" / "train.npz").read_bytes()
    (out / "reference" / "train.npz").write_bytes(content[:200] + b"\xff" + content[201:])
    (out / "reference" / "validation.npz").unlink()
    train(preferred, out)
    assert "cannot be read, and is computed again" in log_of(out) and "not an exact continuation" not in log_of(out)
    assert_equal_checkpoints(out, straight, 6)


def test_a_reference_is_never_that_of_other_weights(preferred, straight, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(straight, out)
    shutil.rmtree(out / "checkpoints" / "6"), shutil.rmtree(out / "reference")
    with pytest.raises(UserError, match="training.init_from: not the weights that the run started from"):
        train(preferred, out, init_from=str(straight))
    with pytest.raises(UserError, match="training.init_from: missing, but .*reference' lacks"):
        train(preferred, out, init_from=None)


@pytest.mark.slow
def test_resume_from_takes_the_reference_along(preferred, straight, tmp_path):
    changes = {"init_from": None, "resume_from": str(straight / "checkpoints" / "4")}
    train(preferred, tmp_path / "out", **changes)
    assert saved(tmp_path / "out", 6)[1]["reference"] == saved(straight, 6)[1]["reference"]
    a, b = (saved(run, 6)[0]["params"]["embedding_VD"]["value"] for run in (tmp_path / "out", straight))
    np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["simpo", "orpo"])
def test_without_a_reference_nothing_is_scored(preferred, tmp_path, kind):
    preferred = copy.deepcopy(preferred)
    preferred.loss.kind = kind
    train(preferred, tmp_path / "out", max_steps=2)
    assert not (tmp_path / "out" / "reference").exists()
    metrics = metrics_of(tmp_path / "out")
    assert "dpo/margin" in metrics[0] and "dpo/kl" not in metrics[0]


def test_the_fingerprints_see_every_pair_and_every_weight(preferred):
    rows = open_dataset(preferred.data.train_data_path, "", 32).rows("train")

    class Changed:
        def __len__(self):
            return len(rows)

        def read(self, indices):
            batch = rows.read(indices)
            batch["tokens"][indices == 5, 1, 3] += 1
            return batch

    assert reference.rows_fingerprint(rows) == reference.rows_fingerprint(rows) != reference.rows_fingerprint(Changed())
    weights = {"a": jnp.arange(12.0).reshape(3, 4), "b": jnp.ones(5)}
    found = {reference.weights_fingerprint(w) for w in (
        weights, {**weights, "b": weights["b"].at[2].set(1 + 1e-7)}, {**weights, "a": weights["a"].at[0, :2].set([1, 0])}
    )}  # fmt: skip
    assert len(found) == 3


def test_evaluate_does_not_take_pairs_for_texts(preferred):
    with pytest.raises(UserError, match=r"--data: '.*pairs' holds pairs"):
        held_out.evaluate_run(preferred.training.init_from, [preferred.data.train_data_path], "train")


def test_what_does_not_fit_is_an_error(preferred, base_tiny_config, tmp_path):
    def error_of(config, **changes):
        with pytest.raises(UserError) as caught:
            train(config, tmp_path / "out", **changes)
        assert not (tmp_path / "out" / "config.json").exists()
        return str(caught.value)

    assert error_of(preferred, init_from=None).startswith("training.init_from: missing (loss.kind sigmoid compares")
    pairs_as_texts = copy.deepcopy(base_tiny_config)
    pairs_as_texts.data.train_data_path = preferred.data.train_data_path
    assert "loss.kind: next_token learns from texts, but" in error_of(pairs_as_texts)
    texts_as_pairs = copy.deepcopy(preferred)
    texts_as_pairs.data.train_data_path = base_tiny_config.data.train_data_path
    message = error_of(texts_as_pairs)
    assert "loss.kind: sigmoid learns from pairs, but" in message and "prepare --input preferences.jsonl" in message


@pytest.mark.parametrize(
    "kind, key, value, message",
    [
        ("ipo", "loss.label_smoothing", 0.1, "loss.label_smoothing: has no effect on loss.kind ipo"),
        ("next_token", "loss.sft_coef", 1.0, "loss.sft_coef: has no effect on loss.kind next_token"),
        ("sigmoid", "training.z_loss", 1e-4, "training.z_loss: has no effect on loss.kind sigmoid"),
        ("sigmoid", "loss.label_smoothing", 0.5, "loss.label_smoothing: 0.5 is not possible"),
    ],
)
def test_a_key_without_effect_is_an_error(kind, key, value, message):
    config = config_lib.default_config()
    config.loss.kind = kind
    section, name = key.split(".")
    config[section][name] = value
    with pytest.raises(UserError, match=message):
        config_lib.resolve(config)


@pytest.mark.parametrize("margin, says", [(2e-5, True), (0.02, False)])
def test_a_learning_rate_that_moves_nothing_is_said_once(margin, says, monkeypatch):
    said = []
    monkeypatch.setattr(writers.logging, "warning", lambda text, *values: said.append(text % values))
    watch = writers.MarginWatch()
    for step in (1, 40, 50, 60):
        watch.write_scalars(step, {"dpo/margin": margin, "dpo/kl": 0.0, "lr": 1e-9})
    assert len(said) == says and all(
        "nothing moves: the margin between the rewards is 2.0e-05 after 50 steps" in s for s in said
    )
