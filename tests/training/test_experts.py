"""Training a mixture of experts: its auxiliary loss, its metrics, its optimizer, and a run from the command's loop to sampling."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mateconv_jax import GenerationConfig, TextGenerator, config as config_lib
from mateconv_jax.losses.next_token import next_token_loss
from mateconv_jax.model.transformer import abstract_model
from mateconv_jax.training import optimizer, train_state
from mateconv_jax.training.step import make_train_step
from tests import llama
from tests.training.runs import metrics_of, train

MIXTURE = dict(use_moe=True, n_layers=1, dim=32, n_heads=4, n_kv_heads=2, hidden_dim=32)
KEYS = {"train/auxiliary_loss", "experts/entropy", "experts/most_loaded", "experts/least_loaded"}


def make(model=MIXTURE, **changes):
    c = llama.model_config(**model)
    options = config_lib.default_config().training
    options.update(dict(learning_rate=1e-2, min_lr=1e-3, warmup_steps=0) | changes)
    tx = optimizer.make_optimizer(options, c)
    graph, _ = abstract_model(c)
    step = make_train_step(graph, next_token_loss, tx, optimizer.make_schedule(options, 50), options)
    return graph, step, train_state.init(c, tx, 0, False)


def random_batch(seed, lengths, micro_batches=1, seq_len=12):
    lengths = jnp.array(lengths, jnp.int32).reshape(micro_batches, -1)
    tokens = jax.random.randint(jax.random.key(seed), (*lengths.shape, seq_len + 1), 0, 96)
    return {"tokens": tokens.astype(jnp.uint16), "length": lengths}


def one(batch):
    """Its only micro-batch."""
    return jax.tree.map(lambda x: x[0], batch)


def crowded(params):
    """As if training had gone wrong: every token takes the same two experts."""
    params["embedding_VD"] = nnx.Param(params["embedding_VD"][...] + 0.03)
    feed_forward = params["blocks"][0]["feed_forward"]
    feed_forward["gate_ED"] = nnx.Param(feed_forward["gate_ED"][...].at[:2].add(0.1))
    return params


def test_the_auxiliary_loss_spreads_tokens_over_the_experts():
    least_loaded = {}
    for alpha in (0.0, 0.1):
        _, train_step, state = make(MIXTURE | {"aux_loss_alpha": alpha}, lr_scheduler="constant")
        state = state.replace(params=crowded(state.params))
        steps = []
        for step in range(40):
            state, metrics = train_step(state, random_batch(step % 3, [13] * 4))
            steps.append({key: float(metrics[key]) for key in KEYS | {"train/loss"}})
        assert train_step._cache_size() == 1
        first, last = steps[0], steps[-1]
        assert first["experts/least_loaded"] == 0 and first["experts/most_loaded"] == 0.5
        assert last["train/loss"] < 0.5 * first["train/loss"]
        assert last["train/auxiliary_loss"] <= 0.7 * first["train/auxiliary_loss"]
        least_loaded[alpha] = np.mean([step["experts/least_loaded"] for step in steps[-10:]])
    assert least_loaded[0.1] > 1.5 * least_loaded[0.0]  # 0.17 and 0.08; 0.25 would be even


def test_the_auxiliary_loss_is_in_the_objective_and_not_in_the_loss():
    graph, _, state = make()
    batch = one(random_batch(0, [13, 13, 5, 1]))
    loss, count, objective, metrics = jax.jit(lambda params: next_token_loss(nnx.merge(graph, params), batch))(state.params)
    routing = metrics["experts"]
    logits = jax.jit(lambda params: nnx.merge(graph, params)(batch["tokens"][:, :-1].astype(int)))(state.params)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:].astype(int))
    assert float(loss) == pytest.approx(float(losses[:2].sum() + losses[2, :4].sum()), rel=1e-5)
    assert float(objective - loss) == pytest.approx(float(routing.auxiliary_loss[0]), rel=1e-3)
    assert 0.01 < float(objective - loss) / float(count) < 0.015  # alpha times 1, were the load even
    assert float(jnp.sum(routing.chosen_E)) == 2 * (12 + 12 + 4)


def test_accumulated_micro_batches_equal_the_large_batch():
    large = random_batch(0, [13, 4, 9, 13, 2, 1, 0, 2, 13, 13, 7, 5])
    small = jax.tree.map(lambda x: x.reshape(3, 4, *x.shape[2:]), large)
    results = []
    for batch, accumulation_steps in ((large, 1), (small, 3)):
        _, train_step, state = make(MIXTURE | {"aux_loss_alpha": 1.0}, accumulation_steps=accumulation_steps)
        results.append(train_step(state, batch)[1])
    assert results[0].keys() == results[1].keys() > KEYS
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), *results)


def test_remat_gives_the_same_gradient():
    graph, _, state = make()
    batch = one(random_batch(0, [13, 5]))

    def objective(params, remat):
        return next_token_loss(nnx.merge(graph, params), batch, remat=remat).objective

    gradients = [jax.jit(jax.grad(objective), static_argnums=1)(state.params, remat) for remat in ("none", "full")]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *gradients)


def test_muon_orthogonalises_each_expert_by_itself_and_leaves_the_gate_to_adamw():
    c = llama.model_config(**MIXTURE)
    params = train_state.init(c, optax.identity(), 0, False).params
    labels = optimizer.muon_labels(optimizer.to_parts(params, c))["blocks"][0]["feed_forward"]
    assert labels == {
        "gate_ED": "adamw", "w1_EFD": "muon", "w3_EFD": "muon", "w2_EDF": "muon",
        "shared_experts": {"w1_FD": "muon", "w3_FD": "muon", "w2_DF": "muon"},
    }  # fmt: skip
    options = config_lib.default_config().training
    options.update(dict(optimizer_type="muon", grad_clip=0.0))
    tx = optimizer.make_optimizer(options, c)
    gradients = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape), params)

    @jax.jit
    def updates_of(gradients, params):
        updates, _ = tx.update(gradients, tx.init(params), params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        return optimizer.to_parts(updates, c)["blocks"][0]["feed_forward"]

    updates = updates_of(gradients, params)
    # An expert's update is that of a feed-forward layer with its gradient and its weights.
    for e in range(4):
        for tree in (params, gradients):
            layer = tree["blocks"][0]["feed_forward"]
            layer["shared_experts"]["w13_2FD"] = nnx.Param(layer["w13_E2FD"][...][e])
            layer["shared_experts"]["w2_DF"] = nnx.Param(layer["w2_EDF"][...][e])
        alone = updates_of(gradients, params)["shared_experts"]
        for name in ("w1_EFD", "w3_EFD", "w2_EDF"):
            np.testing.assert_allclose(updates[name][e], alone[name.replace("E", "")], atol=1e-5)


@pytest.mark.slow
def test_a_run_logs_its_experts_and_its_model_speaks(tiny_config, tmp_path):
    """With what could get in a mixture's way: dropout, remat, documents, accumulation, bfloat16."""
    tiny_config.model.update(dict(use_moe=True, n_layers=1, dropout=0.1, n_routed_experts=3, experts="ragged"))
    options = dict(max_steps=3, accumulation_steps=2, remat="full", document_mask=True, dtype="bfloat16")
    assert train(tiny_config, tmp_path / "out", **options) == 0
    logged = [line for line in metrics_of(tmp_path / "out") if "train/loss" in line]
    assert len(logged) == 3 and all(line.keys() > KEYS for line in logged)
    for line in logged:
        assert 0 <= line["experts/least_loaded"] < 1 / 3 < line["experts/most_loaded"] <= 0.5
        assert 0 < line["experts/entropy"] < np.log(3)
    log = (tmp_path / "out" / "train.log").read_text()
    [(total, active)] = re.findall(r"model: ([0-9,]+) parameters, ([0-9,]+) active per token; ragged experts", log)
    expert = 3 * 32 * 128
    assert int(total.replace(",", "")) - int(active.replace(",", "")) == expert

    generator = TextGenerator.from_pretrained(tmp_path / "out", dtype="float32")
    config = GenerationConfig(max_new_tokens=8, min_new_tokens=8, temperature=1.0)
    prompts = ["熊猫", "今天"]
    written = generator.batch_generate(prompts, config)
    assert written == generator.batch_generate(prompts, dataclasses.replace(config, use_cache=False))
    assert len({*written}) == 2 and all(len(generation.token_ids) == 8 for generation in written)
