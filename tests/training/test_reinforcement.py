"""Learning from reward, from the prompts' file to the checkpoint."""

import copy
import json
import os
import signal

import jax
import numpy as np
import pytest

from mateconv_jax import config as config_lib, run_folder
from mateconv_jax.errors import UserError
from mateconv_jax.model.transformer import abstract_model
from mateconv_jax.training import rewards, rollout_batches, setup
from mateconv_jax.training.preemption import RESUMABLE
from tests.training.processes import Training
from tests.training.runs import assert_equal_checkpoints, flags_of, metrics_of, saved, steps_in, train

FUNCTIONS = "tests.training.reward_functions"


@pytest.fixture(scope="session")
def reward_config(base_tiny_config, dataset_folder, tmp_path_factory):
    """32 answers a step, 4 to each of 8 prompts, in two micro-batches; two steps for each rollout; KL; EMA."""
    folder = tmp_path_factory.mktemp("prompts")
    questions = ["熊猫最爱吃什么？", "草莓是什么颜色？", "法国的首都是哪里？", "兔子住在哪里？"]
    lines = [{"prompt": [{"role": "user", "content": text}], "n": n} for n in range(5) for text in questions]
    for name, chosen in (("train", lines), ("val", lines[:6])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in chosen))
    start = copy.deepcopy(base_tiny_config)
    train(start, folder / "start", max_steps=1, eval_interval=100)
    config = copy.deepcopy(base_tiny_config)
    config.loss.update(dict(kind="grpo", beta=0.1))
    config.rollout.update(dict(samples=4, max_new_tokens=14, iterations=2))
    config.reward.update(
        dict(functions=(f"{FUNCTIONS}:variety", f"{FUNCTIONS}:even_length"), weights=(1.0, 0.5), num_threads=2)
    )
    config.data.update(dict(train_data_path=str(folder / "train.jsonl")))
    config.training.update(
        dict(batch_size=16, accumulation_steps=2, max_steps=5, use_ema=True, init_from=str(folder / "start"))
    )
    config.training.update(dict(save_interval=1, keep_latest=99))
    return config


@pytest.fixture(scope="module")
def run(reward_config, tmp_path_factory):
    """5 steps, over the end of an epoch of 20 prompts; which step, if any, compiled after the second rollout."""
    folder, compiled = tmp_path_factory.mktemp("reward") / "out", []
    roll_out = rollout_batches.RolloutBatches._roll_out
    rolled_out = []

    def count(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration" and len(rolled_out) > 1:
            compiled.append(len(rolled_out))

    def counted(self, step, params):
        rolled_out.append(step)
        return roll_out(self, step, params)

    jax.monitoring.register_event_duration_secs_listener(count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout_batches.RolloutBatches, "_roll_out", counted)
        assert train(reward_config, folder) == 0
    assert rolled_out == [0, 2, 4]
    return folder, compiled


def test_nothing_is_compiled_after_the_first_rollout_and_its_steps(run):
    assert run[1] == []


def test_a_run_reports_what_it_did(run):
    steps = [m for m in metrics_of(run[0]) if "train/loss" in m]
    for m in steps:
        assert m["grpo/reward"] == pytest.approx(m["reward/variety"] + 0.5 * m["reward/even_length"], rel=1e-6)
        assert (
            0 < m["grpo/length"] <= 14 and m["grpo/entropy"] > 1 and m["grpo/unrewarded"] == 0 and m["grpo/dropped_groups"] < 8
        )
        assert all(m[f"grpo/seconds_{what}"] >= 0 for what in ("rollout", "reward", "update"))
    assert steps[0]["grpo/kl"] == pytest.approx(0, abs=1e-9) and steps[1]["grpo/kl"] > 1e-6
    assert steps[0]["grpo/clip_share"] == 0 and steps[0]["grpo/reward"] == steps[1]["grpo/reward"]


@pytest.mark.slow
def test_validation_is_the_mean_reward_and_answers_are_shown(reward_config, tmp_path):
    config = copy.deepcopy(reward_config)
    config.data.val_data_path = config.data.train_data_path.replace("train", "val")
    train(config, tmp_path / "out", max_steps=2, eval_interval=2, samples_interval=2)
    val = next(m for m in metrics_of(tmp_path / "out") if "val/reward" in m)
    assert val["val/loss"] < 0 and val["val/reward"] == pytest.approx(-val["val/ema_loss"])
    log = (tmp_path / "out" / "train.log").read_text()
    assert "sample of step 2: " in log and "[reward " in log
    assert saved(tmp_path / "out", 2)[1]["best_loss"] == val["val/ema_loss"]


@pytest.mark.slow
def test_a_run_stopped_between_two_steps_of_a_rollout_goes_on_to_the_bit(reward_config, run, tmp_path):
    """Stopped by SIGTERM in the rollout after step 2, and between the two steps that learn from it."""
    score, calls = rewards.Rewards._score, []

    def stops(self, *args):
        calls.append(1)
        if len(calls) == 17:  # 8 prompts and two functions a rollout
            os.kill(os.getpid(), signal.SIGTERM)
        return score(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards.Rewards, "_score", stops)
        assert train(reward_config, tmp_path / "out") == RESUMABLE
    assert steps_in(tmp_path / "out")[-1] == 2
    train(reward_config, tmp_path / "out")
    assert_equal_checkpoints(tmp_path / "out", run[0], 5)
    for step in (4, 5):  # as if killed right after step 3
        (tmp_path / "out" / "checkpoints" / str(step)).rename(tmp_path / str(step))
    train(reward_config, tmp_path / "out")
    assert_equal_checkpoints(tmp_path / "out", run[0], 5)
    assert "not an exact continuation" not in (tmp_path / "out" / "train.log").read_text()


def killed(config, folder, where, at):
    """Train in a process that ends itself in its at-th call of a reward function, or its at-th rollout."""
    log = folder.parent / "log"
    Training(flags_of(config, folder), log, {f"MATECONV_KILL_{where}": str(at)}).finish(-signal.SIGKILL)


@pytest.mark.slow
def test_a_run_killed_in_a_reward_function_and_in_a_rollout_ends_with_the_same_bits(reward_config, run, server, tmp_path):
    killed(reward_config, tmp_path / "out", "REWARD", 12)
    killed(reward_config, tmp_path / "out", "ROLLOUT", 2)
    Training(flags_of(reward_config, tmp_path / "out"), tmp_path / "log").finish()
    assert_equal_checkpoints(tmp_path / "out", run[0], 5)


@pytest.mark.slow
def test_20_kills_anywhere(reward_config, server, tmp_path):
    """At random calls of a reward function, 10 ms into a rollout, or whenever."""
    config = copy.deepcopy(reward_config)
    config.training.update(dict(max_steps=40, lr_scheduler="constant"))
    Training(flags_of(config, tmp_path / "straight"), tmp_path / "log").finish()
    random = np.random.default_rng(0)
    for kill in range(20):
        where = ("REWARD", "ROLLOUT", "")[kill % 3]
        environment = {f"MATECONV_KILL_{where}": str(1 if where == "ROLLOUT" else random.integers(1, 20))} if where else {}
        training = Training(flags_of(config, tmp_path / "out"), tmp_path / "log", environment)
        if where:
            training.finish(-signal.SIGKILL)
        else:
            training.wait_for("start: ")
            training.process.join(random.uniform(0, 3))
            training.process.kill()
            training.process.join()
    Training(flags_of(config, tmp_path / "out"), tmp_path / "log").finish()
    assert_equal_checkpoints(tmp_path / "out", tmp_path / "straight", 40)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 4])
