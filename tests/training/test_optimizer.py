import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from flax import nnx

from mateconv_jax import config as config_lib
from mateconv_jax.model.transformer import Transformer, abstract_model
from mateconv_jax.training import optimizer, train_state
from mateconv_jax.training.step import make_eval_step, make_train_step
from tests import llama

STEPS = 50


def training(**changes):
    config = config_lib.default_config()
    config.training.update(dict(learning_rate=1e-2, min_lr=1e-3) | changes)
    return config.training


@pytest.mark.parametrize("total_steps", [7, 50, 1000])
def test_the_schedule_equals_transformers(total_steps):
    schedule = optimizer.make_schedule(training(), total_steps)
    parameter = torch.nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([parameter], lr=1e-2)
    theirs = transformers.get_cosine_with_min_lr_schedule_with_warmup(sgd, int(0.1 * total_steps), total_steps, min_lr=1e-3)
    for step in range(total_steps):
        assert float(schedule(step)) == pytest.approx(theirs.get_last_lr()[0], abs=1e-8)
        sgd.step()
        theirs.step()


@pytest.mark.parametrize("grad_clip", [0.0, 0.5])
def test_fifty_steps_equal_pytorch(grad_clip):
    """Clipping, AdamW with decay on matrices only, warm-up and cosine, on the same sequence of gradients."""
    options = training(grad_clip=grad_clip)
    rng = np.random.default_rng(0)
    params = {"matrix": rng.normal(size=(4, 3)).astype(np.float32), "scale": rng.normal(size=3).astype(np.float32)}
    gradients = [{k: rng.normal(size=p.shape).astype(np.float32) for k, p in params.items()} for _ in range(STEPS)]

    tensors = {k: torch.nn.Parameter(torch.tensor(p)) for k, p in params.items()}
    groups = [
        {"params": [tensors["matrix"]], "weight_decay": options.weight_decay},
        {"params": [tensors["scale"]], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(options.beta1, options.beta2))
    scheduler = transformers.get_cosine_with_min_lr_schedule_with_warmup(adamw, 5, STEPS, min_lr=options.min_lr)

    tx = optimizer.make_optimizer(options, optimizer.make_schedule(options, STEPS))
    ours = jax.tree.map(jnp.asarray, params)
    opt_state = tx.init(ours)
    update = jax.jit(tx.update)
    for gradient in gradients:
        updates, opt_state = update(gradient, opt_state, ours)
        ours = optax.apply_updates(ours, updates)
        for key, tensor in tensors.items():
            tensor.grad = torch.tensor(gradient[key])
        if grad_clip:
            torch.nn.utils.clip_grad_norm_(list(tensors.values()), grad_clip)
        adamw.step()
        scheduler.step()
        for key, tensor in tensors.items():
            np.testing.assert_allclose(ours[key], tensor.detach().numpy(), atol=1e-5)


def make(ema_decay=0.9, use_ema=True, **changes):
    c = llama.model_config()
    options = training(**changes)
    schedule = optimizer.make_schedule(options, STEPS)
    tx = optimizer.make_optimizer(options, schedule)
    graph, _ = abstract_model(c)
    return graph, make_train_step(graph, tx, schedule, ema_decay), train_state.init(c, tx, 0, use_ema)


def random_batch(seed, rows=4, seq_len=12):
    tokens = jax.random.randint(jax.random.key(seed), (rows, seq_len + 1), 0, 96).astype(jnp.uint16)
    return {"tokens": tokens, "length": jnp.full(rows, seq_len + 1, jnp.int32)}


def test_training_equals_pytorch_from_the_tokens_to_the_weights():
    """Loss, gradients and updates of the whole model beside transformers' LLaMA under PyTorch's AdamW, 50 steps.

    1e-3 because Adam divides a gradient by its own size: where it is rounding noise, so is the update. (On equal gradients
    the updates agree to 1e-5, above.)
    """
    graph, train_step, state = make(use_ema=False, learning_rate=3e-3, min_lr=3e-4)
    params = jax.tree.map(lambda p: 5 * p if p.ndim > 1 else p, state.params)  # as at first, most gradients are noise
    state = state.replace(params=params)
    torch_model = llama.from_ours(nnx.merge(graph, params)).train()
    groups = [
        {"params": [p for p in torch_model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in torch_model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))
    scheduler = transformers.get_cosine_with_min_lr_schedule_with_warmup(adamw, 5, STEPS, min_lr=3e-4)
    for step in range(STEPS):
        batch = random_batch(step % 3)
        tokens = torch.tensor(np.asarray(batch["tokens"], np.int64))
        loss = torch.nn.functional.cross_entropy(torch_model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
        adamw.zero_grad()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(torch_model.parameters(), 1.0)
        adamw.step()
        scheduler.step()
        state, metrics = train_step(state, batch)
        assert float(metrics["train/loss"]) == pytest.approx(loss.item(), rel=1e-5 if step < 2 else 1e-3)
        if step < 2:
            assert float(metrics["grad_norm"]) == pytest.approx(grad_norm.item(), rel=1e-4)
    assert loss.item() < 0.5  # it learned: ln(96) = 4.6


def test_ema_follows_its_formula():
    _, train_step, state = make(ema_decay=0.9)
    expected = np.asarray(jax.tree.leaves(state.params)[0], np.float64)
    for seed in range(10):
        state, _ = train_step(state, random_batch(seed))
        expected = 0.9 * expected + 0.1 * np.asarray(jax.tree.leaves(state.params)[0])
    np.testing.assert_allclose(jax.tree.leaves(state.ema_params)[0], expected, atol=1e-6)


def test_nothing_is_compiled_after_the_first_step():
    _, train_step, state = make()
    for seed in range(4):
        state, _ = train_step(state, random_batch(seed))
    assert train_step._cache_size() == 1


def test_padding_is_no_target():
    graph, _, state = make()
    eval_step = make_eval_step(graph)
    batch = random_batch(0)
    batch["length"] = jnp.array([13, 5, 2, 0])
    loss, count = eval_step(state.params, batch)
    assert int(count) == 12 + 4 + 1
    changed = batch | {"tokens": batch["tokens"].at[1, 5:].set(7).at[2, 2:].set(7).at[3].set(7)}
    assert float(eval_step(state.params, changed)[0]) == float(loss)
    logits = nnx.merge(graph, state.params)(batch["tokens"][:, :-1].astype(int))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:].astype(int))
    assert float(loss) == pytest.approx(float(losses[0].sum() + losses[1, :4].sum() + losses[2, 0]), rel=1e-6)


def test_initial_loss_is_near_ln_vocab():
    c = llama.model_config()
    graph, params = nnx.split(Transformer(c, nnx.Rngs(0)))
    loss, count = make_eval_step(graph)(params, random_batch(0, rows=16))
    assert float(loss / count) == pytest.approx(np.log(96), abs=0.1)
