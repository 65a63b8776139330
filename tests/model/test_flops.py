import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mateconv_jax import config as config_lib
from mateconv_jax.model import flops
from mateconv_jax.model.config import ModelConfig, ModelOptions
from mateconv_jax.model.transformer import Transformer
from tests import llama


def test_the_base_model_by_hand():
    c = ModelConfig.make(config_lib.options(ModelOptions, config_lib.resolve(config_lib.default_config()).model), "float32")
    norms = (2 * 8 + 1) * 512
    assert flops.training_flops_per_token(c, 512) == 6 * (26_878_464 - norms) + 6 * 8 * 512 * 512


def test_the_compiler_counts_about_the_same():
    """Of the whole square of attention: xla computes it, masked."""
    c = llama.model_config(dim=128, n_heads=4, n_kv_heads=4, n_layers=2, attention="xla")
    graph, params = nnx.split(Transformer(c, nnx.Rngs(0)))
    tokens = jnp.zeros((1, 256), int)
    loss = jax.jit(jax.grad(lambda params: jnp.sum(nnx.merge(graph, params)(tokens))))
    counted = loss.lower(params).compile().cost_analysis()["flops"] / 256
    square = 6 * c.n_layers * 256 * c.n_heads * c.head_dim
    assert counted == pytest.approx(flops.training_flops_per_token(c, 256) + square, rel=0.15)


@pytest.mark.parametrize(
    "kind, dtype, peak",
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12), ("NVIDIA A100-SXM4-40GB", "float16", 312e12), ("NVIDIA L4", "bfloat16", 121e12),
        ("NVIDIA L40S", "bfloat16", 362e12), ("NVIDIA L40", "bfloat16", 181e12), ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA H100 NVL", "bfloat16", 835e12), ("NVIDIA H20", "bfloat16", 148e12), ("NVIDIA GeForce RTX 3090", "bfloat16", 71e12),
        ("NVIDIA RTX A6000", "float16", 154.8e12), ("Tesla V100-SXM2-32GB", "float16", 125e12), ("Tesla T4", "float16", 65e12),
        # Unknown: other cards, parts of cards, other names, other dtypes.
        ("NVIDIA RTX A1000", "bfloat16", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bfloat16", None), ("NVIDIA H100", "bfloat16", None), ("Tesla T4", "bfloat16", None),
        ("NVIDIA H100 PCIe", "float32", None), ("NVIDIA GeForce RTX 3080", "bfloat16", None), ("cpu", "bfloat16", None),
    ],
)  # fmt: skip
def test_peaks(kind, dtype, peak):
    assert flops.peak_flops(kind, jnp.dtype(dtype)) == peak
