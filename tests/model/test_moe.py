import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mateconv_jax.model.moe import MixtureOfExperts
from tests import llama, moe_torch

BACKENDS = ["dense", "ragged"]


def make_layer(**changes):
    """(graph, parameters) of one mixture; its choices are far from even."""
    c = llama.model_config(**dict(use_moe=True, dim=24, hidden_dim=40) | changes)
    graph, params = nnx.split(MixtureOfExperts(c, nnx.Rngs(0)))
    return c, graph, jax.tree.map(lambda p: 3 * p, params)


def random_inputs(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


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
    theirs = torch_tensor(x_BSD).requires_grad_()
    expected = reference(theirs)
    (expected * torch_tensor(d_out_BSD)).sum().add(100 * reference.aux_loss).backward()

    np.testing.assert_allclose(out_BSD, expected.detach().numpy(), atol=1e-5)
    assert float(auxiliary_loss) == pytest.approx(reference.aux_loss.item(), rel=1e-5)
    np.testing.assert_allclose(d_x_BSD, theirs.grad.numpy(), atol=1e-5)
    gradients = moe_torch.tensors(nnx.to_pure_dict(d_params))
    for name, parameter in reference.named_parameters():
        np.testing.assert_allclose(gradients[name], parameter.grad, atol=2e-5, err_msg=name)
        assert float(gradients[name].abs().max()) > 1e-3


def torch_tensor(x):
    return moe_torch.torch.tensor(np.asarray(x))
