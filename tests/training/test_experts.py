"""Training a mixture of experts: its auxiliary loss, its metrics, its optimizer, and a run from the command's loop to sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mateconv_jax import GenerationConfig, TextGenerator, config as config_lib
from mateconv_jax.model.transformer import abstract_model
from mateconv_jax.training import optimizer, train_state
from mateconv_jax.training.step import LossOptions, make_train_step, summed_loss
from tests import llama
from tests.training.runs import metrics_of, train

MIXTURE = dict(use_moe=True, dim=32, n_heads=4, n_kv_heads=2, hidden_dim=32)
KEYS = {"train/auxiliary_loss", "experts/entropy", "experts/most_loaded", "experts/least_loaded"}


def make(model=MIXTURE, loss=LossOptions(), **changes):
    c = llama.model_config(**model)
    options = config_lib.default_config().training
    options.update(dict(learning_rate=1e-2, min_lr=1e-3, warmup_steps=0) | changes)
    tx = optimizer.make_optimizer(options, c)
    graph, _ = abstract_model(c)
    step = make_train_step(graph, tx, optimizer.make_schedule(options, 50), options, loss)
    return graph, step, train_state.init(c, tx, 0, False)


def random_batch(seed, lengths, micro_batches=1, seq_len=12):
    lengths = jnp.array(lengths, jnp.int32).reshape(micro_batches, -1)
    tokens = jax.random.randint(jax.random.key(seed), (*lengths.shape, seq_len + 1), 0, 96)
    return {"tokens": tokens.astype(jnp.uint16), "length": lengths}


def crowded(params):
    """As if training had gone wrong: every token takes the same two experts."""
    params["embedding_VD"] = nnx.Param(params["embedding_VD"][...] + 0.1)
    for block in params["blocks"].values():
        gate_ED = block["feed_forward"]["gate_ED"][...]
        block["feed_forward"]["gate_ED"] = nnx.Param(gate_ED.at[:2].add(0.05))
    return params


@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_the_auxiliary_loss_spreads_tokens_over_the_experts(alpha):
    _, train_step, state = make(model=MIXTURE | {"aux_loss_alpha": alpha})
    state = state.replace(params=crowded(state.params))
    for step in range(40):
        state, metrics = train_step(state, random_batch(step % 3, [13] * 4))
        if step == 0:
            first = metrics
    assert float(first["experts/least_loaded"]) == 0 and float(first["experts/most_loaded"]) == 0.5
    assert float(metrics["train/loss"]) < 0.8 * float(first["train/loss"])
    if alpha:
        assert float(metrics["train/auxiliary_loss"]) < 0.8 * float(first["train/auxiliary_loss"])
        assert float(metrics["experts/least_loaded"]) > 0.1 and float(metrics["experts/most_loaded"]) < 0.4
    else:
        assert float(metrics["train/auxiliary_loss"]) == 0 and float(metrics["experts/least_loaded"]) < 0.05
    assert train_step._cache_size() == 1


def test_the_auxiliary_loss_is_in_the_objective_and_not_in_the_loss():
    graph, _, state = make()
    batch = jax.tree.map(lambda x: x[0], random_batch(0, [13, 13, 5, 1]))
    loss, count, objective, routing = summed_loss(graph, state.params, batch)
    logits = nnx.merge(graph, state.params)(batch["tokens"][:, :-1].astype(int))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:].astype(int))
    assert float(loss) == pytest.approx(float(losses[:2].sum() + losses[2, :4].sum()), rel=1e-5)
    assert float(objective - loss) == pytest.approx(float(jnp.sum(routing.auxiliary_loss)), rel=1e-3)
    # An even load has 1 a layer, times alpha; there are 2 layers.
    assert 0.02 < float(objective - loss) / float(count) < 0.03
    assert jnp.sum(routing.chosen_E, axis=1).tolist() == [2 * (12 + 12 + 4)] * 2


def test_accumulated_micro_batches_equal_the_large_batch():
    lengths = [13, 4, 9, 13, 2, 1, 0, 2, 13, 13, 7, 5]
    large = random_batch(0, lengths)
    small = jax.tree.map(lambda x: x.reshape(3, 4, *x.shape[2:]), large)
    results = []
    for batch, accumulation_steps in ((large, 1), (small, 3)):
        # A large weight, and a plain multiple of the gradient as update: Adam would blow up rounding.
        _, train_step, state = make(
            MIXTURE | {"aux_loss_alpha": 1.0}, accumulation_steps=accumulation_steps, optimizer_type="adafactor"
        )
        state, metrics = train_step(state, batch)
        results.append((state.params, metrics))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), results[0][0], results[1][0])
    assert results[0][1].keys() == results[1][1].keys() > KEYS
    for name in KEYS | {"train/loss", "grad_norm"}:
        assert float(results[0][1][name]) == pytest.approx(float(results[1][1][name]), rel=1e-5)


def test_remat_gives_the_same_gradient():
    graph, _, state = make()
    batch = jax.tree.map(lambda x: x[0], random_batch(0, [13, 5]))
    gradients = [
        jax.jit(jax.grad(lambda params: summed_loss(graph, params, batch, LossOptions(remat=remat))[2]))(state.params)  # noqa: B023
        for remat in ("none", "full")
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *gradients)


def test_muon_orthogonalises_each_expert_by_itself_and_leaves_the_gate_to_adamw():
    c = llama.model_config(**MIXTURE)
    params = train_state.init(c, optax.identity(), 0, False).params
    labels = optimizer.muon_labels(optimizer.to_parts(params, c))["blocks"][1]["feed_forward"]
    assert labels == {
        "gate_ED": "adamw", "w1_EFD": "muon", "w3_EFD": "muon", "w2_EDF": "muon",
        "shared_experts": {"w1_FD": "muon", "w3_FD": "muon", "w2_DF": "muon"},
    }  # fmt: skip
    options = config_lib.default_config().training
    options.update(dict(optimizer_type="muon", grad_clip=0.0))
    tx = optimizer.make_optimizer(options, c)
    gradients = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape), params)

    def updates_of(gradients):
        updates, _ = tx.update(gradients, tx.init(params), params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        return optimizer.to_parts(updates, c)["blocks"][1]["feed_forward"]

    updates = updates_of(gradients)
    # An expert's update is that of a feed-forward layer with its gradient and its weights.
    for e in range(4):
        for tree in (params, gradients):
            layer = tree["blocks"][1]["feed_forward"]
            layer["shared_experts"]["w13_2FD"] = nnx.Param(layer["w13_E2FD"][...][e])
            layer["shared_experts"]["w2_DF"] = nnx.Param(layer["w2_EDF"][...][e])
        alone = updates_of(gradients)["shared_experts"]
        for name in ("w1_EFD", "w3_EFD", "w2_EDF"):
            np.testing.assert_allclose(updates[name][e], alone[name.replace("E", "")], atol=1e-5)


def test_a_run_logs_its_experts_and_its_model_speaks(tiny_config, tmp_path):
    """With what could get in a mixture's way: dropout, remat, documents, accumulation, muon, bfloat16."""
    tiny_config.model.update(dict(use_moe=True, dropout=0.1, n_routed_experts=3))
    options = dict(
        max_steps=6,
        accumulation_steps=2,
        remat="full",
        document_mask=True,
        optimizer_type="muon",
        dtype="bfloat16",
        use_ema=True,
    )
    assert train(tiny_config, tmp_path / "out", **options) == 0
    logged = [line for line in metrics_of(tmp_path / "out") if "train/loss" in line]
    assert len(logged) == 6 and all(line.keys() > KEYS for line in logged)
    for line in logged:
        assert 0 <= line["experts/least_loaded"] <= 1 / 3 <= line["experts/most_loaded"] <= 0.5
        assert 0 < line["experts/entropy"] <= np.log(3) + 1e-6
    log = (tmp_path / "out" / "train.log").read_text()
    assert "parameters, of which a token meets" in log and "dense experts" in log

    generator = TextGenerator.from_pretrained(tmp_path / "out")
    model = generator.model
    text = generator.generate("熊猫", GenerationConfig(max_new_tokens=12, do_sample=False))
    assert text
