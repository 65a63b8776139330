"""Several devices and several processes, simulated on the CPU: the same losses as one."""

import copy
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mateconv_jax import config as config_lib, run_folder
from mateconv_jax.errors import UserError
from mateconv_jax.runtime import sharding
from mateconv_jax.training.preemption import RESUMABLE
from tests.training.processes import Training
from tests.training.runs import flags_of, losses_of, metrics_of

ROOT = Path(__file__).parents[2]


def start(config, out_dir, devices, flags=(), log="log", prepare=None, **environment):
    out_dir.parent.mkdir(exist_ok=True)
    environment["XLA_FLAGS"] = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return Training([*flags_of(config, out_dir), *flags], out_dir.parent / log, environment, prepare=prepare)


def start_two(config, out_dir, flags=(), prepare=(None, None), devices=4):
    """Two processes of four devices, joined over loopback. prepare: see Training."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [
        start(
            config, out_dir, devices, flags, f"log{index}", prepare[index],
            JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(index),
        )
        for index in range(2)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def config(server, base_tiny_config):
    """Wide enough that FSDP splits its matrices."""
    config = copy.deepcopy(base_tiny_config)
    config.model.dim = 128
    config.training.update(dict(learning_rate=3e-3, use_ema=True))
    return config


@pytest.fixture(scope="module")
def one(config, tmp_path_factory):
    """The run of one device."""
    folder = tmp_path_factory.mktemp("one") / "out"
    start(config, folder, 1).finish()
    return folder


def assert_same_losses(folder, one):
    ours, theirs = losses_of(folder), losses_of(one)
    assert ours.keys() == theirs.keys() and len(ours) == 10
    for key in ours:
        assert ours[key] == pytest.approx(theirs[key], abs=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--config.mesh.fsdp=8",),
        ("--config.mesh.data=2", "--config.mesh.fsdp=-1"),
    ],
)
@pytest.mark.slow
def test_eight_devices_give_the_losses_of_one(config, one, tmp_path, flags):
    log = start(config, tmp_path / "out", 8, flags).finish()
    assert "devices: 1 process x 8 cpu, 1 rows each" in log
    assert_same_losses(tmp_path / "out", one)


@pytest.mark.slow
def test_what_a_row_drops_does_not_depend_on_the_devices_or_processes(config, tmp_path):
    flags = ("--config.model.dropout=0.3", "--config.training.accumulation_steps=2", "--config.training.max_steps=4")
    for devices in (1, 8):
        start(config, tmp_path / str(devices), devices, flags).finish()
    for training in start_two(config, tmp_path / "two", flags):
        training.finish()
    losses = losses_of(tmp_path / "1")
    assert losses and losses_of(tmp_path / "8") == pytest.approx(losses, abs=1e-5)
    assert losses_of(tmp_path / "two") == pytest.approx(losses, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("experts", ["dense", "ragged"])
def test_a_mixture_of_experts_is_split_over_devices_and_learns_the_same(config, tmp_path, experts):
    flags = ("--config.model.use_moe=True", f"--config.model.experts={experts}", "--config.training.dtype=float32")
    start(config, tmp_path / "one", 1, flags).finish()
    start(config, tmp_path / "eight", 8, (*flags, "--config.mesh.fsdp=4")).finish()
    lines = zip(metrics_of(tmp_path / "one"), metrics_of(tmp_path / "eight"), strict=True)
    for one, eight in lines:
        for key in ("train/loss", "train/auxiliary_loss", "val/loss", "experts/entropy", "experts/most_loaded"):
            assert one.get(key) == pytest.approx(eight.get(key), abs=1e-5)


def test_two_processes_give_the_losses_of_one_and_the_first_alone_writes(config, one, tmp_path):
    errors = [training.finish() for training in start_two(config, tmp_path / "out")]
    assert "devices: 2 processes x 4 cpu, 1 rows each" in errors[0] and "devices:" not in errors[1]
    assert_same_losses(tmp_path / "out", one)
    assert len(metrics_of(tmp_path / "out")) == 8 and len(list((tmp_path / "out" / "tensorboard").iterdir())) == 1


@pytest.fixture(scope="module")
def eight(config, tmp_path_factory):
    """The run of eight devices, with a checkpoint at every step."""
    folder = tmp_path_factory.mktemp("eight") / "out"
    flags = ("--config.training.save_interval=1", "--config.training.keep_latest=9", "--config.mesh.fsdp=4")
    start(config, folder, 8, flags).finish()
    return folder


@pytest.mark.parametrize("devices", [1, 4, (2, 4)])
@pytest.mark.slow
def test_saved_on_eight_devices_it_goes_on_on_others(config, one, eight, tmp_path, devices):
    assert_same_losses(eight, one)
    flags = [f"--config.training.resume_from={eight}/checkpoints/2"]
    if devices == (2, 4):
        for training in start_two(config, tmp_path / "out", flags):
            training.finish()
    else:
        start(config, tmp_path / "out", devices, [*flags, f"--config.mesh.fsdp={min(devices, 2)}"]).finish()
    ours, theirs = losses_of(tmp_path / "out"), losses_of(one)
    assert {step for step, _ in ours} == {3, 4, 5, 6}
    for key in ours:
        assert ours[key] == pytest.approx(theirs[key], abs=1e-5)


@pytest.mark.slow
def test_a_sigterm_of_one_process_checkpoints_all(config, tmp_path):
    long = ("--config.training.max_steps=100000", "--config.training.lr_scheduler=constant")
    first, second = start_two(config, tmp_path / "out", long)
    first.wait_for("  loss ")
    os.kill(second.process.pid, signal.SIGTERM)
    for training in (first, second):
        training.finish(RESUMABLE)
    step = run_folder.latest_step(tmp_path / "out")
    assert step is not None and step >= metrics_of(tmp_path / "out")[-1]["step"]


# ---- rules ------------------------------------------------------------------------------------------------------------------


class Mesh:
    def __init__(self, fsdp):
        self.shape = {"data": 8 // fsdp, "fsdp": fsdp}


def test_what_is_split_over_fsdp(monkeypatch):
    monkeypatch.setattr(sharding, "NamedSharding", lambda mesh, spec: spec)
    monkeypatch.setattr(jax, "ShapeDtypeStruct", lambda shape, dtype, sharding: sharding)
    monkeypatch.setattr(sharding.jax, "ShapeDtypeStruct", lambda shape, dtype, sharding: sharding)
    tree = [np.zeros((512, 2, 1408), np.float32), np.zeros((6400, 512)), np.zeros((512,)), np.int32(0), np.zeros((1001, 999))]
    specs = sharding.with_shardings(Mesh(8), tree)
    whole = PartitionSpec()
    assert specs == [PartitionSpec("fsdp"), PartitionSpec("fsdp"), whole, whole, whole]
    assert sharding.with_shardings(Mesh(1), tree) == [whole] * 5


@pytest.mark.parametrize("data, fsdp", [(3, 1), (-1, 3), (2, 2), (-1, -1)])
def test_axes_that_are_not_the_devices(monkeypatch, data, fsdp):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    config = config_lib.default_config()
    config.mesh.update(dict(data=data, fsdp=fsdp))
    with pytest.raises(UserError, match="mesh.data, mesh.fsdp: .* does not match the 8 devices"):
        sharding.make_mesh(config.mesh.data, config.mesh.fsdp)


@pytest.mark.slow
def test_fsdp_takes_less_memory_a_device():
    code = """
