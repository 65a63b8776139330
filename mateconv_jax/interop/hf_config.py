"""config.model as Hugging Face's config.json, and back. Both spellings of rotary settings are read and written: transformers
4's `rope_theta` and `rope_scaling`, and 5's `rope_parameters`.
"""

from ml_collections import ConfigDict

from mateconv_jax import config as config_lib
from mateconv_jax.errors import UserError

# What each architecture takes for keys that its config.json leaves out, as transformers' classes and MiniMind's do.
ARCHITECTURES = {
    "LlamaForCausalLM": dict(qk_norm=False, head_dim=None, tie_word_embeddings=False, max_seq_len=2048, norm_eps=1e-6),
    "Qwen3ForCausalLM": dict(qk_norm=True, head_dim=128, tie_word_embeddings=False, max_seq_len=32768, norm_eps=1e-6),
    # Has Hugging Face's names too. Only its weights say whether it is of a version with norms of queries and keys.
    "MiniMindForCausalLM": dict(head_dim=None, tie_word_embeddings=True, max_seq_len=32768, norm_eps=1e-5, rope_theta=1e6),
}
KEYS = {
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "hidden_dim": "intermediate_size",
    "vocab_size": "vocab_size", "max_seq_len": "max_position_embeddings", "norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
}  # fmt: skip
REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
# Settings of which this model has only one.
ONLY = {
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False, "pretraining_tp": 1,
    "partial_rotary_factor": 1.0, "quantization_config": None, "use_moe": False,
}  # fmt: skip


def from_hf(values: dict, has_qk_norm: bool, source: str) -> ConfigDict:
    """A whole configuration, resolved, with `values`' model in it and the defaults of training.

    Args:
      values: what config.json holds.
      has_qk_norm: whether there are norms of queries and keys among the tensors.
      source: the file, for errors.

    Raises:
      UserError: another architecture, a key that is missing, or a setting that this model does not have.
    """
    architecture = (values.get("architectures") or [None])[0]
    if architecture not in ARCHITECTURES:
        raise UserError(f"{source}: architectures is {architecture!r} (expected {' or '.join(ARCHITECTURES)})")
    if missing := [key for key in REQUIRED if values.get(key) is None]:
        raise UserError(f"{source}: {missing[0]} is missing")
    for key, only in ONLY.items():
        if values.get(key, only) != only:
            raise UserError(f"{source}: {key} is {values[key]!r} (expected {only!r}: this model has no other)")
    model = {"qk_norm": has_qk_norm, "n_kv_heads": values["num_attention_heads"]} | ARCHITECTURES[architecture]
    model |= {ours: values[theirs] for ours, theirs in KEYS.items() if values.get(theirs) is not None}
    return configuration(model | _rope_from_hf(values, model, source), source)


def configuration(model: dict, source: str) -> ConfigDict:
    """The default configuration with these keys of config.model, resolved; rows as long as the model's context, or 512.

    Raises:
      UserError: a key's value is not possible.
    """
    data = {"seq_len": min(512, model.get("max_seq_len", 512))}
    config = config_lib.from_dict({"model": model, "data": data}, source)
    try:
        return config_lib.resolve(config)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def _rope_from_hf(values: dict, model: dict, source: str) -> dict:
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or values.get("rope_theta") or model.get("rope_theta", 10_000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return {"rope_theta": float(theta)}
    if kind != "llama3":
        raise UserError(f"{source}: rope_type is {kind!r} (expected 'default' or 'llama3')")
    try:
        return {
            "rope_theta": float(theta),
            "rope_factor": float(rope["factor"]),
            "rope_low_freq_factor": float(rope["low_freq_factor"]),
            "rope_high_freq_factor": float(rope["high_freq_factor"]),
            "rope_original_max_seq_len": int(rope.get("original_max_position_embeddings") or model["max_seq_len"]),
        }
    except KeyError as error:
        raise UserError(
            f"{source}: the rotary settings have no {error.args[0]} (expected it beside rope_type 'llama3')"
        ) from error


def to_hf(model: ConfigDict, dtype: str, token_ids: dict[str, int | None]) -> dict:
    """What config.json holds.

    Args:
      model: config.model, resolved.
      dtype: of the tensors beside it: float32, float16 or bfloat16.
      token_ids: bos_token_id, eos_token_id and pad_token_id.
    """
    rope = {"rope_type": "default"}
    if model.rope_factor != 1:
        rope = {
            "rope_type": "llama3",
            "factor": model.rope_factor,
            "low_freq_factor": model.rope_low_freq_factor,
            "high_freq_factor": model.rope_high_freq_factor,
            "original_max_position_embeddings": model.rope_original_max_seq_len,
        }
    return {
        "architectures": ["Qwen3ForCausalLM" if model.qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if model.qk_norm else "llama",
        **{theirs: model[ours] for ours, theirs in KEYS.items()},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        **({} if model.qk_norm else {"mlp_bias": False}),
        "initializer_range": 0.02,
        "rope_theta": model.rope_theta,
        "rope_scaling": None if model.rope_factor == 1 else rope,
        "rope_parameters": rope | {"rope_theta": model.rope_theta},
        "use_cache": True,
        **token_ids,
        "dtype": dtype,
        "torch_dtype": dtype,  # transformers 4
    }
