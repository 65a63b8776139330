"""PyTorch checkpoints of MateConv and MiniMind: a state dict in a .pth file.

MateConv and the first MiniMind use LLaMA's tensor names (layers.0.attention.wq.weight) and rotary pairs (2j, 2j + 1). Later
MiniMinds use Hugging Face's names and pairs.
"""

import functools
import re
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from mateconv_jax.errors import UserError
from mateconv_jax.interop import hf_config, weight_mapping
from mateconv_jax.interop.stored_model import StoredModel, load_tokenizer
from mateconv_jax.interop.weight_mapping import Tensor

# {component of a MateConv name: the same in Hugging Face, without "model."}.
PIECES = {
    "tok_embeddings": "embed_tokens", "output": "lm_head", "attention_norm": "input_layernorm", "attention": "self_attn",
    "wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj", "ffn_norm": "post_attention_layernorm",
    "feed_forward": "mlp", "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj", "shared_experts": "shared_expert",
}  # fmt: skip
# Where trainers keep the weights and their moving average, in the order of trust.
WEIGHTS = ("model_state_dict", "state_dict", "model_state", "model", "module", "net", "network", "params", "weights", "shadow")
EMA = ("ema_shadow", "ema", "ema_state_dict", "model_ema", "ema_model", "params_ema")
EMBEDDING = re.compile(r"(.*\.)?(tok_embeddings|model\.embed_tokens)\.weight")  # group 1: what a wrapper puts before every name
# Put by DistributedDataParallel, torch.compile, FSDP and activation checkpointing, the last three around any part of a model.
WRAPPERS = re.compile(r"^(module\.)+|(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Settings that a file does not hold: for MateConv and MiniMind 1, and for MiniMinds with Hugging Face's names.
MATECONV = dict(n_heads=16, rope_theta=1e4, norm_eps=1e-5, max_seq_len=512)
MINIMIND = dict(n_heads=8, rope_theta=1e6, norm_eps=1e-5, max_seq_len=32768)
MINIMIND_QK_NORM = MINIMIND | dict(norm_eps=1e-6)


def unspecified(model: ConfigDict) -> list[str]:
    """The keys of config.model that affect the computation but are not stored in a .pth file."""
    return [*MATECONV, *(("num_experts_per_tok", "norm_topk_prob") if model.use_moe else ())]


def is_pth(path: Path) -> bool:
    """Whether `path` looks like a torch.save file: a zip archive or, from old versions, a pickle."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(4)
    return start == b"PK\x03\x04" or start[:1] == b"\x80"


def open_pth(path: Path, key: str, tokenizer: str | Path | None, n_heads: int | None) -> StoredModel:
    """Open a state dict, or a training checkpoint that has one under a key of WEIGHTS and perhaps another under one of EMA.

    Args:
      n_heads: number of query heads, which tensor shapes alone do not determine; None: derived from the QK norms if there are
        any, else MateConv's 16 or MiniMind's 8.

    Raises:
      UserError: PyTorch is not installed, the file holds anything but tensors and plain values, or it holds no model.
    """
    checkpoint = _load(path, key)
    raw, ema = _weights(checkpoint), _weights(checkpoint, EMA)
    if (found := raw or ema) is None:
        keys = ", ".join(map(str, list(checkpoint)[:3])) or "nothing"
        raise UserError(
            f"{key}: {path} holds {keys} … (expected a model's tensors, such as tok_embeddings.weight or "
            f"model.embed_tokens.weight, or a dict with them under {', '.join(WEIGHTS[:-1])} or {WEIGHTS[-1]})"
        )
    state, has_hf_names = _state(found)
    weights = {False: state}
    if raw and ema:
        weights[True] = _state(ema)[0]
    config = _configuration(state, has_hf_names, n_heads, path)
    model = config.model
    for tensors in weights.values():
        for name in tensors if not has_hf_names else ():
            if name.endswith(weight_mapping.ROTATED):
                tensors[name] = weight_mapping.half_split(tensors[name], model.head_dim)
    return StoredModel(
        path=path,
        config=config,
        tokenizer=load_tokenizer(tokenizer, None, key),
        has_ema=True in weights,
        step=None,
        read=lambda abstract_params, use_ema: weight_mapping.from_hf(weights[use_ema], model, abstract_params, str(path)),
    )


def write_pth(path: Path, model: StoredModel, params: nnx.State) -> None:
    """Write a state dict for PyTorch MateConv's `load_state_dict` or, with QK norm, MiniMind's.

    Raises:
      UserError: PyTorch is not installed, or the model is neither's.
    """
    torch = _torch(path)
    c = model.config.model
    if c.use_moe and c.qk_norm:
        raise UserError("--to: cannot be a .pth file (neither PyTorch MateConv nor MiniMind has both experts and QK norm)")
    if c.rope_factor != 1:
        raise UserError(
            f"--to: cannot be a .pth file with model.rope_factor {c.rope_factor} (PyTorch MateConv has no rope scaling)"
        )
    if c.qkv_bias:
        raise UserError("--to: cannot be a .pth file with model.qkv_bias True (neither PyTorch MateConv nor MiniMind has it)")
    tensors = weight_mapping.to_hf(params, c)
    if not c.qk_norm:
        interleaved = {
            name: weight_mapping.interleaved(t, c.head_dim) if name.endswith(weight_mapping.ROTATED) else t
            for name, t in tensors.items()
        }
        tensors = {_mateconv_name(name): tensor for name, tensor in interleaved.items()}
    state = {name: _to_torch(torch, tensor.read()) for name, tensor in tensors.items()}
    if c.tie_word_embeddings:  # PyTorch's state dict has both names for the one tensor
        embedding, output = ("model.embed_tokens", "lm_head") if c.qk_norm else ("tok_embeddings", "output")
        state[f"{output}.weight"] = state[f"{embedding}.weight"]
    torch.save(state, path)


def read_tensors(path: Path, key: str) -> dict[str, Tensor]:
    """The tensors of a file that holds only a state dict, by the file's own names.

    Raises:
      UserError: PyTorch is not installed, or the file holds anything but tensors and plain values.
    """
    return _lazy(_load(path, key))


# ---- reading ------------------------------------------------------------------------------------------------------


def _torch(path: Path):
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{path}: a .pth file needs PyTorch (pip install torch)") from error
    return torch


def _load(path: Path, key: str) -> dict:
    torch = _torch(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # UnpicklingError for anything but tensors; a damaged file may raise anything
        reason = " ".join(str(error).split())
        if found := re.search(r"GLOBAL ([\w.]+)", reason):
            reason = f"it contains {found[1]}"
        raise UserError(
            f"{key}: cannot read {path} ({reason[:200]}; expected only tensors and plain values, because anything else in a "
            "pickle can execute code: save only the model's state_dict())"
        ) from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{key}: {path} holds a {type(checkpoint).__name__} (expected a state dict)")
    return checkpoint


def _weights(checkpoint: dict, keys: tuple[str, ...] | None = None, depth: int = 0) -> dict | None:
    """The state dict at most three levels below a checkpoint: under one of `keys`; None: the checkpoint itself, or WEIGHTS."""
    if keys is None and any(isinstance(name, str) and EMBEDDING.fullmatch(name) for name in checkpoint):
        return checkpoint
    below = [value for name in keys or WEIGHTS if isinstance(value := checkpoint.get(name), dict)]
    found = (_weights(value, None, depth + 1) for value in below if depth < 3)
    return next((state for state in found if state is not None), None)


def _state(found: dict) -> tuple[dict[str, Tensor], bool]:
    """The tensors by Hugging Face name, with rotary pairs as in the file, and whether the file uses those names."""
    state = {WRAPPERS.sub("", name): tensor for name, tensor in _lazy(found).items()}
    prefix = next((match[1] or "" for name in state if (match := EMBEDDING.fullmatch(name))), "")
    state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    has_hf_names = "model.embed_tokens.weight" in state
    if not has_hf_names:
        state = {_hf_name(name): tensor for name, tensor in state.items()}
    return state, has_hf_names


def _lazy(state: dict) -> dict[str, Tensor]:
    """The weights in a state dict, to be read on demand."""
    return {
        name: Tensor(tuple(value.shape), functools.partial(_to_numpy, value))
        for name, value in state.items()
        if isinstance(name, str) and hasattr(value, "dim") and not name.endswith(weight_mapping.BUFFERS)
    }


def _hf_name(name: str) -> str:
    """layers.0.attention.wq.weight -> model.layers.0.self_attn.q_proj.weight"""
    name = ".".join(PIECES.get(piece, piece) for piece in name.split("."))
    return name if name.startswith("lm_head") else f"model.{name}"


def _mateconv_name(name: str) -> str:
    pieces = {theirs: ours for ours, theirs in PIECES.items()}
    return ".".join(pieces.get(piece, piece) for piece in name.removeprefix("model.").split("."))


def _configuration(state: dict[str, Tensor], has_hf_names: bool, n_heads: int | None, path: Path) -> ConfigDict:
    """A configuration from the tensors' shapes, with defaults for what shapes do not determine."""

    def shape(name: str, axis: int = 0, layer: str = "model.layers.0.") -> int:
        tensor = state.get(layer + name)
        if tensor is None or len(tensor.shape) <= axis:
            raise UserError(f"{path}: the tensor {layer}{name} is missing" + ("" if has_hf_names else " (in MateConv's names)"))
        return tensor.shape[axis]

    qk_norm = "model.layers.0.self_attn.q_norm.weight" in state
    defaults = (MINIMIND_QK_NORM if qk_norm else MINIMIND) if has_hf_names else MATECONV
    q_rows, k_rows = shape("self_attn.q_proj.weight"), shape("self_attn.k_proj.weight")
    implied = q_rows // shape("self_attn.q_norm.weight") if qk_norm else None
    n_heads = (implied or int(defaults["n_heads"])) if n_heads is None else n_heads
    head_dim = q_rows // max(n_heads, 1)
    if n_heads * head_dim != q_rows or k_rows % head_dim or implied not in (None, n_heads):
        raise UserError(
            f"--n_heads: {n_heads} does not fit {path}, whose queries have {q_rows} features and keys {k_rows} (expected the "
            "number of heads the model was trained with)"
        )
    gate = state.get("model.layers.0.mlp.gate.weight")
    if gate is not None and has_hf_names:
        raise UserError(f"{path}: MiniMind 3's mixture of experts is not supported (its one expert per token has weight 1)")
    embedding, output = state["model.embed_tokens.weight"], state.get("lm_head.weight")
    layers = {int(match[1]) for name in state if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    model = defaults | {
        "dim": shape("embed_tokens.weight", 1, "model."),
        "n_layers": max(layers) + 1,
        "n_heads": n_heads,
        "n_kv_heads": k_rows // head_dim,
        "head_dim": head_dim,
        "hidden_dim": shape("mlp.gate_proj.weight" if gate is None else "mlp.experts.0.gate_proj.weight"),
        "vocab_size": embedding.shape[0],
        "qk_norm": qk_norm,
        "qkv_bias": "model.layers.0.self_attn.q_proj.bias" in state,
        "tie_word_embeddings": output is None or np.array_equal(output.read(), embedding.read()),
    }
    if gate is not None:  # num_experts_per_tok stays at its default of 2: shapes do not determine it either
        shared = "model.layers.0.mlp.shared_expert.gate_proj.weight" in state
        model |= {"use_moe": True, "n_routed_experts": gate.shape[0], "n_shared_experts": int(shared)}
    return hf_config.configuration(model, str(path))


# ---- arrays -------------------------------------------------------------------------------------------------------


def _to_numpy(tensor) -> np.ndarray:
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # numpy has it only through ml_dtypes
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _to_torch(torch, array: np.ndarray):
    if array.dtype == ml_dtypes.bfloat16:
        return torch.tensor(array.view(np.int16)).view(torch.bfloat16)
    return torch.tensor(array)
