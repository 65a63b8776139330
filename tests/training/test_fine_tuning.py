"""Fine-tuning on dialogues: whole in packed rows, with a mask of what is learned."""

import json

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from mateconv_jax import config as config_lib
from mateconv_jax.data import rows as rows_lib
from mateconv_jax.data.build import packing
from mateconv_jax.data.dataset import open_dataset
from mateconv_jax.losses.next_token import next_token_loss
from mateconv_jax.model.config import ModelConfig, ModelOptions
from mateconv_jax.model.transformer import Transformer
from mateconv_jax.planning import programs
from mateconv_jax.prepare import main as prepare, parse_args
from mateconv_jax.training import setup
from mateconv_jax.training.loop import train
from tests import llama
from tests.training.runs import assert_equal_checkpoints, losses_of, metrics_of
from tests.training.test_devices import start


@pytest.fixture(scope="session")
def dialogues_folder(dataset_folder, demo_jsonl, tmp_path_factory):
    """The demo corpus' dialogues, packed, of which the assistant's turns are learned."""
    folder = tmp_path_factory.mktemp("dialogues")
    lines = [line for line in demo_jsonl.read_text(encoding="utf-8").splitlines() if "messages" in line]
    (folder / "raw.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    flags = ["--tokenizer", str(dataset_folder / "tokenizer"), "--seq_len", "64", "--val_fraction", "0.1", "--num_workers", "1"]
    prepare(parse_args(["--input", str(folder / "raw.jsonl"), "--output", str(folder / "data"), *flags]))
    return folder / "data"


def random_documents(n, longest, vocab_size, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(n):
        ids = rng.integers(3, vocab_size, rng.integers(3, longest), dtype=np.uint32)
        learned = rng.random(len(ids)) < 0.5
        learned[0], learned[-1] = False, True
        yield ids, learned


@pytest.mark.parametrize("attention", ["blocked", "xla"])
def test_packed_or_one_dialogue_a_row_gives_the_same_loss_and_gradients(attention):
    c = llama.model_config(attention=attention)
    graph, params = nnx.split(Transformer(c, nnx.Rngs(0)))
    documents = list(random_documents(12, 40, c.vocab_size))
    packed = packing.pack_whole(documents, 63, np.dtype(np.uint16))
    alone = packing.join([packing.pack_whole([document], 63, np.dtype(np.uint16)) for document in documents])
    assert len(packed["length"]) < len(alone["length"]) == 12

    @jax.jit
    def loss_and_gradients(params, batch):
        def mean(params):
            output = next_token_loss(nnx.merge(graph, params), batch)
            return output.sum / output.weight, output.weight

        return jax.value_and_grad(mean, has_aux=True)(params)

    (loss, weight), gradients = loss_and_gradients(params, packed)
    (expected, same_weight), expected_gradients = loss_and_gradients(params, alone)
    assert weight == same_weight == sum(learned.sum() for _, learned in documents)
    assert loss == pytest.approx(float(expected), rel=1e-5)
    largest = max(float(abs(g).max()) for g in jax.tree.leaves(expected_gradients))
    for g, e in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        np.testing.assert_allclose(g, e, atol=1e-5 * largest)


def test_twenty_steps_equal_pytorchs(dialogues_folder, base_tiny_config, tmp_path):
    """transformers' Llama on the same dialogues, one a row, with labels of -100 outside of what is learned: to 1e-4."""
    config = config_lib.resolve(fine_tuning(base_tiny_config, dialogues_folder, tmp_path / "out", max_steps=20))
    assert train(config) == 0
    ours = [m["train/loss"] for m in metrics_of(tmp_path / "out") if "train/loss" in m]

    c = ModelConfig.make(config_lib.options(ModelOptions, config.model), "float32")
    model = llama.from_ours(Transformer(c, nnx.Rngs(config.training.seed))).train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    training = config.training
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": training.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=training.learning_rate, betas=(training.beta1, training.beta2), eps=1e-8,
    )  # fmt: skip
    for step, batch in enumerate(batches_of(config, dialogues_folder)):
        optimizer.zero_grad()
        loss = torch_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.grad_clip)
        optimizer.step()
        assert ours[step] == pytest.approx(loss.item(), rel=1e-4), step
    assert step == 19 and ours[-1] < 0.9 * ours[0]


def fine_tuning(base, data, out, **training):
    config = base.copy_and_resolve_references()
    config.data.train_data_path, config.data.seq_len = str(data), 64
    config.training.update(
        dict(out_dir=str(out), learning_rate=3e-3, lr_scheduler="constant", warmup_ratio=0.0, dtype="float32") | training
    )
    return config


def batches_of(config, folder):
    from mateconv_jax.data import loader

    rows = open_dataset(folder, "", 64).rows("train", (1, 2))
    training = config.training
    batches = loader.training_batches(rows, training.batch_size, training.seed, config.data.shuffle, 0, 1)
    return (next(batches) for _ in range(training.max_steps))


