"""config.model as config.json of transformers 4 and 5, and back."""

import json

import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mateconv_jax import config as config_lib
from mateconv_jax.errors import UserError
from mateconv_jax.interop import hf_config
from mateconv_jax.model.rope import RotarySettings, rope_attention_factor, rope_frequencies

TOKENS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
LLAMA3 = dict(rope_factor=8.0, rope_low_freq_factor=2.0, rope_high_freq_factor=5.0, rope_original_max_seq_len=64)
YARN = dict(rope_scaling="yarn", rope_factor=4.0, rope_original_max_seq_len=128)
MODELS = {
    "base": {},
    "llama 3, untied": dict(LLAMA3, tie_word_embeddings=False, head_dim=48, n_kv_heads=2),
    "qwen2": dict(qkv_bias=True, rope_theta=1e6, norm_eps=1e-6),
    "qwen3": dict(qk_norm=True, rope_theta=1e6, norm_eps=1e-6, max_seq_len=1024),
    "yarn": dict(YARN, rope_theta=1e6, qk_norm=True, head_dim=48),
    "yarn, every setting": dict(YARN, rope_beta_fast=16.0, rope_beta_slow=2.0, rope_truncate=False, rope_attention_factor=1.5),
}
LLAMA = dict(
    architectures=["LlamaForCausalLM"], hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
    vocab_size=96,
)  # fmt: skip


def model_of(**changes):
    config = config_lib.default_config()
    config.model.update(changes)
    return config_lib.resolve(config).model


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_a_model_comes_back_from_transformers_as_it_was(changes, tmp_path):
    """Through AutoConfig, which reads our config.json and writes its own."""
    model = model_of(**changes)
    (tmp_path / "config.json").write_text(json.dumps(hf_config.to_hf(model, "float32", TOKENS)))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    kind = "Qwen3" if model.qk_norm else "Qwen2" if model.qkv_bias else "Llama"
    assert type(theirs).__name__ == f"{kind}Config"
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 0)
    theirs.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert hf_config.from_hf(written, False, "x").model == model


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_the_keys_of_transformers_4_alone_suffice(changes):
    model = model_of(**changes)
    values = hf_config.to_hf(model, "float32", TOKENS)
    del values["rope_parameters"]
    assert hf_config.from_hf(values, False, "x").model == model


@pytest.mark.parametrize(
    "settings",
    [
        dict(factor=4.0),  # the original context is then max_position_embeddings
        dict(factor=4.0, original_max_position_embeddings=512),
        dict(factor=None, original_max_position_embeddings=512),
        dict(factor=40.0, original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=0.5),
        dict(factor=40.0, original_max_position_embeddings=4096, mscale=0.707),
        dict(factor=8.0, original_max_position_embeddings=256, attention_factor=1.1, beta_fast=64, beta_slow=0.5),
        dict(factor=8.0, original_max_position_embeddings=256, truncate=False),
        dict(factor=4.0, original_max_position_embeddings=2),  # every pair turns slower than beta_slow
    ],
)
@pytest.mark.parametrize("layout", ["transformers 4", "transformers 5", "outside the settings"])
def test_yarn_is_transformers_own(settings, layout):
    """Frequencies and attention factor, of its `_compute_yarn_parameters`."""
    values = LLAMA | dict(max_position_embeddings=2048, head_dim=64)
    if layout == "transformers 4":
        values |= dict(rope_theta=5e5, rope_scaling={"type": "yarn", **settings})
    elif layout == "transformers 5":
        values |= dict(rope_parameters={"rope_type": "yarn", "rope_theta": 5e5, **settings})
    else:
        values |= dict(rope_theta=5e5, original_max_position_embeddings=1024, rope_scaling={"rope_type": "yarn", **settings})
    theirs = transformers.LlamaConfig(**json.loads(json.dumps(values)))
    expected_n, expected_factor = ROPE_INIT_FUNCTIONS["yarn"](theirs)
    ours = config_lib.options(RotarySettings, hf_config.from_hf(values, False, "x").model)
    np.testing.assert_allclose(rope_frequencies(ours), expected_n, rtol=1e-5)
    assert rope_attention_factor(ours) == pytest.approx(expected_factor, rel=1e-6)


def test_keys_that_are_left_out_take_the_architectures_defaults():
    llama = hf_config.from_hf(LLAMA, False, "x").model
    theirs = transformers.LlamaConfig(**LLAMA)
    assert (llama.n_kv_heads, llama.head_dim) == (theirs.num_key_value_heads, theirs.head_dim) == (4, 16)
    assert (llama.max_seq_len, llama.norm_eps) == (theirs.max_position_embeddings, theirs.rms_norm_eps)
    assert (llama.tie_word_embeddings, llama.rope_theta) == (False, theirs.rope_parameters["rope_theta"])
    qwen3 = hf_config.from_hf(LLAMA | {"architectures": ["Qwen3ForCausalLM"]}, False, "x").model
    theirs = transformers.Qwen3Config(**LLAMA | {"architectures": ["Qwen3ForCausalLM"]})
    assert qwen3.qk_norm and (qwen3.head_dim, qwen3.max_seq_len) == (theirs.head_dim, theirs.max_position_embeddings)


