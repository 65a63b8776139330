import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from mateconv_jax import config as config_lib
from mateconv_jax.model.config import ModelConfig, ModelOptions
from mateconv_jax.model.kv_cache import make_kv_cache
from mateconv_jax.model.transformer import Transformer, abstract_model
from tests import llama


def make_model(seed=0, scale=3.0, **changes) -> Transformer:
    """Weights larger than at initialisation, so that attention is far from uniform."""
    graph, params = nnx.split(Transformer(llama.model_config(**changes), nnx.Rngs(seed)))
    return nnx.merge(graph, jax.tree.map(lambda p: p * scale if p.ndim > 1 else p + 0.1 * jnp.arange(p.size) / p.size, params))


@nnx.jit
def logits(model, tokens_BS):
    return model(tokens_BS)


def random_tokens(shape, seed=0, vocab_size=96):
    return jax.random.randint(jax.random.key(seed), shape, 0, vocab_size)


def test_the_base_model_has_26878464_parameters():
    config = config_lib.resolve(config_lib.default_config())
    _, params = abstract_model(ModelConfig.make(config_lib.options(ModelOptions, config.model), "float32"))
    assert sum(p.size for p in jax.tree.leaves(params)) == 26_878_464


@pytest.mark.parametrize("attention", ["blocked", "xla"])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4, 8])
def test_logits_equal_transformers_llama(n_kv_heads, attention):
    model = make_model(n_kv_heads=n_kv_heads, attention=attention)
    tokens_BS = random_tokens((2, 150))
    with torch.no_grad():
        theirs = llama.from_ours(model)(torch.tensor(np.asarray(tokens_BS))).logits.numpy()
    ours = np.asarray(logits(model, tokens_BS))
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_initialisation_scales_wo_and_w3():
    model = Transformer(llama.model_config(n_layers=8, dim=256), nnx.Rngs(0))
    block = model.blocks[3]
    w1_FD, w3_FD = block.feed_forward.w13_2FD[...]
    assert float(jnp.std(model.embedding_VD[...])) == pytest.approx(0.02, rel=0.05)
    assert float(jnp.std(block.attention.wqkv_JND[...])) == pytest.approx(0.02, rel=0.05)
    assert float(jnp.std(block.attention.wo_DHN[...])) == pytest.approx(0.02 / 4, rel=0.05)
    assert float(jnp.std(w1_FD)) == pytest.approx(0.02, rel=0.05)
    assert float(jnp.std(w3_FD)) == pytest.approx(0.02 / 4, rel=0.05)
    assert float(jnp.std(block.feed_forward.w2_DF[...])) == pytest.approx(0.02, rel=0.05)


def test_no_logit_depends_on_a_later_token():
    model = make_model()
    graph, params = nnx.split(model)
    tokens_S = random_tokens((12,))

    def logit_sums(embedded_SV):
        """Logits of each position as a function of one-hot inputs."""
        embedding_VD = params["embedding_VD"][...]
        swapped = nnx.merge(graph, params)
        swapped.embedding_VD = nnx.Param(jnp.concatenate([embedded_SV @ embedding_VD, embedding_VD]))
        return swapped(jnp.arange(12)[None])[0, :, 12:].sum(-1)

    influence_SS = np.abs(np.asarray(jax.jit(jax.jacobian(logit_sums))(jax.nn.one_hot(tokens_S, 96)))).sum(-1)
    assert (influence_SS[np.triu_indices(12, 1)] == 0).all()
    assert (influence_SS[np.tril_indices(12)] > 0).all()


def test_cached_decoding_equals_the_full_forward_at_every_position():
    model = make_model()
    tokens_BS = random_tokens((2, 40))
    full_BSV = np.asarray(logits(model, tokens_BS))
    kv_cache = make_kv_cache(model.c, 2, 48)
    # Prompts of 5 and 9 tokens in a bucket of 16, then token by token, each row at its own position.
    start_B = jnp.array([5, 9])
    is_prompt_BP = jnp.arange(16) < start_B[:, None]
    step = nnx.jit(lambda model, *args: model.cached(*args))
    logits_BV, kv_cache = step(model, jnp.where(is_prompt_BP, tokens_BS[:, :16], 0), jnp.zeros(2, int), start_B - 1, kv_cache)
    np.testing.assert_allclose(logits_BV, full_BSV[[0, 1], [4, 8]], atol=1e-4)
    for i in range(31):
        at_B = start_B + i
        tokens_B1 = tokens_BS[jnp.arange(2), at_B][:, None]
        logits_BV, kv_cache = step(model, tokens_B1, at_B, jnp.zeros(2, int), kv_cache)
        np.testing.assert_allclose(logits_BV, full_BSV[[0, 1], np.asarray(at_B)], atol=1e-4)


def test_a_row_does_not_depend_on_its_batch():
    model = make_model()
    tokens_BS = random_tokens((4, 30))
    np.testing.assert_allclose(logits(model, tokens_BS)[2], logits(model, tokens_BS[2:3])[0], atol=1e-5)


def test_bfloat16_computes_in_bfloat16_from_float32_parameters():
    model = make_model(scale=1.0, dtype=jnp.dtype("bfloat16"), attention="xla")
    tokens_BS = random_tokens((2, 20))
    halves = logits(model, tokens_BS)
    assert halves.dtype == jnp.bfloat16 and model.embedding_VD[...].dtype == jnp.float32
    reference = logits(make_model(scale=1.0), tokens_BS)
    np.testing.assert_allclose(halves.astype(jnp.float32), reference, atol=0.02)


@pytest.mark.parametrize("dtype, precisions", [("float32", {"[HIGHEST, HIGHEST]"}), ("bfloat16", {"[DEFAULT, DEFAULT]"})])
def test_float32_means_float32(dtype, precisions):
    """At default precision, NVIDIA GPUs round fp32 operands to TF32: in the model, in its gradient, and in decoding."""
    c = dataclasses.replace(llama.model_config(attention="xla"), dtype=jnp.dtype(dtype), platform="gpu")
    graph, params = abstract_model(c)
    tokens_BS, last_B = jax.ShapeDtypeStruct((2, 64), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)

    def loss(params, tokens_BS):
        return jnp.sum(nnx.merge(graph, params)(tokens_BS).astype(jnp.float32))

    def decode(params, tokens_BS, last_B):
        return nnx.merge(graph, params).cached(tokens_BS, last_B, last_B, make_kv_cache(c, 2, 128))

    for lowered in (jax.jit(jax.grad(loss)).lower(params, tokens_BS), jax.jit(decode).lower(params, tokens_BS, last_B)):
        text = lowered.as_text()
        assert set(re.findall(r"dot_general.*precision = (\[\w+, \w+\])", text)) == precisions
        assert text.count("dot_general") == len(re.findall(r"dot_general.*precision = ", text))
