"""Our parameters under Hugging Face's names: the same logits as transformers', both ways."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from mateconv_jax.errors import UserError
from mateconv_jax.interop import weight_mapping
from mateconv_jax.interop.weight_mapping import Tensor
from mateconv_jax.model.transformer import Transformer, abstract_model
from tests import llama

YARN = dict(rope_scaling="yarn", rope_factor=4.0, rope_original_max_seq_len=64)
MODELS = {
    "llama": dict(),
    "llama, a free head_dim, untied": dict(head_dim=12, tie_word_embeddings=False),
    "llama 3": dict(rope_factor=8.0, rope_original_max_seq_len=64),
    "yarn": dict(YARN, rope_attention_factor=1.5, tie_word_embeddings=False),
    "qwen2": dict(qkv_bias=True, tie_word_embeddings=False),
    "qwen3": dict(qk_norm=True, rope_theta=1e6, norm_eps=1e-6),
    "qwen3, a free head_dim, untied": dict(qk_norm=True, head_dim=16, tie_word_embeddings=False),
    "qwen3, yarn": dict(YARN, qk_norm=True, head_dim=16, tie_word_embeddings=False),
}


def transformers_model(c, seed=0):
    """Random weights of transformers' own, its norms' too, large enough for peaked attention."""
    kind = "Qwen3" if c.qk_norm else "Qwen2" if c.qkv_bias else "Llama"
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.rope_factor != 1 and c.rope_scaling == "yarn":
        rope |= dict(
            rope_type="yarn", factor=c.rope_factor, attention_factor=c.rope_attention_factor,
            original_max_position_embeddings=c.rope_original_max_seq_len,
        )  # fmt: skip
    elif c.rope_factor != 1:
        rope |= dict(
            rope_type="llama3", factor=c.rope_factor, low_freq_factor=c.rope_low_freq_factor,
            high_freq_factor=c.rope_high_freq_factor, original_max_position_embeddings=c.rope_original_max_seq_len,
        )  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=c.dim, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads,
        head_dim=c.head_dim, intermediate_size=c.hidden_dim, vocab_size=c.vocab_size, rms_norm_eps=c.norm_eps,
        max_position_embeddings=c.max_seq_len, rope_parameters=rope, tie_word_embeddings=c.tie_word_embeddings,
        initializer_range=0.06,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.copy_(1 + 0.3 * torch.randn_like(weight))
    return model


def tensors_of(model) -> dict[str, Tensor]:
    state = model.state_dict()
    return {name: Tensor(tuple(t.shape), lambda t=t: t.numpy()) for name, t in state.items()}


def random_params(c, seed=1):
    graph, params = nnx.split(Transformer(c, nnx.Rngs(seed)))
    keys = iter(jax.random.split(jax.random.key(seed), 1000))

    def vary(p):
        if p.ndim > 1:
            return 3 * p
        scale = 0.3 if p.any() else 0.05  # biases start at 0; large ones make every answer the same
        return p + scale * jax.random.normal(next(keys), p.shape)

    return graph, jax.tree.map(vary, params)


def both_logits(graph, params, theirs, n_tokens):
    tokens_BS = np.random.default_rng(0).integers(0, 96, (2, n_tokens))
    with torch.no_grad():
        expected_BSV = theirs(torch.tensor(tokens_BS)).logits.numpy()
    assert np.abs(expected_BSV).max() > 1
    ours = jax.jit(lambda params, tokens_BS: nnx.merge(graph, params)(tokens_BS))
    return np.asarray(ours(params, jnp.asarray(tokens_BS))), expected_BSV


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_weights_of_transformers_give_its_logits_here(changes):
    c = llama.model_config(**changes)
    theirs = transformers_model(c)
    graph, abstract_params = abstract_model(c)
    params = weight_mapping.from_hf(tensors_of(theirs), c, abstract_params, "theirs")
    ours_BSV, theirs_BSV = both_logits(graph, params, theirs, 150)  # beyond rope_original_max_seq_len
    np.testing.assert_allclose(ours_BSV, theirs_BSV, atol=1e-4)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_our_weights_come_back_from_transformers_as_they_were(changes):
    """Its own load_state_dict takes every tensor, and what is read from its state_dict is bit-identical."""
    c = llama.model_config(**changes)
    graph, params = random_params(c)
    theirs = transformers_model(c)
    state = {name: torch.tensor(tensor.read()) for name, tensor in weight_mapping.to_hf(params, c).items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"] * c.tie_word_embeddings and not unexpected
    theirs.tie_weights()
    back = weight_mapping.from_hf(tensors_of(theirs), c, abstract_model(c)[1], "theirs")
    jax.tree.map(np.testing.assert_array_equal, params, back)
    assert weight_mapping.n_parameters(c) == sum(p.size for p in jax.tree.leaves(params)) == theirs.num_parameters()


def test_parameters_take_the_dtype_and_the_sharding_that_is_asked_for():
    c = llama.model_config(n_layers=1)
    mesh = jax.make_mesh((1,), ("fsdp",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=sharding), abstract_model(c)[1])
    params = weight_mapping.from_hf(weight_mapping.to_hf(random_params(c)[1], c), c, wanted, "ours")
    assert all(leaf.dtype == jnp.bfloat16 and leaf.sharding == sharding for leaf in jax.tree.leaves(params))


def test_the_host_holds_one_tensor_of_the_file_at_a_time():
    c = llama.model_config()
    read, alive = [], []

    def counted(name, tensor):
        def read_one():
            assert not any(reference() is not None for reference in alive)
            array = tensor.read().copy()
            read.append(name)
            alive.append(weakref.ref(array))
            return array

        return Tensor(tensor.shape, read_one)

    tensors = {name: counted(name, tensor) for name, tensor in weight_mapping.to_hf(random_params(c)[1], c).items()}
    weight_mapping.from_hf(tensors, c, abstract_model(c)[1], "x")
    assert sorted(read) == sorted(tensors)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("model.layers.0.self_attn.k_proj.weight"), "x: the tensor model.layers.0.self_attn.k_proj.weight is missing"),
        (lambda t: [t.pop(f"model.layers.0.mlp.{p}_proj.weight") for p in ("up", "gate")], "2 tensors .* are missing"),
        (lambda t: t.update({"model.layers.9.mlp.up_proj.weight": Tensor((2,), None)}), "model.layers.9.mlp.up_proj.weight is unknown"),
        (lambda t: t.update({"model.norm.weight": Tensor((7,), None)}), r"model.norm.weight has shape \(7,\) \(expected \(64,\)"),
        (lambda t: t.update({"lm_head.weight": Tensor((96, 64), lambda: np.ones((96, 64)))}), "lm_head.weight differs from the embedding"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_one_clear_error(change, message):
    c = llama.model_config(n_layers=1)
    tensors = weight_mapping.to_hf(random_params(c)[1], c)
    change(tensors)
    with pytest.raises(UserError, match=message):
        weight_mapping.from_hf(tensors, c, abstract_model(c)[1], "x")


def test_a_copy_of_the_embedding_and_buffers_are_no_extra_tensors():
    c = llama.model_config(n_layers=1)
    params = random_params(c)[1]
    tensors = weight_mapping.to_hf(params, c)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = Tensor((4,), None)
    jax.tree.map(np.testing.assert_array_equal, weight_mapping.from_hf(tensors, c, abstract_model(c)[1], "x"), params)
