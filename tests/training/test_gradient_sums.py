import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mateconv_jax.training import gradient_sums, norms

ROOT = Path(__file__).parents[2]

# The first update of a small model, by devices, FSDP and dtype of the sums: loss, gradient norm, norms by leaf.
CODE = """
import json, jax, numpy as np
from mateconv_jax import config as config_lib
from mateconv_jax.runtime import sharding
from mateconv_jax.training import gradient_sums, setup
gradient_sums.BUCKET_BYTES = 100_000  # several of them
tokens = np.random.default_rng(0).integers(0, 256, (2, 8, 33), np.uint16)
lengths = np.full((2, 8), 33, np.int32); lengths[0, 0] = 5; lengths[1, 7] = 0
for devices, fsdp, dtype in [(1, 1, "float32"), (4, 1, "float32"), (4, 1, "bfloat16"), (4, 2, "float32"), (4, 4, "bfloat16")]:
    config = config_lib.default_config()
    config.mesh.fsdp = fsdp
    config.model.update(dict(dim=128, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=256, max_seq_len=32))
    config.data.seq_len = 32
    config.training.update(dict(batch_size=8, accumulation_steps=2, grad_allreduce_dtype=dtype, dtype="float32"))
    config.training.update(dict(learning_rate=1e-3, warmup_steps=0, lr_scheduler="constant"))
    config = config_lib.resolve(config)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, jax.devices()[:devices])
    programs = setup.build(config, setup.model_config(config), mesh, total_steps=1)
    _, metrics = programs.train_step(programs.fresh_state(), sharding.to_devices({"tokens": tokens, "length": lengths}, mesh, rows_axis=1))
    print(json.dumps([float(metrics["train/loss"]), float(metrics["update_to_weight"]), *metrics["leaf_norms"].tolist()]))
"""


@pytest.mark.slow  # test_any_loss trains on 8 devices too
def test_gradients_are_those_of_one_device_and_the_dtype_of_their_sum_matters():
    """Rows of different lengths, two micro-batches, whole and split parameters."""
    env = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"}
    output = subprocess.run([sys.executable, "-c", CODE], env=env, cwd=ROOT, capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    one, whole, whole_half, split, split_half = np.array([json.loads(line) for line in output.stdout.splitlines()])
    for exact in (whole, split):
        np.testing.assert_allclose(exact, one, rtol=2e-5)
    for half in (whole_half, split_half):
        assert half[0] == one[0] or abs(half[0] - one[0]) < 1e-5  # the loss is always a sum in fp32
        np.testing.assert_allclose(half[2:], one[2:], rtol=1e-2)
        assert np.abs(half[2:] / one[2:] - 1).max() > 1e-4


def test_buckets_are_cut_where_they_are_full(monkeypatch):
    monkeypatch.setattr(gradient_sums, "BUCKET_BYTES", 10)
    assert gradient_sums.buckets(list("abcdef"), [4, 7, 10, 3, 3, 3]) == [["a", "b"], ["c"], ["d", "e", "f"]]
    assert gradient_sums.buckets([], []) == []


def test_norms_of_many_leaves_equal_numpys():
    shapes = [(3, 40, 8), (5,), (3, 40, 8), (40, 8), (5,), (2, 17)]
    tree = {str(i): jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)}
    by_hand = [float(np.sum(np.square(np.asarray(x, np.float64)))) for x in tree.values()]
    np.testing.assert_allclose(norms.squares_by_leaf(tree), by_hand, rtol=1e-5)
    assert abs(float(norms.global_norm(tree)) / sum(by_hand) ** 0.5 - 1) < 1e-5
    assert abs(float(norms.norm_beside(tree)) / sum(by_hand) ** 0.5 - 1) < 1e-5
    broken = norms.squares_by_leaf(tree | {"1": jnp.full(5, jnp.nan)})
    assert np.isnan(broken).tolist() == [False, True, False, False, False, False]
