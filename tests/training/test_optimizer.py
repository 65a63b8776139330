import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from flax import nnx

from mateconv_jax.model.transformer import Transformer
from mateconv_jax.training import optimizer, train_state
from tests import llama
from tests.training.runs import training

STEPS = 50


SCHEDULES = {
    "cosine": lambda sgd, warmup, total: transformers.get_cosine_with_min_lr_schedule_with_warmup(
        sgd, warmup, total, min_lr=1e-3
    ),
    "linear": lambda sgd, warmup, total: transformers.get_polynomial_decay_schedule_with_warmup(sgd, warmup, total, 1e-3, 1.0),
    "polynomial": lambda sgd, warmup, total: transformers.get_polynomial_decay_schedule_with_warmup(
        sgd, warmup, total, 1e-3, 2.0
    ),
    "constant": lambda sgd, warmup, total: transformers.get_constant_schedule_with_warmup(sgd, warmup),
    "wsd": lambda sgd, warmup, total: transformers.get_wsd_schedule(
        sgd, warmup, int(0.2 * total), num_training_steps=total, decay_type="linear", min_lr_ratio=0.1
    ),
}


@pytest.mark.parametrize("warmup_steps", [None, 0, 3])
@pytest.mark.parametrize("total_steps", [7, 50, 1000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_equal_transformers(name, total_steps, warmup_steps):
    schedule = optimizer.make_schedule(training(lr_scheduler=name, warmup_steps=warmup_steps), total_steps)
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    warmup = int(0.1 * total_steps) if warmup_steps is None else warmup_steps
    theirs = SCHEDULES[name](sgd, warmup, total_steps)
    for step in range(total_steps):
        if name != "wsd" or step >= warmup:  # whose warm-up begins at min_lr there, at 0 here
            assert float(schedule(step)) == pytest.approx(theirs.get_last_lr()[0], abs=1e-8)
        sgd.step()
        theirs.step()


@pytest.mark.parametrize(
    "key, value", [("warmup_ratio", 0.5), ("warmup_steps", 9), ("min_lr", 5e-3), ("lr_scheduler", "linear")]
)
def test_an_option_changes_the_schedule(key, value):
    assert float(optimizer.make_schedule(training(**{key: value}), 20)(8)) != float(optimizer.make_schedule(training(), 20)(8))


def test_options_of_polynomial_and_wsd():
    def at(step, **options):
        return float(optimizer.make_schedule(training(warmup_steps=0, **options), 100)(step))

    assert at(50, lr_scheduler="polynomial", lr_power=1.0) == pytest.approx((1e-2 + 1e-3) / 2)
    assert at(79, lr_scheduler="wsd") == pytest.approx(1e-2) and at(90, lr_scheduler="wsd") == pytest.approx(5.5e-3)
    assert at(79, lr_scheduler="wsd", decay_ratio=0.5) < 1e-2


def random_params(rng):
    shapes = {"matrix": (160, 130), "cube": (8, 4, 6), "scale": (7,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def updates_of(options, gradients, params):
    """Parameters after each step, as the training step applies them."""
    tx, schedule = optimizer.make_optimizer(options, None), optimizer.make_schedule(options, STEPS)
    params = jax.tree.map(jnp.asarray, params)
    opt_state = tx.init(params)
    update = jax.jit(tx.update)
    for step, gradient in enumerate(gradients):
        updates, opt_state = update(gradient, opt_state, params)
        params = optax.apply_updates(params, jax.tree.map(lambda u: schedule(step) * u, updates))  # noqa: B023
        yield params


TORCH = {
    "adamw": lambda groups, options: torch.optim.AdamW(
        groups, lr=1e-2, betas=(options.beta1, options.beta2), eps=options.adam_eps
    ),
    "adam": lambda groups, options: torch.optim.Adam(
        groups, lr=1e-2, betas=(options.beta1, options.beta2), eps=options.adam_eps
    ),
    "adafactor": lambda groups, options: torch.optim.Adafactor(groups, lr=1e-2, eps=(1e-30, 1e-3)),
}


@pytest.mark.parametrize("grad_clip, adam_eps", [(0.0, 1e-8), (0.5, 0.1)])
@pytest.mark.parametrize("name", TORCH)
def test_fifty_steps_equal_pytorch(name, grad_clip, adam_eps):
    """Clipping, decay on matrices only, warm-up and cosine, on the same sequence of gradients."""
    options = training(optimizer_type=name, grad_clip=grad_clip, adam_eps=adam_eps)
    rng = np.random.default_rng(0)
    params = random_params(rng)
    if name == "adafactor":  # optax factors what PyTorch does where both sides are at least 128, and PyTorch every matrix
        del params["cube"]
    gradients = [{k: rng.normal(size=p.shape).astype(np.float32) for k, p in params.items()} for _ in range(STEPS)]

    tensors = {k: torch.nn.Parameter(torch.tensor(p)) for k, p in params.items()}
    groups = [
        {"params": [p for p in tensors.values() if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [tensors["scale"]], "weight_decay": 0.0},
    ]
    theirs = TORCH[name](groups, options)
    assert_steps_equal(theirs, SCHEDULES["cosine"](theirs, 5, STEPS), tensors, options, gradients, params)


def assert_steps_equal(theirs, scheduler, tensors, options, gradients, params):
    """PyTorch's `tensors` equal ours after each step."""
    for gradient, ours in zip(gradients, updates_of(options, gradients, params), strict=True):
        for tensor, g in zip(jax.tree.leaves(tensors), jax.tree.leaves(gradient), strict=True):
            tensor.grad = torch.tensor(g)
        if options.grad_clip:
            torch.nn.utils.clip_grad_norm_(jax.tree.leaves(tensors), options.grad_clip)
        theirs.step()
        scheduler.step()
        for tensor, p in zip(jax.tree.leaves(tensors), jax.tree.leaves(ours), strict=True):
            np.testing.assert_allclose(p, tensor.detach().numpy(), atol=1e-5)


def random_model(rng):
    def array(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return {"embedding_VD": array(160, 130), "blocks": {0: {"w2_DF": array(160, 130), "scale_D": array(7)}}}


@pytest.mark.parametrize("name", TORCH)
def test_blocks_matrices_learn_at_their_own_rate_as_in_pytorch(name):
    options = training(optimizer_type=name, grad_clip=0.0, matrix_lr_ratio=0.25)
    rng = np.random.default_rng(0)
    params = random_model(rng)
    gradients = [random_model(rng) for _ in range(STEPS)]

    tensors = jax.tree.map(lambda p: torch.nn.Parameter(torch.tensor(p)), params)
    groups = [
        {"params": [tensors["embedding_VD"]], "weight_decay": options.weight_decay, "lr": 1e-2},
        {"params": [tensors["blocks"][0]["scale_D"]], "weight_decay": 0.0, "lr": 1e-2},
        {"params": [tensors["blocks"][0]["w2_DF"]], "weight_decay": options.weight_decay, "lr": 0.25e-2},
    ]
    theirs = TORCH[name](groups, options)
    schedule = optimizer.make_schedule(options, STEPS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(theirs, lambda step: float(schedule(step)) / 1e-2)
    assert_steps_equal(theirs, scheduler, tensors, options, gradients, params)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_matrix_lr_ratio_scales_the_updates_of_the_blocks_matrices_alone(name):
    model = Transformer(llama.model_config(), nnx.Rngs(0))
    params = nnx.split(model)[1]
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape), params)

    def update(ratio):
        tx = optimizer.make_optimizer(training(optimizer_type=name, matrix_lr_ratio=ratio), model.c)
        return jax.jit(tx.update)(grads, tx.init(params), params)

    (ours, state), (slower, slower_state) = update(1.0), update(0.125)
    assert jax.tree.structure(state) == jax.tree.structure(slower_state)
    ratios = {
        jax.tree_util.keystr(path): np.unique(np.round(b[a != 0] / a[a != 0], 6))
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(slower), strict=True)
    }
    for path, ratio in ratios.items():
        is_matrix = any(name in path for name in ("wqkv_JND", "wo_DHN", "w13_2FD", "w2_DF"))
        np.testing.assert_array_equal(ratio, [0.125 if is_matrix else 1.0], err_msg=path)


def test_lion_equals_its_formula():
    options = training(optimizer_type="lion", grad_clip=0.0, beta1=0.9, beta2=0.99)
    schedule = optimizer.make_schedule(options, STEPS)
    rng = np.random.default_rng(0)
    params = random_params(rng)
    gradients = [{k: rng.normal(size=p.shape).astype(np.float32) for k, p in params.items()} for _ in range(10)]
    momentum = jax.tree.map(np.zeros_like, params)
    for step, ours in enumerate(updates_of(options, gradients, params)):
        for key, p in params.items():
            g, m, lr = gradients[step][key], momentum[key], float(schedule(step))
            decay = options.weight_decay if p.ndim > 1 else 0.0
            params[key] = p - lr * (np.sign(0.9 * m + 0.1 * g) + decay * p)
            momentum[key] = 0.99 * m + 0.01 * g
            np.testing.assert_allclose(ours[key], params[key], atol=1e-5)


def orthogonalised(matrix):
    """Five Newton-Schulz steps (Jordan, 2024), in double precision."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / np.linalg.norm(x)
    for _ in range(5):
        s = x @ x.T
        x = 3.4445 * x + (-4.775 * s + 2.0315 * s @ s) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def test_muon_orthogonalises_each_part_and_leaves_embedding_and_norms_to_adamw():
    c = llama.model_config()
    options = training(optimizer_type="muon", grad_clip=0.0, adam_eps=0.1)
    params = train_state.init(c, optax.identity(), 0, False).params
    labels = optimizer.muon_labels(optimizer.to_parts(params, c))
    by_label = {}
    for path, label in jax.tree.leaves_with_path(labels):
        by_label.setdefault(label, set()).add(path[-1].key)
    assert by_label == {
        "muon": {"wq_HND", "wk_KND", "wv_KND", "wo_DHN", "w1_FD", "w3_FD", "w2_DF"},
        "adamw": {"embedding_VD", "scale_D"},
    }

    gradients = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape), params)
    tx = optimizer.make_optimizer(options, c)
    updates, _ = tx.update(gradients, tx.init(params), params)
    parts, weights, grads = (optimizer.to_parts(tree, c)["blocks"][1] for tree in (updates, params, gradients))
    for place, name, shape in [
        ("attention", "wq_HND", (-1, c.dim)), ("attention", "wk_KND", (-1, c.dim)), ("attention", "wv_KND", (-1, c.dim)),
        ("attention", "wo_DHN", (c.dim, -1)), ("feed_forward", "w1_FD", (-1, c.dim)), ("feed_forward", "w3_FD", (-1, c.dim)),
        ("feed_forward", "w2_DF", (c.dim, -1)),
    ]:  # fmt: skip
        gradient = np.asarray(grads[place][name], np.float64).reshape(shape)
        direction = 0.2 * max(gradient.shape) ** 0.5 * orthogonalised(gradient)
        expected = -(direction + options.weight_decay * np.asarray(weights[place][name]).reshape(shape))
        np.testing.assert_allclose(np.asarray(parts[place][name]).reshape(shape), expected, atol=1e-4)
    weight_decay = options.weight_decay
    adamw = optax.adamw(1.0, options.beta1, options.beta2, 0.1, weight_decay=weight_decay, mask=optimizer.is_matrix)
    plain, _ = adamw.update(gradients, adamw.init(params), params)
    for name in ("embedding_VD", "norm"):
        jax.tree.map(np.testing.assert_array_equal, updates[name], plain[name])
