"""Exported folders of every architecture: transformers' logits, and bit-identical when read back."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from mateconv_jax import TextGenerator, config as config_lib
from mateconv_jax.data.tokenizer import tokenizer as tokenizer_lib
from mateconv_jax.errors import UserError
from mateconv_jax.interop import formats, hf_config, hugging_face, weight_mapping
from mateconv_jax.interop.stored_model import StoredModel
from mateconv_jax.model.config import ModelConfig, ModelOptions
from mateconv_jax.model.transformer import init_params

MODELS = {
    "Llama 3, untied": dict(rope_factor=8.0, rope_original_max_seq_len=32, tie_word_embeddings=False),
    "YaRN, untied": dict(
        rope_scaling="yarn", rope_factor=4.0, rope_original_max_seq_len=32, rope_beta_fast=16.0, rope_truncate=False,
        rope_attention_factor=1.3, tie_word_embeddings=False,
    ),
    "Qwen2": dict(qkv_bias=True),
    "Qwen3, a free head_dim": dict(qk_norm=True, head_dim=16, rope_theta=1e6, norm_eps=1e-6),
    "Qwen2Moe": dict(use_moe=True, n_routed_experts=3),
    "Qwen2Moe, one expert, biases": dict(use_moe=True, num_experts_per_tok=1, qkv_bias=True),
    "Qwen3Moe": dict(use_moe=True, qk_norm=True, n_shared_experts=0, head_dim=16, norm_topk_prob=False),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(dataset_folder):
    return tokenizer_lib.load(dataset_folder / "tokenizer", "")


def write(folder, tokenizer, **changes):
    """A random model, peaked enough, as a folder; its config and parameters."""
    shape = dict(dim=64, n_layers=2, n_heads=8, n_kv_heads=4, hidden_dim=96, vocab_size=400, max_seq_len=128)
    config = hf_config.configuration(shape | changes, "x")
    params = jax.jit(lambda: init_params(ModelConfig.make(config_lib.options(ModelOptions, config.model), "float32"), 0))()
    keys = iter(jax.random.split(jax.random.key(1), 1000))
    params = jax.tree.map(lambda p: 4 * p if p.ndim > 1 else p + 0.3 * jax.random.normal(next(keys), p.shape), params)
    folder.mkdir()
    hugging_face.write_folder(folder, StoredModel(folder, config, tokenizer, False, None, None), params)
    return config, params


def test_all_end_tokens_go_through_every_format(tokenizer, tmp_path):
    write(tmp_path / "hf", tokenizer)
    path = tmp_path / "hf" / "generation_config.json"
    settings = json.loads(path.read_text())
    assert settings["eos_token_id"] == 2
    path.write_text(json.dumps(settings | {"eos_token_id": [7, 2, 9]}))
    formats.convert(tmp_path / "hf", tmp_path / "run", "run")
    formats.convert(tmp_path / "run", tmp_path / "model.gguf")
    formats.convert(tmp_path / "model.gguf", tmp_path / "again", "hf")
    for name in ("hf", "run", "model.gguf", "again"):
        assert TextGenerator.from_pretrained(tmp_path / name).end_ids == (2, 7, 9)
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "again").eos_token_id == [2, 7, 9]
    path.write_text(json.dumps(settings | {"eos_token_id": 400}))
    with pytest.raises(UserError, match=r"eos_token_id: \[400\] is invalid \(expected token ids from 0 to 399"):
        TextGenerator.from_pretrained(tmp_path / "hf")


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_logits_equal_transformers_and_its_own_save_reads_back_bit_for_bit(changes, tokenizer, tmp_path):
    config, params = write(tmp_path / "ours", tokenizer, **changes)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(theirs).__name__ == hf_config.architecture(config.model)
    tokens_BS = np.random.default_rng(0).integers(0, 400, (2, 100))  # beyond rope_original_max_seq_len
    with torch.no_grad():
        expected_BSV = theirs(torch.tensor(tokens_BS)).logits.numpy()
    assert np.abs(expected_BSV).max() > 1
    generator = TextGenerator.from_pretrained(tmp_path / "ours")
    np.testing.assert_allclose(generator.logits(tokens_BS), expected_BSV, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        model = formats.open_model(tmp_path / folder, "x")
        back = model.params(jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params))
        jax.tree.map(np.testing.assert_array_equal, back, params)
        expected = config.model.to_dict() | {"norm_topk_prob": model.config.model.norm_topk_prob}
        assert model.config.model.to_dict() == expected


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(use_moe=True, n_shared_experts=0), "model.qk_norm False and model.n_shared_experts 0"),
        (dict(use_moe=True, qk_norm=True), "model.qk_norm True and model.n_shared_experts 1"),
        (dict(qk_norm=True, qkv_bias=True), "model.qk_norm True and model.qkv_bias True"),
    ],
)
def test_models_that_transformers_has_not_are_said(changes, message, tokenizer, tmp_path):
    with pytest.raises(UserError, match=message):
        write(tmp_path / "x", tokenizer, **changes)


def test_a_gate_of_the_shared_expert_is_said(tokenizer, tmp_path):
    write(tmp_path / "x", tokenizer, use_moe=True)
    path = tmp_path / "x" / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors["model.layers.1.mlp.shared_expert_gate.weight"] += 1
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(UserError, match="layers.1.mlp.shared_expert_gate.weight is not 0"):
        formats.open_model(tmp_path / "x", "--from")


@pytest.mark.parametrize("changes", [dict(qk_norm=True, norm_eps=1e-6), dict(norm_eps=1e-5)], ids=["version 3", "version 2"])
def test_a_folder_of_minimind_itself_is_read(changes, tokenizer, tmp_path):
    """Its own class of model, with weights in pytorch_model.bin."""
    folder = tmp_path / "minimind"
    config, params = write(folder, tokenizer, rope_theta=1e6, **changes)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    values = json.loads((folder / "config.json").read_text())
    values |= {"architectures": ["MiniMindForCausalLM"], "model_type": "minimind", "use_moe": False, "rope_scaling": None}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in values.items() if key != "rope_parameters"}))
    model = formats.open_model(folder, "x")
    back = model.params(jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params))
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert model.config.model == config.model


def test_the_current_minimind_is_qwen3_of_63912192_parameters():
    from configs import minimind

    model = config_lib.resolve(minimind.get_config()).model
    config = transformers.Qwen3Config(**hf_config.to_hf(model, "float32", {}))
    with torch.device("meta"):
        theirs = transformers.Qwen3ForCausalLM(config)
    assert hf_config.architecture(model) == "Qwen3ForCausalLM"
    assert weight_mapping.n_parameters(model) == theirs.num_parameters() == 63_912_192