def torch_loss(model, batch):
    """The mean over learned tokens, each dialogue in a row of its own, padded at its end."""
    rows = zip(*(batch[name] for name in ("tokens", "length", "document_starts", "learned")), strict=True)
    ids, labels = [], []
    for tokens, length, starts, learned in rows:
        bounds = [*np.flatnonzero(starts[:length]), length]
        for a, b in zip(bounds, bounds[1:], strict=False):
            ids.append(torch.tensor(tokens[a:b].astype(np.int64)))
            labels.append(torch.where(torch.tensor(learned[a:b]), ids[-1], -100))
    ids, labels = (torch.nn.utils.rnn.pad_sequence(x, batch_first=True, padding_value=p) for x, p in ((ids, 0), (labels, -100)))
    return torch.nn.functional.cross_entropy(
        model(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )


def test_a_token_weighs_the_same_wherever_it_stands(dialogues_folder, base_tiny_config, tmp_path):
    """8 rows at once or as 4 micro-batches of 2, whose numbers of learned tokens differ."""
    losses = []
    for name, shape in (("whole", dict(batch_size=8)), ("parts", dict(batch_size=2, accumulation_steps=4))):
        config = config_lib.resolve(fine_tuning(base_tiny_config, dialogues_folder, tmp_path / name, max_steps=3, **shape))
        assert train(config) == 0
        losses.append([m["train/loss"] for m in metrics_of(tmp_path / name) if "train/loss" in m])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_init_from_brings_the_shape_of_the_model_and_samples_are_answers(
    dataset_folder, dialogues_folder, base_tiny_config, tmp_path
):
    config = base_tiny_config.copy_and_resolve_references()
    config.training.update(dict(out_dir=str(tmp_path / "base"), max_steps=2))
    assert train(config_lib.resolve(config)) == 0
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')

    config = config_lib.default_config()
    config.data.update(dict(train_data_path=str(dialogues_folder), seq_len=64))
    config.training.update(
        dict(out_dir=str(tmp_path / "sft"), init_from=str(tmp_path / "base"), max_steps=2, batch_size=4, samples_interval=2)
    )
    config.training.update(dict(sample_chat=True, sample_prompts=("你好",)))
    assert train(config_lib.resolve(config)) == 0
    log = (tmp_path / "sft" / "train.log").read_text()
    assert "the model's shape is that of the weights: dim 32, n_layers 1" in log
    assert json.loads((tmp_path / "sft" / "config.json").read_text())["model"]["dim"] == 32
    # The same command goes on, the weights that it began with gone or not.
    (tmp_path / "base").rename(tmp_path / "moved")
    config.training.max_steps = 3
    assert train(config_lib.resolve(config)) == 0
    assert json.loads((tmp_path / "sft" / "generation_config.json").read_text()) == {"eos_token_id": [2, 7]}
    config.model.n_layers = 3
    with pytest.raises(Exception, match="model.n_layers: 3, but the run in"):
        train(config_lib.resolve(config))


def test_validation_and_evaluation_count_learned_tokens_alone(dialogues_folder, base_tiny_config, tmp_path):
    from mateconv_jax.evaluation import held_out

    config = config_lib.resolve(fine_tuning(base_tiny_config, dialogues_folder, tmp_path / "out", max_steps=2, eval_interval=2))
    assert train(config) == 0
    [val_loss] = [m["val/loss"] for m in metrics_of(tmp_path / "out") if "val/loss" in m]
    rows = open_dataset(dialogues_folder, "", 64).rows("validation", (1, 2))
    learned = rows_lib.learned_targets(rows.read(np.arange(len(rows))))
    result = held_out.evaluate_run(tmp_path / "out", [str(dialogues_folder)])
    assert result["tokens"] == learned.sum() < 0.8 * learned.size
    assert result["scores"]["raw"]["loss"] == pytest.approx(val_loss, rel=1e-5)


@pytest.mark.slow
def test_going_on_equals_going_straight_to_the_bit(dialogues_folder, base_tiny_config, tmp_path):
    """With a mixture of experts, EMA, dropout and accumulation, over an epoch's end."""
    config = fine_tuning(base_tiny_config, dialogues_folder, tmp_path / "straight", batch_size=4, accumulation_steps=2)
    config.model.update(dict(use_moe=True, dropout=0.1))
    config.training.update(dict(use_ema=True, save_interval=4, eval_interval=4))
    for name, stops in (("straight", (8,)), ("stopped", (4, 8))):
        config.training.out_dir = str(tmp_path / name)
        for stop in stops:
            config.training.max_steps = stop
            assert train(config_lib.resolve(config)) == 0
    assert_equal_checkpoints(tmp_path / "straight", tmp_path / "stopped", 8)
    assert losses_of(tmp_path / "straight") == losses_of(tmp_path / "stopped")


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--config.mesh.fsdp=8",), ("--config.training.dtype=float16", "--config.mesh.fsdp=2")])
def test_eight_devices_give_the_losses_of_one(server, dialogues_folder, base_tiny_config, tmp_path, flags):
    config = fine_tuning(base_tiny_config, dialogues_folder, tmp_path / "one", accumulation_steps=2, max_steps=6)
    config.model.dim = 128
    tolerance = 5e-3 if "float16" in str(flags) else 1e-5
    start(config, tmp_path / "one" / "out", 1).finish()
    start(config, tmp_path / "eight" / "out", 8, flags).finish()
    ours, theirs = losses_of(tmp_path / "eight" / "out"), losses_of(tmp_path / "one" / "out")
    assert len(theirs) >= 6
    for key in theirs:
        assert ours[key] == pytest.approx(theirs[key], abs=tolerance)


def test_plan_compiles_the_step_of_packed_dialogues(dialogues_folder, base_tiny_config, tmp_path):
    config = config_lib.resolve(fine_tuning(base_tiny_config, dialogues_folder, tmp_path / "out", max_steps=2))
    run = programs.training_step(config, setup.model_config(config), None, 2)
    assert {"document_starts", "learned"} <= run.abstract_batch.keys()
    assert programs.measure(run, run.train_step.lower(run.abstract_state, run.abstract_batch).compile(), seconds=0.1) > 0
