"""Training on preferences with all else that training has: on several devices, and killed at random moments."""

import copy
import random
import time

import numpy as np
import pytest

from tests.data.build.preparing import prepare, write_jsonl
from tests.training.processes import Training
from tests.training.runs import assert_equal_checkpoints, flags_of, losses_of, metrics_of, train
from tests.training.test_devices import start, start_two
from tests.training.test_preferences import preferred  # noqa: F401  (a fixture)

pytestmark = pytest.mark.slow


def with_all(config, **changes):
    """Accumulation, EMA, float16 and dropout together."""
    config = copy.deepcopy(config)
    config.model.update(dict(dropout=0.1, attention="xla"))
    config.training.update(
        dict(accumulation_steps=2, dtype="float16", use_ema=True, ema_decay=0.9, max_steps=12, save_interval=1)
    )
    config.training.update(dict(eval_interval=4, eval_iters=5) | changes)
    return config


def test_killed_at_random_moments_it_loses_nothing(server, preferred, dataset_folder, tmp_path):  # noqa: F811
    """In the pass of the reference, too: 1,500 pairs, one a batch, make that long."""
    records = [{"prompt": f"{i}？", "chosen": "好。", "rejected": "不好。"} for i in range(1500)]
    flags = ("--tokenizer", dataset_folder / "tokenizer", "--seq_len", 32, "--val_fraction", "0.05")
    prepare(write_jsonl(tmp_path / "raw.jsonl", records), tmp_path / "pairs", *flags)
    config = with_all(preferred, batch_size=1)
    config.data.train_data_path = str(tmp_path / "pairs")
    Training(flags_of(config, tmp_path / "straight"), tmp_path / "log").finish()
    rng = random.Random(0)
    in_reference = 0
    for i in range(20):
        training = Training(flags_of(config, tmp_path / "out"), tmp_path / f"log{i}")
        training.wait_for("reference: scoring" if i < 6 else rng.choice(["start: ", "accuracy"]), done_is_fine=i >= 6)
        time.sleep(rng.random() * (1 if i < 6 else 0.2))
        training.process.kill()
        training.process.join()
        in_reference += bool(list((tmp_path / "out").glob("reference/*.partial")))
    Training(flags_of(config, tmp_path / "out"), tmp_path / "log").finish()
    for step in (10, 12):
        assert_equal_checkpoints(tmp_path / "out", tmp_path / "straight", step)
    assert losses_of(tmp_path / "out") == losses_of(tmp_path / "straight")
    for split in ("train", "validation"):
        a, b = (np.load(tmp_path / run / "reference" / f"{split}.npz")["log_probs"] for run in ("out", "straight"))
        np.testing.assert_array_equal(a, b)
    assert in_reference >= 3


@pytest.mark.parametrize("flags", [("--config.mesh.fsdp=8",), ("--config.mesh.data=2", "--config.mesh.fsdp=4")])
def test_eight_devices_give_the_losses_of_one(server, preferred, tmp_path, flags):  # noqa: F811
    config = copy.deepcopy(preferred)
    config.training.update(dict(batch_size=8, accumulation_steps=2, use_ema=True))
    start(config, tmp_path / "one", 1).finish()
    start(config, tmp_path / "eight", 8, flags, "log8").finish()
    ours, theirs = (losses_of(tmp_path / name) for name in ("eight", "one"))
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert ours[key] == pytest.approx(theirs[key], abs=2e-5), key


def test_two_processes_share_one_reference(server, preferred, tmp_path):  # noqa: F811
    """They stop and go on, too: the first reads what is there, for both."""
    config = copy.deepcopy(preferred)
    config.training.update(dict(batch_size=8, accumulation_steps=2))
    start(config, tmp_path / "one", 1).finish()
    for flags in (("--config.training.max_steps=2",), ()):
        for process in start_two(config, tmp_path / "two" / "out", flags):
            process.finish()
    scores = [np.load(run / "reference" / "train.npz")["log_probs"] for run in (tmp_path / "one", tmp_path / "two" / "out")]
    np.testing.assert_allclose(*scores, rtol=1e-5)
    ours, theirs = losses_of(tmp_path / "two" / "out"), losses_of(tmp_path / "one")
    assert ours[1, "train/loss"] == pytest.approx(theirs[1, "train/loss"], abs=1e-5)


@pytest.mark.parametrize(
    "kind, dtype", [("sigmoid", "float16"), ("ipo", "float16"), ("simpo", "float16"), ("sigmoid", "bfloat16")]
)
def test_half_precision_learns_as_float32_does(preferred, tmp_path, kind, dtype):  # noqa: F811
    config = copy.deepcopy(preferred)
    config.loss.kind = kind
    losses = {}
    for name in ("float32", dtype):
        train(config, tmp_path / name, dtype=name, max_steps=8, eval_interval=8)
        losses[name] = [m["train/loss"] for m in metrics_of(tmp_path / name) if "train/loss" in m]
    assert losses["float32"][-1] < 0.995 * losses["float32"][0]
    np.testing.assert_allclose(losses[dtype], losses["float32"], rtol=0.03)


def test_experts_learn_preferences(preferred, base_tiny_config, tmp_path):  # noqa: F811
    start_from = copy.deepcopy(base_tiny_config)
    start_from.model.update(dict(n_layers=1, use_moe=True))
    train(start_from, tmp_path / "start", max_steps=4, eval_interval=99)
    config = copy.deepcopy(preferred)
    train(config, tmp_path / "out", init_from=str(tmp_path / "start"), learning_rate=3e-3)
    first, *_, last = [m for m in metrics_of(tmp_path / "out") if "train/loss" in m]
    assert first["train/loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert last["train/loss"] < 0.6 and 0 < last["experts/entropy"] <= np.log(4) and last["train/auxiliary_loss"] > 0
