import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from mateconv_jax import config as config_lib
from mateconv_jax.model import flops
from mateconv_jax.model.config import ModelConfig, ModelOptions
from mateconv_jax.model.kv_cache import make_kv_cache
from mateconv_jax.model.moe import MixtureOfExperts
from mateconv_jax.model.transformer import Transformer
from tests import llama, moe_torch

BACKENDS = ["dense", "ragged"]


def make_layer(**changes):
    """(config, graph, parameters) of one mixture whose choices are far from even."""
    c = llama.model_config(**dict(use_moe=True, dim=24, hidden_dim=40) | changes)
    graph, params = nnx.split(MixtureOfExperts(c, nnx.Rngs(0)))
    return c, graph, jax.tree.map(lambda p: 3 * p, params)


def random_inputs(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def test_the_gate_is_not_rounded_to_tf32():
    """Which the default precision does on NVIDIA GPUs: scores were off by 2e-4 on an H100."""
    layer = MixtureOfExperts(llama.model_config(use_moe=True, dim=24, hidden_dim=40), nnx.Rngs(0))
    program = jax.jit(layer.gate_scores).lower(random_inputs((8, 24))).as_text()
    assert "precision = [HIGHEST, HIGHEST]" in program


@pytest.mark.parametrize("experts", BACKENDS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_experts_per_tok": 1},
        {"norm_topk_prob": False},
        {"n_shared_experts": 0},
        {"n_routed_experts": 7, "num_experts_per_tok": 3, "aux_loss_alpha": 0.5},
    ],
)
def test_output_auxiliary_loss_and_gradients_equal_pytorch(experts, changes):
    c, graph, params = make_layer(experts=experts, **changes)
    x_BSD, d_out_BSD = random_inputs((3, 17, c.dim)), random_inputs((3, 17, c.dim), seed=1)

    def objective(params, x_BSD):
        out_BSD, routing = nnx.merge(graph, params)(x_BSD)
        mean_auxiliary_loss = routing.auxiliary_loss / (3 * 17)  # a row's weight is its number of tokens
        return jnp.sum(out_BSD * d_out_BSD) + 100 * mean_auxiliary_loss, (out_BSD, mean_auxiliary_loss)

    (d_params, d_x_BSD), (out_BSD, auxiliary_loss) = jax.jit(jax.grad(objective, (0, 1), has_aux=True))(params, x_BSD)
    reference = moe_torch.from_ours(c, nnx.to_pure_dict(params))
    theirs = torch.tensor(np.asarray(x_BSD), requires_grad=True)
    expected = reference(theirs)
    (expected * torch.tensor(np.asarray(d_out_BSD))).sum().add(100 * reference.aux_loss).backward()

    np.testing.assert_allclose(out_BSD, expected.detach().numpy(), atol=1e-5)
    assert float(auxiliary_loss) == pytest.approx(reference.aux_loss.item(), rel=1e-5)
    np.testing.assert_allclose(d_x_BSD, theirs.grad.numpy(), atol=1e-5)
    gradients = moe_torch.tensors(nnx.to_pure_dict(d_params))
    for name, parameter in reference.named_parameters():
        np.testing.assert_allclose(gradients[name], parameter.grad, atol=2e-5, err_msg=name)
        assert float(gradients[name].abs().max()) > 1e-3


def test_padding_does_not_count_and_a_row_weighs_as_much_as_it_has_tokens():
    c, graph, params = make_layer()
    x_BSD = random_inputs((3, 9, c.dim))
    lengths = [9, 4, 0]
    apply = jax.jit(lambda *inputs: nnx.merge(graph, params)(*inputs)[1])
    together = apply(x_BSD, jnp.arange(9) < jnp.array(lengths)[:, None])
    alone = [apply(x_BSD[i : i + 1, :n]) for i, n in enumerate(lengths) if n]
    for ours, of_rows in zip(together, zip(*alone, strict=True), strict=True):
        np.testing.assert_allclose(ours, sum(of_rows), rtol=1e-5)
    assert float(jnp.sum(together.chosen_E)) == 2 * (9 + 4)


def test_entropy_and_load_at_their_ends():
    c, graph, params = make_layer(aux_loss_alpha=1.0)
    x_BSD = random_inputs((2, 8, c.dim)).at[..., 0].set(9.0)

    @jax.jit
    def routing(gate_ED):
        params["gate_ED"] = nnx.Param(gate_ED)
        return nnx.merge(graph, params)(x_BSD)[1]

    even = routing(jnp.zeros((4, c.dim)))
    assert float(even.entropy) == pytest.approx(16 * np.log(4)) and float(even.auxiliary_loss) == pytest.approx(16)
    decided = routing(jnp.zeros((4, c.dim)).at[:, 0].set(jnp.array([40.0, 20.0, 0.0, 0.0])))
    assert float(decided.entropy) == pytest.approx(0, abs=1e-4) and decided.chosen_E.tolist() == [16, 16, 0, 0]
    assert float(decided.auxiliary_loss) == pytest.approx(2 * 16, rel=1e-3)  # E / K: the most that there can be