def test_minimind_has_norms_of_queries_and_keys_if_its_weights_do():
    values = LLAMA | {"architectures": ["MiniMindForCausalLM"]}
    assert hf_config.from_hf(values, True, "x").model.qk_norm
    minimind = hf_config.from_hf(values, False, "x").model
    assert not minimind.qk_norm and minimind.tie_word_embeddings and minimind.rope_theta == 1e6


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(architectures=["GPT2LMHeadModel"]), "c.json: architectures is 'GPT2LMHeadModel'"),
        (dict(architectures=None), "architectures is None"),
        (dict(hidden_size=None), "hidden_size is missing"),
        (dict(attention_bias=True), "attention_bias is True"),
        (dict(mlp_bias=True), "mlp_bias is True"),
        (dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
        (dict(rope_scaling={"type": "yarn"}), "no factor .required with rope_type 'yarn'"),
        (dict(rope_scaling={"type": "yarn", "factor": "long"}), "cannot read the rotary settings .*'long'"),
        (dict(rope_scaling={"type": "yarn", "factor": 0.5}), "model.rope_factor: 0.5 is not possible"),
        (dict(rope_scaling={"type": "yarn", "factor": 1, "attention_factor": 2.0}), "attention_factor 2.0 needs a factor above 1"),
        (dict(rope_scaling={"type": "yarn", "factor": 2, "beta_fast": 1}), "model.rope_beta_fast: 1.0 is not above"),
        (dict(rope_scaling={"type": "yarn", "factor": 2, "partial_rotary_factor": 0.5}), "partial_rotary_factor is 0.5"),
        (dict(rope_scaling={"rope_type": "llama3", "factor": 4}), "no low_freq_factor"),
        (dict(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}), "rope_type is 'linear'"),
        (dict(use_sliding_window=True), "use_sliding_window is True"),
        (dict(sliding_window=1024, max_position_embeddings=2048), "sliding_window is 1024"),
        (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types has 'sliding_attention'"),
        (dict(rope_interleaved=True), "rope_interleaved is True"),
        (dict(logit_scale=0.0625), "logit_scale is 0.0625"),
        (dict(attn_logit_softcapping=50.0), "attn_logit_softcapping is 50.0, an unknown setting"),
        (dict(attention_multiplier=0.0625), "attention_multiplier is 0.0625, an unknown setting"),
        (dict(quantization_config={"bits": 4}), "quantization_config is"),
        (dict(num_attention_heads=5), "c.json: model.dim: 64 is not divisible"),
        (dict(hidden_size="64"), "c.json: .*dim"),
    ],
)  # fmt: skip
def test_what_this_model_does_not_have_is_one_clear_error(changes, message):
    with pytest.raises(UserError, match=message):
        hf_config.from_hf(LLAMA | changes, False, "c.json")


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3", "Qwen2Moe", "Qwen3Moe"])
def test_what_transformers_itself_writes_is_known(name, tmp_path):
    config = getattr(transformers, f"{name}Config")(head_dim=64, hidden_size=256, num_attention_heads=4, num_key_value_heads=4)
    if name == "Qwen2Moe":
        config.shared_expert_intermediate_size = config.moe_intermediate_size
    config.architectures = [f"{name}ForCausalLM"]
    config.save_pretrained(tmp_path)
    for values in (json.loads((tmp_path / "config.json").read_text()), config.to_dict()):
        assert hf_config.architecture(hf_config.from_hf(values, False, "x").model) == f"{name}ForCausalLM"


@pytest.mark.parametrize(
    "changes",
    [
        dict(attn_logit_softcapping=None, attention_sinks=False),  # features that are off
        dict(sliding_window=4096, use_sliding_window=False),  # Qwen2.5
        dict(sliding_window=2048, max_position_embeddings=2048),
        {
            "rope_interleaved": False,
            "is_llama_config": True,
            "transformers.js_config": {"dtype": "q4"},
            "_name_or_path": "x",
        },  # SmolLM2
        dict(unsloth_fixed=True, unsloth_version="2025.1"),
    ],
)
def test_what_changes_nothing_may_be_said(changes):
    assert (
        hf_config.from_hf(LLAMA | changes, False, "x").model
        == hf_config.from_hf(
            LLAMA | {key: value for key, value in changes.items() if key in hf_config.KEYS.values()}, False, "x"
        ).model
    )
