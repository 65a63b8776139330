"""training.init_from with a vocabulary that grew: a tokenizer with added tokens, more rows than it needs."""

import copy
import dataclasses

import jax
import numpy as np
import pytest

from mateconv_jax import TextGenerator, config as config_lib
from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib
from mateconv_jax.errors import UserError
from mateconv_jax.interop import formats
from mateconv_jax.model.config import ModelConfig, ModelOptions
from mateconv_jax.model.transformer import abstract_model
from mateconv_jax.training import initial_weights
from tests.training.processes import Training
from tests.training.runs import flags_of, train

KINDS = ["run", "folder", "model.pth", "model.gguf"]
FROZEN = dict(max_steps=1, learning_rate=1e-12, min_lr=0.0)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def models(request, base_tiny_config, tmp_path_factory):
    """One model of 520 rows for a tokenizer of 400 in every format."""
    config = copy.deepcopy(base_tiny_config)
    config.model.update(dict(vocab_size=520, tie_word_embeddings=request.param))
    folder = tmp_path_factory.mktemp("models")
    train(config, folder / "run", max_steps=2)
    for kind in KINDS[1:]:
        formats.convert(folder / "run", folder / kind)
    return folder


def bigger(model, n_tokens):
    config = model.config.copy_and_resolve_references()
    config.model.vocab_size = n_tokens
    return config


def table_of(run) -> np.ndarray:
    model = formats.open_model(run, "x")
    return np.asarray(
        model.params(abstract_model(ModelConfig.make(config_lib.options(ModelOptions, model.config.model), "float32"))[1])[
            "embedding_VD"
        ][...]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_new_rows_are_the_mean_and_old_ones_as_they_were(kind, models):
    model = formats.open_model(models / kind, "x")
    _, own_shapes = abstract_model(ModelConfig.make(config_lib.options(ModelOptions, model.config.model), "float32"))
    _, shapes = abstract_model(ModelConfig.make(config_lib.options(ModelOptions, bigger(model, 527).model), "float32"))
    own, params = model.params(own_shapes), initial_weights.read(model, shapes)
    tables = ["embedding_VD"] if model.config.model.tie_word_embeddings else ["embedding_VD", "output_VD"]
    for table in tables:
        was_VD, now_VD = np.asarray(own[table][...]), np.asarray(params[table][...])
        np.testing.assert_array_equal(now_VD[:520], was_VD)
        np.testing.assert_allclose(now_VD[520:], np.tile(was_VD.mean(0, dtype=np.float64), (7, 1)), atol=1e-7)
        own[table], params[table] = own[table][...], params[table][:520]
    jax.tree.map(np.testing.assert_array_equal, own, params)


@pytest.mark.slow
def test_a_run_starts_with_new_tokens(models, base_tiny_config, dataset_folder, tmp_path):
    """Logits of old tokens stay; the EMA has the rows too."""
    tokenizer = tokenizer_lib.load(dataset_folder / "tokenizer", "")
    tokenizer.add_tokens(["<tool>", "<answer>"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    model = formats.open_model(models / "folder", "x")
    tied = model.config.model.tie_word_embeddings
    config = copy.deepcopy(base_tiny_config)
    config.model.update(dict(vocab_size=522, tie_word_embeddings=tied))
    train(config, tmp_path / "out", init_from=str(models / "folder"), use_ema=True, **FROZEN)
    log = (tmp_path / "out" / "train.log").read_text()
    tables = "the embedding" if tied else "the embedding and the output layer"
    assert f"the vocabulary grows from 520 to 522: the new rows of {tables} are the mean of the old" in log
    ours, theirs = (TextGenerator.from_pretrained(path) for path in (tmp_path / "out", models / "folder"))
    tokens_BS = [[1, 30, 77, 350, 8]]
    np.testing.assert_allclose(ours.logits(tokens_BS)[..., :520], theirs.logits(tokens_BS), atol=1e-5)
    rows_VD = table_of(tmp_path / "out")  # the EMA's
    np.testing.assert_allclose(rows_VD[520:], np.tile(rows_VD[:520].mean(0), (2, 1)), atol=1e-6)

    config.data.tokenizer_path = str(tmp_path / "tokenizer")
    said = initial_weights.check(model, config_lib.resolve(config), tokenizer)
    assert said[1] == f"the dataset's tokenizer is that of {models / 'folder'} with 2 more tokens"


@pytest.mark.slow
def test_new_rows_on_eight_devices(server, models, base_tiny_config, tmp_path):
    """520 rows are split over the devices; 527 cannot be, and the features are."""
    model = formats.open_model(models / "run", "x").config.model
    config = copy.deepcopy(base_tiny_config)
    config.model.update(dict(vocab_size=527, tie_word_embeddings=model.tie_word_embeddings))
    config.training.update(dict(init_from=str(models / "run"), **FROZEN))
    flags = [*flags_of(config, tmp_path / "out"), "--config.mesh.fsdp=8"]
    Training(flags, tmp_path / "log", {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}).finish()
    was_VD, now_VD = table_of(models / "run"), table_of(tmp_path / "out")
    np.testing.assert_allclose(now_VD, np.concatenate([was_VD, np.tile(was_VD.mean(0), (7, 1))]), atol=1e-6)


def test_a_smaller_vocabulary_is_an_error(models, base_tiny_config, tmp_path):
    model = formats.open_model(models / "run", "x")
    config = bigger(model, 519)
    with pytest.raises(UserError, match=r"model\.vocab_size: 519, but the weights in .* have 520 \(expected at least 520\)"):
        initial_weights.check(model, config, model.tokenizer)


def test_another_tokenizer_is_not_taken_for_an_extended_one(models):
    model = formats.open_model(models / "run", "x")
    tokenizer = tokenizer_lib.load(models / "run" / "tokenizer", "")
    tokenizer.add_tokens(["<tool>"])
    longer = tokenizer_lib.load(models / "run" / "tokenizer", "")
    longer.add_tokens(["<answer>", "<tool>"])
    model = dataclasses.replace(model, tokenizer=tokenizer)
    said = initial_weights.check(model, model.config, longer)
    assert said == [f"the tokenizer of {model.path} is not the dataset's: 1 of its token ids stand for other text"]