def test_on_8_devices_the_answers_are_those_of_one(reward_config, server, tmp_path, fsdp):
    config = copy.deepcopy(reward_config)
    config.training.update(dict(batch_size=32, accumulation_steps=1, max_steps=4))
    Training(flags_of(config, tmp_path / "one"), tmp_path / "log").finish()
    config.mesh.fsdp = fsdp
    on_8 = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"}
    output = Training(flags_of(config, tmp_path / "eight"), tmp_path / "log", on_8).finish()
    assert "devices: 1 process x 8 cpu" in output
    for one, eight in zip(metrics_of(tmp_path / "one"), metrics_of(tmp_path / "eight"), strict=True):
        for name in ("grpo/reward", "grpo/length", "reward/variety", "grpo/entropy", "train/loss", "grpo/kl"):
            assert one[name] == pytest.approx(eight[name], abs=1e-4)
    abstract = abstract_model(setup.model_config(config_lib.resolve(config)))[1]
    one, eight = (run_folder.load_params(tmp_path / name / "checkpoints" / "4", abstract, False) for name in ("one", "eight"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), one, eight)


@pytest.mark.slow
def test_rewards_move_the_policy(reward_config, tmp_path):
    """Half of the vocabulary becomes likelier; without KL, one step for each rollout."""
    config = copy.deepcopy(reward_config)
    config.loss.update(dict(kind="dapo", beta=0.0))
    config.rollout.update(dict(iterations=1, samples=8))
    config.reward.update(dict(functions=(f"{FUNCTIONS}:low_ids",), weights=()))
    train(config, tmp_path / "out", max_steps=15, warmup_steps=0, learning_rate=0.01, lr_scheduler="constant")
    rewards_of_steps = [m["grpo/reward"] for m in metrics_of(tmp_path / "out") if "grpo/reward" in m]
    assert np.mean(rewards_of_steps[-3:]) > rewards_of_steps[0] + 0.1


@pytest.mark.parametrize(
    "section, changes, message",
    [
        ("training", dict(batch_size=14), "training.batch_size: 14 answers are not a multiple of rollout.samples"),
        ("rollout", dict(max_new_tokens=40), "rollout.max_new_tokens: 40 leaves no room for a prompt in data.seq_len .32"),
        ("rollout", dict(max_new_tokens=30), r"data.train_data_path: no prompt in .* \(longer than 3 tokens"),
        ("training", dict(init_from=None), "data.tokenizer_path: missing .the run starts from no model"),
        ("training", dict(z_loss=0.1), "training.z_loss: has no effect on loss.kind grpo"),
        ("data", dict(train_data_path=None), "data.train_data_path: missing .expected a JSONL file of prompts"),
    ],
)
def test_what_does_not_fit(reward_config, tmp_path, section, changes, message):
    config = copy.deepcopy(reward_config)
    config[section].update(changes)
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / "out")
