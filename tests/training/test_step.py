import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from flax import nnx

from mateconv_jax.errors import UserError
from mateconv_jax.losses.next_token import next_token_loss
from mateconv_jax.model import layers
from mateconv_jax.model.attention import backends
from mateconv_jax.model.attention.request import Request
from mateconv_jax.model.device import Device
from mateconv_jax.model.transformer import Transformer, abstract_model
from mateconv_jax.training import optimizer, train_state
from mateconv_jax.training.step import make_eval_step, make_train_step
from tests import llama
from tests.training.runs import training

STEPS = 50


def make(use_ema=True, model=None, loss_fn=next_token_loss, **changes):
    c = llama.model_config(**(model or {}))
    options = training(**dict(ema_decay=0.9, ema_warmup=False) | changes)
    tx = optimizer.make_optimizer(options, c)
    graph, _ = abstract_model(c)
    step = make_train_step(graph, loss_fn, tx, optimizer.make_schedule(options, STEPS), options)
    return graph, step, train_state.init(c, tx, 0, use_ema)


def random_batch(seed, rows=4, seq_len=12, steps=1):
    """A step's batch of `steps` micro-batches."""
    tokens = jax.random.randint(jax.random.key(seed), (steps, rows, seq_len + 1), 0, 96).astype(jnp.uint16)
    return {"tokens": tokens, "length": jnp.full((steps, rows), seq_len + 1, jnp.int32)}


def one(batch):
    """Its only micro-batch."""
    [tokens], [length] = batch["tokens"], batch["length"]
    return {"tokens": tokens, "length": length}


