"""The step trains whatever loss it is given."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]

# Pairs of rows, of which one is to become likelier than the other by a margin; noise from the rows' keys.
CODE = """
import dataclasses, json, jax, jax.numpy as jnp, numpy as np
from mateconv_jax import config as config_lib
from mateconv_jax.losses.loss_output import LossOutput
from mateconv_jax.runtime import sharding
from mateconv_jax.training import objective, setup

def toy_loss(model, batch, key_B):
    def score_B(tokens_BS):
        log_probs_BSV = jax.nn.log_softmax(model(tokens_BS[:, :-1]))
        return jnp.mean(jnp.take_along_axis(log_probs_BSV, tokens_BS[:, 1:, None], axis=2), axis=(1, 2))
    noise_B = 0 if key_B is None else 0.1 * jax.vmap(jax.random.normal)(key_B)
    margin_B = score_B(batch["better"]) - score_B(batch["worse"]) - batch["margin"] + noise_B
    weight_B = batch["weight"]
    loss = jnp.sum(weight_B * jax.nn.softplus(-margin_B))
    return LossOutput(loss, jnp.sum(weight_B), loss, {"train/accuracy": jnp.sum(weight_B * (margin_B > 0))})

sharding.MIN_SHARDED_SIZE = 64
random = np.random.default_rng(0)
batches = [{
    "better": random.integers(0, 32, (2, 8, 9)), "worse": random.integers(32, 64, (2, 8, 12)),
    "margin": random.random((2, 8), np.float32), "weight": random.integers(0, 4, (2, 8)).astype(np.float32),
} for _ in range(4)]
for devices, fsdp in [(1, 1), (8, 4)]:
    config = config_lib.default_config()
    config.mesh.fsdp = fsdp
    config.model.update(dict(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=64, max_seq_len=16))
    config.data.seq_len = 16
    config.training.update(dict(batch_size=8, accumulation_steps=2, learning_rate=0.3, warmup_steps=0, use_ema=True))
    config.training.update(dict(optimizer_type="adafactor", dtype="float32", seed=0))
    config = config_lib.resolve(config)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, jax.devices()[:devices])
    toy = dataclasses.replace(objective.of(config), loss_fn=toy_loss)
    programs = setup.build(config, setup.model_config(config), mesh, len(batches), toy)
    state = programs.fresh_state()
    figures = []
    for batch in batches:
        state, metrics = programs.train_step(state, sharding.to_devices(batch, mesh, rows_axis=1))
        figures += [float(metrics["train/loss"]), float(metrics["train/accuracy"]), *metrics["leaf_norms"].tolist()]
    rows = sharding.to_devices({name: values[0] for name, values in batches[0].items()}, mesh)
    total, weight, metrics = programs.eval_step(state.params, rows)
    figures += [float(total), float(weight), float(metrics["train/accuracy"])]
    split = [p.addressable_shards[0].data.size < p.size for p in jax.tree.leaves(state.params)]
    whole = np.concatenate([np.ravel(p) for p in jax.tree.leaves(jax.device_get(state.params))])
    print(json.dumps([sum(split), figures, whole.tolist()]))
"""


@pytest.fixture(scope="module")
def runs():
    """On one device, and on 8: two groups, each of which splits the parameters in four."""
    env = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"}
    output = subprocess.run([sys.executable, "-c", CODE], env=env, cwd=ROOT, capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    return [json.loads(line) for line in output.stdout.splitlines()]


@pytest.mark.slow
def test_a_loss_on_other_fields_is_trained_on_8_devices_as_on_one(runs):
    """Micro-batches of different weight, a key a row, four steps: losses, metrics, gradient norms, parameters."""
    (_, figures, params), (n_split, figures_of_8, params_of_8) = runs
    assert n_split == 5
    np.testing.assert_allclose(figures_of_8, figures, rtol=1e-4)
    np.testing.assert_allclose(params_of_8, params, atol=1e-5)
    losses = figures[:-3:10]
    assert losses[-1] < 0.9 * losses[0]