def test_half_precision_chooses_by_a_gate_in_float32():
    """Scores closer together than bfloat16 can tell."""
    c, graph, params = make_layer(dtype=jnp.dtype("bfloat16"), num_experts_per_tok=1, n_shared_experts=0)
    params["gate_ED"] = nnx.Param(jnp.ones((4, c.dim)) + 1e-4 * jnp.array([0.0, 2.0, 1.0, 3.0])[:, None])
    apply = jax.jit(lambda x_BSD: nnx.merge(graph, params)(x_BSD))
    out_BSD, routing = apply(jnp.ones((1, 5, c.dim), jnp.bfloat16))
    assert out_BSD.dtype == jnp.bfloat16 and routing.chosen_E.tolist() == [0, 0, 0, 5]


# ---- whole models ------------------------------------------------------------------------------------------------------


def make_model(**changes) -> Transformer:
    """Weights larger than at initialisation, so that experts and attention are far from uniform."""
    graph, params = nnx.split(Transformer(llama.model_config(use_moe=True, hidden_dim=96, **changes), nnx.Rngs(0)))
    return nnx.merge(graph, jax.tree.map(lambda p: 3 * p if p.ndim > 1 else p, params))


@nnx.jit
def logits(model, tokens_BS):
    return model(tokens_BS)


def random_tokens(shape):
    return jax.random.randint(jax.random.key(0), shape, 0, 96)


def torch_twin(model: Transformer):
    """transformers' LLaMA with the reference's mixtures in it."""
    dense = Transformer(llama.model_config(hidden_dim=96), nnx.Rngs(0))
    dense.embedding_VD, dense.norm = model.embedding_VD, model.norm
    for ours, block in zip(model.blocks, dense.blocks, strict=True):
        block.attention, block.attention_norm, block.ffn_norm = ours.attention, ours.attention_norm, ours.ffn_norm
    twin = llama.from_ours(dense)
    for ours, layer in zip(model.blocks, twin.model.layers, strict=True):
        layer.mlp = moe_torch.from_ours(model.c, nnx.to_pure_dict(nnx.state(ours.feed_forward)))
    return twin


@pytest.mark.parametrize("experts", BACKENDS)
def test_logits_equal_pytorch_whole_and_cached_at_every_position(experts):
    model = make_model(experts=experts)
    tokens_BS = random_tokens((2, 20))
    with torch.no_grad():
        theirs = torch_twin(model)(torch.tensor(np.asarray(tokens_BS))).logits.numpy()
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(logits(model, tokens_BS), theirs, atol=1e-4)
    # Prompts of 5 and 9 tokens in a bucket of 16, then token by token.
    kv_cache, start_B = make_kv_cache(model.c, 2, 24), jnp.array([5, 9])
    step = nnx.jit(lambda model, *args: model.cached(*args))
    prompts_BS = jnp.where(jnp.arange(16) < start_B[:, None], tokens_BS[:, :16], 0)
    logits_BV, kv_cache = step(model, prompts_BS, jnp.zeros(2, int), start_B - 1, kv_cache)
    np.testing.assert_allclose(logits_BV, theirs[[0, 1], [4, 8]], atol=1e-4)
    for i in range(11):
        at_B = start_B + i
        tokens_B1 = tokens_BS[jnp.arange(2), at_B][:, None]
        logits_BV, kv_cache = step(model, tokens_B1, at_B, jnp.zeros(2, int), kv_cache)
        np.testing.assert_allclose(logits_BV, theirs[[0, 1], np.asarray(at_B)], atol=1e-4)


@pytest.mark.parametrize("experts", BACKENDS)
def test_a_row_does_not_depend_on_its_batch(experts):
    model = make_model(experts=experts)
    tokens_BS = random_tokens((4, 12))
    np.testing.assert_allclose(logits(model, tokens_BS)[2], logits(model, tokens_BS[2:3])[0], atol=1e-5)


def test_the_experts_start_as_a_feed_forward_layer_does():
    c = llama.model_config(use_moe=True, n_layers=8, dim=128, hidden_dim=256)
    mixture = nnx.jit(lambda: MixtureOfExperts(c, nnx.Rngs(0)))()
    w1_EFD, w3_EFD = mixture.w13_E2FD[...][:, 0], mixture.w13_E2FD[...][:, 1]
    for weights, deviation in [
        (w1_EFD, 0.02), (w3_EFD, 0.02 / 4), (mixture.w2_EDF[...], 0.02), (mixture.gate_ED[...], 1 / (3 * 128) ** 0.5),
    ]:  # fmt: skip
        assert float(jnp.std(weights)) == pytest.approx(deviation, rel=0.05)
    assert float(jnp.abs(mixture.gate_ED[...]).max()) <= 128**-0.5
    assert float(jnp.abs(w1_EFD[0] - w1_EFD[1]).max()) > 0.01


def test_a_token_meets_its_own_experts_only():
    config = config_lib.default_config()
    config.model.use_moe = True
    c = ModelConfig.make(config_lib.options(ModelOptions, config_lib.resolve(config).model), "float32")
    assert c.experts == "dense"  # which auto is, for now
    layer, gates, rest = 3 * 512 * 1408, 8 * 4 * 512, 26_878_464 - 8 * 3 * 512 * 1408
    assert flops.parameters(c) == (rest + gates + 8 * 5 * layer, rest + gates + 8 * 3 * layer)
    norms = (2 * 8 + 1) * 512
    assert flops.training_flops_per_token(c, 512) == 6 * (flops.parameters(c)[1] - norms) + 6 * 8 * 512 * 512
