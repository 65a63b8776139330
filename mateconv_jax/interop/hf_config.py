"""Conversion between config.model and Hugging Face's config.json. Rotary settings are read and written in both spellings:
`rope_theta` and `rope_scaling` (transformers 4), and `rope_parameters` (transformers 5).
"""

from ml_collections import ConfigDict

from mateconv_jax import config as config_lib
from mateconv_jax.errors import UserError
from mateconv_jax.model.rope import yarn_attention_factor

# Defaults for keys missing from config.json, as in transformers' classes and MiniMind's.
ARCHITECTURES = {
    "LlamaForCausalLM": dict(qk_norm=False, head_dim=None, tie_word_embeddings=False, max_seq_len=2048, norm_eps=1e-6),
    "Qwen2ForCausalLM": dict(
        qk_norm=False, qkv_bias=True, head_dim=None, tie_word_embeddings=False, max_seq_len=32768, norm_eps=1e-6,
    ),
    "Qwen3ForCausalLM": dict(qk_norm=True, head_dim=128, tie_word_embeddings=False, max_seq_len=32768, norm_eps=1e-6),
    # Mixtures of experts. Qwen2's shared expert has a gate, ours does not; hugging_face.py converts.
    "Qwen2MoeForCausalLM": dict(
        qk_norm=False, qkv_bias=True, head_dim=None, tie_word_embeddings=False, max_seq_len=32768, norm_eps=1e-6, use_moe=True,
        n_routed_experts=60, num_experts_per_tok=4, n_shared_experts=1, norm_topk_prob=False, aux_loss_alpha=0.001,
    ),
    "Qwen3MoeForCausalLM": dict(
        qk_norm=True, head_dim=None, tie_word_embeddings=False, max_seq_len=32768, norm_eps=1e-6, use_moe=True,
        n_routed_experts=128, num_experts_per_tok=8, n_shared_experts=0, norm_topk_prob=False, aux_loss_alpha=0.001,
    ),
    # Uses Hugging Face's tensor names. Whether it is a version with QK norm shows only in its weights.
    "MiniMindForCausalLM": dict(head_dim=None, tie_word_embeddings=True, max_seq_len=32768, norm_eps=1e-5, rope_theta=1e6),
}  # fmt: skip
KEYS = {
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "hidden_dim": "intermediate_size",
    "vocab_size": "vocab_size", "max_seq_len": "max_position_embeddings", "norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
}  # fmt: skip
MOE_KEYS = {
    "hidden_dim": "moe_intermediate_size", "n_routed_experts": "num_experts", "num_experts_per_tok": "num_experts_per_tok",
    "norm_topk_prob": "norm_topk_prob", "aux_loss_alpha": "router_aux_loss_coef", "qkv_bias": "qkv_bias",
}  # fmt: skip
REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
MODEL_TYPES = {
    "LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3", "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}  # fmt: skip
# Settings for which this model supports only one value.
ONLY = {
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False, "pretraining_tp": 1,
    "partial_rotary_factor": 1.0, "quantization_config": None, "use_moe": False, "is_encoder_decoder": False,
    "add_cross_attention": False, "rope_interleaved": False, "inference_rope_scaling": False, "logit_scale": 1.0,
    "logits_scaling": 1.0, "embedding_multiplier": 1.0, "residual_multiplier": 1.0,
}  # fmt: skip
# Read here, in one of the functions below.
READ = {
    "rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings", "num_local_experts", "layer_types",
    "sliding_window", "decoder_sparse_step", "mlp_only_layers", "shared_expert_intermediate_size",
    *KEYS.values(), *MOE_KEYS.values(), *ONLY,
}  # fmt: skip
# Without influence on the logits: token ids, settings of training and sampling, notes of transformers and other tools, settings
# of features that are off, such as those of the mixture of experts in every config.json of MiniMind.
HARMLESS = set(
    """architectures model_type auto_map transformers_version torch_dtype dtype use_bfloat16 use_cache initializer_range
    attention_dropout hidden_dropout dropout flash_attn is_llama_config is_decoder max_window_layers
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id tokenizer_class
    output_router_logits output_attentions output_hidden_states return_dict return_dict_in_generate torchscript
    id2label label2id problem_type finetuning_task task_specific_params chunk_size_feed_forward pruned_heads name_or_path
    do_sample temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size max_length min_length
    encoder_no_repeat_ngram_size num_beams num_beam_groups diversity_penalty early_stopping num_return_sequences
    n_routed_experts n_shared_experts scoring_func aux_loss_alpha seq_aux transformers.js_config""".split()
)


def from_hf(values: dict, has_qk_norm: bool, source: str) -> ConfigDict:
    """A full, resolved configuration with the model described by a config.json and defaults for everything else.

    Args:
      values: the content of config.json.
      has_qk_norm: whether the tensors include QK norms.
      source: the file, for error messages.

    Raises:
      UserError: an unsupported architecture or setting, or a missing key.
    """
    architecture = (values.get("architectures") or [None])[0]
    if architecture not in ARCHITECTURES:
        raise UserError(f"{source}: architectures is {architecture!r} (expected {' or '.join(ARCHITECTURES)})")
    if missing := [key for key in REQUIRED if values.get(key) is None]:
        raise UserError(f"{source}: {missing[0]} is missing")
    for key, only in ONLY.items():
        if values.get(key, only) != only:
            raise UserError(f"{source}: {key} is {values[key]!r} (expected {only!r}, the only supported value)")
    _check_unknown(values, source)
    _check_window(values, architecture, source)
    model = {"qk_norm": has_qk_norm, "n_kv_heads": values["num_attention_heads"]} | ARCHITECTURES[architecture]
    if "num_local_experts" in values:  # transformers 5 writes this name
        values = {"num_experts": values["num_local_experts"]} | values
    keys = KEYS | (MOE_KEYS if "use_moe" in model else {})
    model |= {ours: values[theirs] for ours, theirs in keys.items() if values.get(theirs) is not None}
    if "use_moe" in model:
        _check_experts(values, model, architecture, source)
    return configuration(model | _rope_from_hf(values, model, source), source)


def configuration(model: dict, source: str) -> ConfigDict:
    """The default configuration with these keys of config.model, resolved. data.seq_len is the model's context, at most 512.

    Raises:
      UserError: an invalid value.
    """
    data = {"seq_len": min(512, model.get("max_seq_len", 512))}
    config = config_lib.from_dict({"model": model, "data": data}, source)
    try:
        return config_lib.resolve(config)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def _check_unknown(values: dict, source: str) -> None:
    """A setting that is not known here may change the logits. null and false mean that a feature is off."""
    harmless = READ | HARMLESS
    for key, value in values.items():
        if key not in harmless and not key.startswith(("_", "unsloth_")) and value is not None and value is not False:
            raise UserError(
                f"{source}: {key} is {value!r}, an unknown setting (if it does not change what the model computes, remove it)"
            )


def _check_window(values: dict, architecture: str, source: str) -> None:
    """Qwen's classes use sliding_window only where use_sliding_window is true, which ONLY refuses."""
    window, context = values.get("sliding_window"), values.get("max_position_embeddings")
    ignored = architecture.startswith("Qwen") or values.get("use_sliding_window") is False
    if window is not None and not ignored and (context is None or window < context):
        raise UserError(f"{source}: sliding_window is {window!r} (expected null: attention here sees the whole context)")
    if others := set(values.get("layer_types") or ()) - {"full_attention"}:
        raise UserError(f"{source}: layer_types has {min(others)!r} (expected 'full_attention', the only supported value)")


def _check_experts(values: dict, model: dict, architecture: str, source: str) -> None:
    only = {"decoder_sparse_step": 1, "mlp_only_layers": []}
    if architecture == "Qwen2MoeForCausalLM":
        only["shared_expert_intermediate_size"] = model["hidden_dim"]
    if model["num_experts_per_tok"] == 1:
        only["norm_topk_prob"] = False
    for key, value in only.items():
        if values.get(key) not in (None, value):
            raise UserError(f"{source}: {key} is {values[key]!r} (expected {value!r}, the only supported value)")


def _rope_from_hf(values: dict, model: dict, source: str) -> dict:
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or values.get("rope_theta") or model.get("rope_theta", 10_000.0)
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type not in ("default", "llama3", "yarn"):
        raise UserError(f"{source}: rope_type is {rope_type!r} (expected 'default', 'llama3' or 'yarn')")
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise UserError(f"{source}: partial_rotary_factor is {rope['partial_rotary_factor']!r} (expected 1.0)")
    if rope_type == "default":
        return {"rope_theta": float(theta)}
    # transformers' order: Phi-3 has it outside the rotary settings, and that goes first.
    key = "original_max_position_embeddings"
    original = values.get(key) or rope.get(key) or model["max_seq_len"]
    try:
        scaling = _llama3_from_hf(rope) if rope_type == "llama3" else _yarn_from_hf(rope, model["max_seq_len"] / original)
        return scaling | {
            "rope_theta": float(theta),
            "rope_scaling": rope_type,
            "rope_original_max_seq_len": int(original),
        }
    except KeyError as error:
        raise UserError(
            f"{source}: the rotary settings have no {error.args[0]} (required with rope_type {rope_type!r})"
        ) from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{source}: cannot read the rotary settings {rope} ({error})") from error


def _llama3_from_hf(rope: dict) -> dict:
    return {
        "rope_factor": float(rope["factor"]),
        "rope_low_freq_factor": float(rope["low_freq_factor"]),
        "rope_high_freq_factor": float(rope["high_freq_factor"]),
    }


def _yarn_from_hf(rope: dict, ratio: float) -> dict:
    """As transformers' `_compute_yarn_parameters` reads them. `ratio` of the contexts stands for a factor that is null."""
    factor = float(ratio if rope["factor"] is None else rope["factor"])
    attention_factor = rope.get("attention_factor")
    if attention_factor is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        attention_factor = yarn_attention_factor(factor, rope["mscale"]) / yarn_attention_factor(factor, rope["mscale_all_dim"])
    if factor == 1 and attention_factor not in (None, 1):
        raise ValueError(f"attention_factor {attention_factor} needs a factor above 1")
    return {
        "rope_factor": factor,
        "rope_beta_fast": float(rope.get("beta_fast") or 32),
        "rope_beta_slow": float(rope.get("beta_slow") or 1),
        "rope_truncate": bool(rope.get("truncate", True)),
        "rope_attention_factor": None if attention_factor is None else float(attention_factor),
    }


def architecture(model: ConfigDict) -> str:
    """The transformers class for config.model.

    Raises:
      UserError: transformers has no matching class.
    """
    if model.qk_norm and model.qkv_bias:
        raise UserError("--to_kind: transformers has no model with model.qk_norm True and model.qkv_bias True")
    if not model.use_moe:
        return "Qwen3ForCausalLM" if model.qk_norm else "Qwen2ForCausalLM" if model.qkv_bias else "LlamaForCausalLM"
    if model.qk_norm == bool(model.n_shared_experts):
        raise UserError(
            f"--to_kind: transformers has no model with model.qk_norm {model.qk_norm} and model.n_shared_experts "
            f"{model.n_shared_experts} (expected either QK norm or a shared expert)"
        )
    return "Qwen3MoeForCausalLM" if model.qk_norm else "Qwen2MoeForCausalLM"


def to_hf(model: ConfigDict, dtype: str, token_ids: dict[str, int | None]) -> dict:
    """The content of config.json.

    Args:
      model: config.model, resolved.
      dtype: of the tensors saved with it: float32, float16 or bfloat16.
      token_ids: bos_token_id, eos_token_id and pad_token_id.

    Raises:
      UserError: transformers has no matching class.
    """
    rope = _rope_to_hf(model)
    return {
        "architectures": [architecture(model)],
        "model_type": MODEL_TYPES[architecture(model)],
        **{theirs: model[ours] for ours, theirs in KEYS.items()},
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        **({} if model.qkv_bias else {"attention_bias": False}),
        **({} if model.qk_norm else {"mlp_bias": False, "qkv_bias": model.qkv_bias}),
        **(_experts_to_hf(model) if model.use_moe else {}),
        "initializer_range": 0.02,
        "rope_theta": model.rope_theta,
        "rope_scaling": rope,
        "rope_parameters": (rope or {"rope_type": "default"}) | {"rope_theta": model.rope_theta},
        "use_cache": True,
        **token_ids,
        "dtype": dtype,
        "torch_dtype": dtype,  # transformers 4
    }


def _rope_to_hf(model: ConfigDict) -> dict | None:
    """transformers' rope_scaling."""
    if model.rope_factor == 1:
        return None
    settings = {
        "rope_type": model.rope_scaling,
        "factor": model.rope_factor,
        "original_max_position_embeddings": model.rope_original_max_seq_len,
    }
    if model.rope_scaling == "llama3":
        return settings | {"low_freq_factor": model.rope_low_freq_factor, "high_freq_factor": model.rope_high_freq_factor}
    settings |= {"beta_fast": model.rope_beta_fast, "beta_slow": model.rope_beta_slow}
    if model.rope_attention_factor is not None:
        settings["attention_factor"] = model.rope_attention_factor
    return settings if model.rope_truncate else settings | {"truncate": False}  # older versions do not know the key


def _experts_to_hf(model: ConfigDict) -> dict:
    return {theirs: model[ours] for ours, theirs in MOE_KEYS.items() if ours != "qkv_bias"} | {
        "norm_topk_prob": model.norm_topk_prob and model.num_experts_per_tok > 1,  # with K = 1, ours does not normalise
        "shared_expert_intermediate_size": model.hidden_dim,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "output_router_logits": False,
    }