import json, sys, jax
from mateconv_jax import config as config_lib
from mateconv_jax.runtime import sharding
from mateconv_jax.model.config import ModelConfig, ModelOptions
from mateconv_jax.model.transformer import abstract_model
from mateconv_jax.training import optimizer, train_state
from mateconv_jax.training.step import make_train_step
from mateconv_jax.losses.next_token import next_token_loss
result = {}
for fsdp in (1, 8):
    config = config_lib.default_config()
    config.mesh.fsdp = fsdp
    config.model.update(dict(dim=256, n_layers=2))
    config = config_lib.resolve(config)
    c = ModelConfig.make(config_lib.options(ModelOptions, config.model), "float32")
    tx = optimizer.make_optimizer(config.training, c)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    state = sharding.with_shardings(mesh, jax.eval_shape(lambda: train_state.init(c, tx, 0, True)))
    step = make_train_step(abstract_model(c)[0], next_token_loss, tx, lambda step: 1e-3, config.training, abstract_state=state)
    rows = sharding.batch(mesh, 1)
    batch = {"tokens": jax.ShapeDtypeStruct((1, 8, 33), "uint16", sharding=rows), "length": jax.ShapeDtypeStruct((1, 8), "int32", sharding=rows)}
    memory = step.lower(state, batch).compile().memory_analysis()
    result[fsdp] = [memory.argument_size_in_bytes, memory.alias_size_in_bytes]
print(json.dumps(result))
"""
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    output = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True)
    result = json.loads(output.stdout.splitlines()[-1])
    whole, split = result["1"], result["8"]
    assert split[0] < whole[0] / 7  # parameters, EMA and both moments: an eighth, but for the norms
    assert whole[1] > 0.99 * whole[0] and split[1] > 0.95 * split[0]  # all of it donated