def test_training_equals_pytorch_from_the_tokens_to_the_weights():
    """Loss, gradients and updates of the whole model beside transformers' LLaMA under PyTorch's AdamW, 50 steps.

    Adam divides a gradient by its own size: one that is rounding noise makes an update that is noise, and from batches 0 to 2
    on such an entry moved the losses 1e-3 apart; with these they stay within 1e-6. (On equal gradients the updates agree to
    1e-5: see test_optimizer.py.)
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
        batch = random_batch(20 + step % 3)
        tokens = torch.tensor(np.asarray(batch["tokens"][0], np.int64))
        loss = torch.nn.functional.cross_entropy(torch_model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
        adamw.zero_grad()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(torch_model.parameters(), 1.0)
        adamw.step()
        scheduler.step()
        state, metrics = train_step(state, batch)
        assert float(metrics["train/loss"]) == pytest.approx(loss.item(), rel=1e-5)
        assert float(metrics["grad_norm"]) == pytest.approx(grad_norm.item(), rel=1e-4)
    assert loss.item() < 0.5  # it learned: ln(96) = 4.6


def test_ema_follows_its_formula():
    _, train_step, state = make()
    expected = np.asarray(jax.tree.leaves(state.params)[0], np.float64)
    for seed in range(10):
        state, _ = train_step(state, random_batch(seed))
        expected = 0.9 * expected + 0.1 * np.asarray(jax.tree.leaves(state.params)[0])
    np.testing.assert_allclose(jax.tree.leaves(state.ema_params)[0], expected, atol=1e-6)


def test_ema_warmup_forgets_the_first_steps():
    _, train_step, state = make(ema_decay=0.9, ema_warmup=True)
    expected = np.asarray(jax.tree.leaves(state.params)[0], np.float64)
    for step in range(12):
        state, _ = train_step(state, random_batch(step))
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * np.asarray(jax.tree.leaves(state.params)[0])
    np.testing.assert_allclose(jax.tree.leaves(state.ema_params)[0], expected, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"optimizer_type": "muon"}, {"model": {"dtype": np.dtype("float16"), "attention": "xla"}}]
)
def test_nothing_is_compiled_after_the_first_step(options):
    _, train_step, state = make(**options)
    for seed in range(4):
        state, _ = train_step(state, random_batch(seed))
    assert train_step._cache_size() == 1


def test_padding_is_no_target():
    graph, _, state = make()
    eval_step = make_eval_step(graph, next_token_loss)
    batch = one(random_batch(0))
    batch["length"] = jnp.array([13, 5, 2, 0])
    loss, count, _ = eval_step(state.params, batch)
    assert int(count) == 12 + 4 + 1
    changed = batch | {"tokens": batch["tokens"].at[1, 5:].set(7).at[2, 2:].set(7).at[3].set(7)}
    assert float(eval_step(state.params, changed)[0]) == float(loss)
    logits = nnx.merge(graph, state.params)(batch["tokens"][:, :-1].astype(int))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:].astype(int))
    assert float(loss) == pytest.approx(float(losses[0].sum() + losses[1, :4].sum() + losses[2, 0]), rel=1e-6)


def test_initial_loss_is_near_ln_vocab():
    c = llama.model_config()
    graph, params = nnx.split(Transformer(c, nnx.Rngs(0)))
    loss, count, _ = make_eval_step(graph, next_token_loss)(params, one(random_batch(0, rows=16)))
    assert float(loss / count) == pytest.approx(np.log(96), abs=0.1)


def changes_of(state, after):
    return jax.tree.map(lambda a, b: np.asarray(b, np.float64) - np.asarray(a), state, after)


def test_accumulated_micro_batches_equal_the_large_batch():
    """Weighted by tokens: rows of different lengths, and a micro-batch with hardly any."""
    lengths = jnp.array([13, 4, 9, 13, 2, 1, 0, 2, 13, 13, 7, 5], jnp.int32)
    large = random_batch(0, rows=12) | {"length": lengths[None]}
    small = {"tokens": large["tokens"].reshape(3, 4, 13), "length": lengths.reshape(3, 4)}
    results = []
    for batch, accumulation_steps in ((large, 1), (small, 3)):
        # A plain multiple of the gradient as update: Adam would blow up rounding.
        _, train_step, state = make(accumulation_steps=accumulation_steps, optimizer_type="adafactor", warmup_steps=0)
        before = jax.tree.map(np.asarray, state.params)
        after, metrics = train_step(state, batch)
        results.append((changes_of(before, after.params), metrics))
    for a, b in zip(jax.tree.leaves(results[0][0]), jax.tree.leaves(results[1][0]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    for name in ("train/loss", "grad_norm"):
        assert float(results[0][1][name]) == pytest.approx(float(results[1][1][name]), rel=1e-5)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_the_program_and_not_the_gradient(remat):
    graph, _, state = make()
    batch = one(random_batch(0))

    def gradient(remat):
        def objective(params):
            return next_token_loss(nnx.merge(graph, params), batch, remat=remat).objective

        return jax.jit(jax.grad(objective)).lower(state.params)

    plain, again = gradient("none"), gradient(remat)
    assert again.as_text().count("dot_general") > plain.as_text().count("dot_general")
    for a, b in zip(
        jax.tree.leaves(plain.compile()(state.params)), jax.tree.leaves(again.compile()(state.params)), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_z_loss_adds_its_formula_to_the_objective_alone():
    graph, _, state = make()
    batch = one(random_batch(0))
    model = nnx.merge(graph, state.params)
    output = next_token_loss(model, batch, z_loss=0.01)
    squares = jnp.sum(jax.nn.logsumexp(model(batch["tokens"][:, :-1].astype(int)), axis=-1) ** 2)
    assert float(output.sum) == float(next_token_loss(model, batch).sum)
    assert float(output.objective - output.sum) == pytest.approx(0.01 * float(squares), rel=1e-4)


@pytest.mark.parametrize("attention", ["xla", "blocked"])
def test_a_document_mask_makes_each_document_as_if_it_were_alone(attention):
    graph, _, state = make(model={"attention": attention})
    params = jax.tree.map(lambda p: 5 * p if p.ndim > 1 else p, state.params)
    lengths = [5, 70, 30, 25]  # over the borders of blocked attention's blocks
    documents = [jax.random.randint(jax.random.key(i), (1, n), 2, 96).at[:, 0].set(1) for i, n in enumerate(lengths)]
    row = jnp.concatenate(documents, axis=1)
    logits = jax.jit(lambda *inputs: nnx.merge(graph, params)(*inputs))
    together = logits(row, jnp.cumsum(row == 1, axis=1))
    alone = jnp.concatenate([logits(document) for document in documents], axis=1)
    np.testing.assert_allclose(together, alone, atol=2e-4)
    assert float(jnp.abs(logits(row) - alone).max()) > 0.1
    tokens = jnp.concatenate([row, row[:, :1]], axis=1)
    batch = {"tokens": tokens, "length": jnp.array([131])}
    losses = optax.softmax_cross_entropy_with_integer_labels(alone, tokens[:, 1:])
    loss = make_eval_step(graph, next_token_loss)(params, batch | {"document_starts": tokens == 1})[0]
    assert float(loss) == pytest.approx(float(losses.sum()), rel=1e-5)


def test_only_learned_tokens_are_targets():
    graph, _, state = make()
    batch = one(random_batch(0, rows=2)) | {"length": jnp.array([13, 9])}
    learned = jax.random.bernoulli(jax.random.key(0), 0.4, (2, 13))
    eval_step = make_eval_step(graph, next_token_loss)
    loss, weight, _ = eval_step(state.params, batch | {"learned": learned})
    logits = nnx.merge(graph, state.params)(batch["tokens"][:, :-1].astype(int))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:].astype(int))
    targets = learned[:, 1:].at[1, 8:].set(False)  # padding is never learned
    assert float(loss) == pytest.approx(float(jnp.sum(losses, where=targets)), rel=1e-6) and int(weight) == targets.sum()
    everything = eval_step(state.params, batch | {"learned": jnp.ones((2, 13), bool)})
    assert everything == eval_step(state.params, batch)


def test_a_document_mask_has_the_same_gradient_in_both_backends():
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, 150, heads, 8)) for key, heads in zip(keys, (6, 3, 3), strict=True))
    documents = jnp.cumsum(jax.random.bernoulli(keys[0], 0.05, (2, 150)), axis=1)
    gradients = [
        jax.jit(jax.grad(lambda x: jnp.sum(backends.causal_attention(*x, backend, documents) ** 2)))((q, k, v))  # noqa: B023
        for backend in ("xla", "blocked")
    ]
    for a, b in zip(*gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.slow
def test_dropout_drops_its_share_by_step_and_seed_and_never_in_evaluation():
    def loss(seed=1, steps=1, rate=0.3):
        graph, train_step, state = make(model={"dropout": rate, "attention": "xla"}, learning_rate=1e-9, min_lr=0.0, seed=seed)
        evaluated = make_eval_step(graph, next_token_loss)(state.params, one(random_batch(0)))
        for _ in range(steps):
            state, metrics = train_step(state, random_batch(0))
        return float(metrics["train/loss"]), float(evaluated[0] / evaluated[1])

    (trained, evaluated), without = loss(), loss(rate=0.0)
    assert trained == loss()[0]
    assert len({trained, loss(seed=2)[0], loss(steps=2)[0], without[0]}) == 4
    assert evaluated == without[1] == pytest.approx(without[0], rel=1e-6)
    x = layers.dropout(jnp.ones((2, 50_000)), 0.3, jax.random.split(jax.random.key(0)))
    assert not jnp.array_equal(x[0], x[1])
    assert float(jnp.mean(x == 0)) == pytest.approx(0.3, abs=0.01) and float(jnp.mean(x)) == pytest.approx(1, abs=0.01)


def test_each_dropout_of_the_model_drops_something():
    """Embedding, attention weights, and both residual branches: with a rate, each of their keys changes the logits."""
    model = nnx.merge(*nnx.split(Transformer(llama.model_config(dropout=0.5, attention="xla"), nnx.Rngs(0))))
    tokens = one(random_batch(0))["tokens"][:, :-1].astype(int)
    calls = []
    original = layers.dropout
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            layers, "dropout", lambda x, rate, key_B: calls.append((x.shape, rate, key_B)) or original(x, rate, key_B)
        )
        model(tokens, dropout_key_B=jax.random.split(jax.random.key(0), len(tokens)))
    c = model.c
    assert len(calls) == 1 + 3 * c.n_layers and all(rate == 0.5 for _, rate, _ in calls)
    keys = jnp.concatenate([jax.random.key_data(key_B) for _, _, key_B in calls])
    assert len(jnp.unique(keys, axis=0)) == len(calls) * len(tokens)
    assert sum(len(shape) == 5 for shape, _, _ in calls) == c.n_layers  # the weights (B, K, G, S, T)


def test_dropout_needs_a_backend_that_can():
    request = Request(np.dtype("float32"), 32, 512, 0.1, Device("cpu"))
    assert backends.choose("auto", request)[0] == "xla"
    with pytest.raises(
        UserError,
        match=r"model\.attention: blocked is unavailable: it has no dropout .*dropout is 0\.1 \(expected auto or xla\)",
    ):
        backends.choose("blocked", request)


# ---- float16, and steps that are left out ----------------------------------------------------------------------------

HALF = {"dtype": np.dtype("float16"), "attention": "xla"}


def test_the_loss_scale_equals_pytorchs():
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=train_state.LossScale.GROW_AFTER)
    parameter = torch.nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([parameter], lr=0.0)
    ours = train_state.LossScale(jnp.float32(2**16), jnp.int32(0))
    update = jax.jit(train_state.LossScale.update)
    rng = np.random.default_rng(0)
    for step in range(5000):
        finite = bool(rng.random() > (0.002 if step < 1000 else 0))
        theirs.scale(torch.zeros(1))  # what makes its scale a tensor
        parameter.grad = torch.tensor([1.0 if finite else float("inf")])
        theirs.step(sgd)
        theirs.update()
        ours = update(ours, jnp.bool_(finite))
        assert float(ours.scale) == theirs.get_scale(), step


def test_float16_skips_an_overflow_halves_the_scale_and_goes_on():
    _, train_step, state = make(model=HALF, warmup_steps=0)
    state, metrics = train_step(state, random_batch(0))
    assert float(metrics["bad_steps"]) == 0 and float(metrics["loss_scale"]) == 2**16
    state = state.replace(loss_scale=state.loss_scale.replace(scale=jnp.float32(2**40)))
    before = jax.tree.map(np.asarray, (state.params, state.ema_params, state.opt_state))
    state, metrics = train_step(state, random_batch(1))
    assert not np.isfinite(float(metrics["grad_norm"])) and float(metrics["bad_steps"]) == 1
    jax.tree.map(np.testing.assert_array_equal, before, (state.params, state.ema_params, state.opt_state))
    assert float(state.loss_scale.scale) == 2**39 and int(state.step) == 2
    skipped = 1
    while float(metrics["bad_steps"]):
        state, metrics = train_step(state, random_batch(2))
        skipped += 1
    assert 10 < skipped < 35 and int(state.bad_steps) == 0


@pytest.mark.slow
def test_float16_learns_as_float32_does():
    losses = []
    for model in (HALF, {}):
        _, train_step, state = make(model=model, learning_rate=3e-3, min_lr=3e-4)
        for step in range(30):
            state, metrics = train_step(state, random_batch(step % 3))
        losses.append(float(metrics["train/loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=0.05) and losses[0] < 4


def test_a_step_that_is_not_finite_changes_nothing_and_names_the_leaf():
    _, train_step, state = make(warmup_steps=0)
    state, _ = train_step(state, random_batch(0))
    good = jax.tree.map(np.asarray, state)
    block = state.params["blocks"][1]["feed_forward"]["w2_DF"]
    broken = jax.tree.map(lambda p: p.at[0, 0].set(jnp.inf) if p is block[...] else p, state.params)
    state, metrics = train_step(state.replace(params=broken), random_batch(1))
    assert float(metrics["bad_steps"]) == 1 and int(state.bad_steps) == 1
    jax.tree.map(np.testing.assert_array_equal, good.opt_state, state.opt_state)
    jax.tree.map(np.testing.assert_array_equal, good.ema_params, state.ema_params)
    assert float(metrics["lr"]) > 0 and not np.isfinite(metrics["leaf_norms"]).all()
