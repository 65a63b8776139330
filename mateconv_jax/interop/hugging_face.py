"""Hugging Face folders, as written by transformers' save_pretrained and read by vLLM, SGLang and lm_eval.

config.json, generation_config.json
model.safetensors, or model-00001-of-00002.safetensors … and model.safetensors.index.json
tokenizer.json, tokenizer_config.json, chat_template.jinja
README.md                          a model card
"""

import functools
import json
import math
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from mateconv_jax import files
from mateconv_jax.data.tokenizer.folder import has_tokenizer
from mateconv_jax.errors import UserError
from mateconv_jax.generation_config import GenerationConfig
from mateconv_jax.interop import hf_config, model_card, pytorch, weight_mapping
from mateconv_jax.interop.stored_model import StoredModel, all_end_ids, load_tokenizer, read_end_ids
from mateconv_jax.interop.weight_mapping import Tensor

SHARED_GATE, SHARED_DOWN = "mlp.shared_expert_gate.weight", "mlp.shared_expert.down_proj.weight"
PYTORCH = "pytorch_model.bin"  # written by MiniMind's scripts; only read here
INDEX = "model.safetensors.index.json"


def is_folder(path: Path) -> bool:
    """Whether config.json has "architectures", or there are .safetensors files beside it."""
    config = path / "config.json"
    return config.is_file() and (b'"architectures"' in config.read_bytes() or any(path.glob("*.safetensors")))


def open_folder(path: Path, key: str, tokenizer: str | Path | None, n_heads: int | None) -> StoredModel:
    """Open a folder; its tensors are read on demand.

    Raises:
      UserError: an unsupported architecture or setting, or missing or damaged safetensors.
    """
    try:
        values = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{key}: {path / 'config.json'} is not valid JSON ({error})") from error
    tensors = _without_shared_gates(_tensors(path, key), path)
    has_qk_norm = any(name.endswith("self_attn.q_norm.weight") for name in tensors)
    config = hf_config.from_hf(values, has_qk_norm, str(path / "config.json"))
    return StoredModel(
        path=path,
        config=config,
        tokenizer=load_tokenizer(tokenizer, path if has_tokenizer(path) else None, key),
        has_ema=False,
        step=None,
        read=lambda abstract_params, _: weight_mapping.from_hf(tensors, config.model, abstract_params, str(path)),
        end_ids=read_end_ids(path, config.model.vocab_size),
    )


def write_folder(path: Path, model: StoredModel, params: nnx.State, max_shard_size: int | str = "5GB") -> None:
    """Write the files listed in the module docstring; weights in the parameters' dtype.

    Args:
      max_shard_size: of one weights file, in bytes or such as "5GB".
    """
    tensors = _with_shared_gates(weight_mapping.to_hf(params, model.config.model))
    dtype = jax.tree.leaves(params)[0].dtype
    split = huggingface_hub.split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: math.prod(tensor.shape) * dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file_name, tensor_names in split.filename_to_tensors.items():
        arrays = {name: tensors[name].read() for name in tensor_names}
        safetensors.numpy.save_file(arrays, path / file_name, {"format": "pt"})
    if split.is_sharded:
        _write_json(path / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})

    tokenizer = model.tokenizer
    assert tokenizer is not None  # checked by `formats.convert`
    token_ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = hf_config.to_hf(model.config.model, dtype.name, token_ids)
    _write_json(path / "config.json", config)
    sampling = GenerationConfig()
    sampling = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    end_ids = all_end_ids(model)
    ends = {"eos_token_id": list(end_ids) if len(end_ids) > 1 else end_ids[0]}
    _write_json(path / "generation_config.json", token_ids | ends | sampling)
    tokenizer.save_pretrained(path)
    # Rewritten from transformers 5's form to 4's, which both versions can read.
    settings = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings = {key: value for key, value in settings.items() if key not in ("backend", "is_local", "local_files_only")}
    extra = settings.pop("extra_special_tokens", [])
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": extra}
    # transformers 4.49 to 4.57 apply it to the tokenizer: a space would come before each text.
    pre_tokenizer = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    settings["add_prefix_space"] = any(step.get("add_prefix_space", False) for step in steps)
    _write_json(path / "tokenizer_config.json", settings)
    files.write_text(path / "README.md", model_card.text(model, config["architectures"][0], path.name))


def _with_shared_gates(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the gate that Qwen2MoeForCausalLM's shared expert has: it multiplies the output by sigmoid(gate x). With gate weights
    of 0 that is 1/2, so the expert's down projection is doubled.
    """
    gated = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith(SHARED_DOWN):
            dim = tensor.shape[0]
            gated[name] = Tensor(tensor.shape, lambda read=tensor.read: 2 * read())
            gate = name.replace(SHARED_DOWN, SHARED_GATE)
            gated[gate] = Tensor((1, dim), lambda read=tensor.read, dim=dim: np.zeros((1, dim), read().dtype))
    return gated


def _without_shared_gates(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The inverse of `_with_shared_gates`. Raises UserError if a gate is not 0."""
    ours = {name: tensor for name, tensor in tensors.items() if not name.endswith(SHARED_GATE)}
    for name in tensors.keys() - ours.keys():
        down = name.replace(SHARED_GATE, SHARED_DOWN)
        if tensors[name].read().any() or down not in ours:
            raise UserError(f"{path}: {name} is not 0 (expected 0: this model's shared expert has no gate)")
        ours[down] = Tensor(ours[down].shape, lambda read=ours[down].read: read() / 2)
    return ours


def _write_json(path: Path, values: dict) -> None:
    files.write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _tensors(path: Path, key: str) -> dict[str, Tensor]:
    """The tensors of all weights files, to be read on demand."""
    if (path / PYTORCH).is_file() and not any(path.glob("*.safetensors")):
        return pytorch.read_tensors(path / PYTORCH, key)
    file_name = INDEX
    try:
        if (path / INDEX).is_file():
            weight_map = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
            file_names = sorted(set(weight_map.values()))
        else:
            file_names = ["model.safetensors"]
        tensors = {}
        for file_name in file_names:
            file = safetensors.safe_open(path / file_name, framework="np")
            for name in file.keys():
                shape = tuple(file.get_slice(name).get_shape())
                tensors[name] = Tensor(shape, functools.partial(file.get_tensor, name))
        return tensors
    except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as error:
        reason = f"no {file_name}" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
        raise UserError(
            f"{key}: cannot read the weights in {str(path)!r} ({reason}; expected model.safetensors, or {INDEX} and its files)"
        ) from error
