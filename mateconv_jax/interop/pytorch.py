"""Checkpoints of PyTorch MateConv and MiniMind: a state dict in a .pth file.

MateConv and the first MiniMind name their tensors as LLaMA did (layers.0.attention.wq.weight), and pair neighbouring features
(2j, 2j + 1) in the rotary embedding. Later MiniMinds have Hugging Face's names and pairs.
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
from mateconv_jax.interop.stored_model import Model, load_tokenizer
from mateconv_jax.interop.weight_mapping import Tensor

# {piece of a name in MateConv: of one in Hugging Face, "model." left out}.
PIECES = {
    "tok_embeddings": "embed_tokens", "output": "lm_head", "attention_norm": "input_layernorm", "attention": "self_attn",
    "wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj", "ffn_norm": "post_attention_layernorm",
    "feed_forward": "mlp", "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj", "shared_experts": "shared_expert",
}  # fmt: skip
# What a file does not say: of MateConv (and MiniMind 1), and of the MiniMinds with Hugging Face's names.
MATECONV = dict(n_heads=16, rope_theta=1e4, norm_eps=1e-5, max_seq_len=512)
MINIMIND = dict(n_heads=8, rope_theta=1e6, norm_eps=1e-5, max_seq_len=32768)
MINIMIND_QK_NORM = MINIMIND | dict(norm_eps=1e-6)


def unsaid(model: ConfigDict) -> list[str]:
    """The keys of config.model that shape the computation and that no .pth file holds."""
    return [*MATECONV, *(("num_experts_per_tok", "norm_topk_prob") if model.use_moe else ())]


def is_pth(path: Path) -> bool:
    """A file as torch.save writes it: a zip archive, or a pickle in old ones."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(4)
    return start == b"PK\x03\x04" or start[:1] == b"\x80"


def open_pth(path: Path, key: str, tokenizer: str | Path | None, n_heads: int | None) -> Model:
    """A state dict, or a training checkpoint that holds one as `model_state_dict`, perhaps with an `ema_shadow`.

    Args:
      n_heads: the number of query heads, which no tensor's shape tells; None: MateConv's 16, MiniMind's 8, or what norms of
        queries tell.

    Raises:
      UserError: no PyTorch; a file that holds other than tensors and plain values, or no model.
    """
    checkpoint = _load(path, key)
    state, has_hf_names = _state(checkpoint, path, key)
    weights = {False: state}
    if isinstance(checkpoint.get("ema_shadow"), dict):
        weights[True] = _state(checkpoint["ema_shadow"], path, key)[0]
    config = _configuration(state, has_hf_names, n_heads, path)
    model = config.model
    for tensors in weights.values():
        for name in tensors if not has_hf_names else ():
            if name.endswith(weight_mapping.TURNED):
                tensors[name] = weight_mapping.half_split(tensors[name], model.head_dim)
    return Model(
        path=path,
        config=config,
        tokenizer=load_tokenizer(tokenizer, None, key),
        has_ema=True in weights,
        step=None,
        read=lambda abstract_params, use_ema: weight_mapping.from_hf(weights[use_ema], model, abstract_params, str(path)),
    )


def write_pth(path: Path, model: Model, params: nnx.State) -> None:
    """A state dict that PyTorch MateConv's `load_state_dict` takes; with norms of queries and keys, MiniMind's.

    Raises:
      UserError: no PyTorch; a model that neither has.
    """
    torch = _torch(path)
    c = model.config.model
    if c.use_moe and c.qk_norm:
        raise UserError("--to: no .pth file (neither PyTorch MateConv nor MiniMind has experts and norms of queries and keys)")
    if c.rope_factor != 1:
        raise UserError(f"--to: no .pth file, model.rope_factor is {c.rope_factor} (PyTorch MateConv has no such scaling)")
    tensors = weight_mapping.to_hf(params, c)
    if not c.qk_norm:
        turned = {
            name: weight_mapping.interleaved(t, c.head_dim) if name.endswith(weight_mapping.TURNED) else t
            for name, t in tensors.items()
        }
        tensors = {_mateconv_name(name): tensor for name, tensor in turned.items()}
    state = {name: _to_torch(torch, tensor.read()) for name, tensor in tensors.items()}
    if c.tie_word_embeddings:  # PyTorch has both, as one
        embedding, output = ("model.embed_tokens", "lm_head") if c.qk_norm else ("tok_embeddings", "output")
        state[f"{output}.weight"] = state[f"{embedding}.weight"]
    torch.save(state, path)


def read_tensors(path: Path, key: str) -> dict[str, Tensor]:
    """The tensors of a file that holds nothing but a state dict, by its names.

    Raises:
      UserError: no PyTorch; a file that holds other than tensors and plain values.
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
    except Exception as error:  # UnpicklingError for what is no tensor, and whatever a broken file raises
        reason = " ".join(str(error).split())
        if found := re.search(r"GLOBAL ([\w.]+)", reason):
            reason = f"it asks for {found[1]}"
        raise UserError(
            f"{key}: {path} is not read ({reason[:200]}; expected tensors and plain values only, since anything else in a "
            "pickle can run a program: save the model's state_dict() alone)"
        ) from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{key}: {path} holds a {type(checkpoint).__name__} (expected a state dict)")
    return checkpoint


def _state(checkpoint: dict, path: Path, key: str) -> tuple[dict[str, Tensor], bool]:
    """The tensors by Hugging Face's names, rotary pairs as they are, and whether the file has those names."""
    state = checkpoint["model_state_dict"] if isinstance(checkpoint.get("model_state_dict"), dict) else checkpoint
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): tensor for name, tensor in _lazy(state).items()}
    has_hf_names = "model.embed_tokens.weight" in state
    if not has_hf_names and "tok_embeddings.weight" not in state:
        some = ", ".join(map(str, list(checkpoint)[:3])) or "nothing"
        raise UserError(
            f"{key}: {path} holds {some} … (expected the tensors of a model, such as tok_embeddings.weight or "
            "model.embed_tokens.weight, or a model_state_dict with them)"
        )
    if not has_hf_names:
        state = {_hf_name(name): tensor for name, tensor in state.items()}
    return state, has_hf_names


def _lazy(state: dict) -> dict[str, Tensor]:
    """What of a state dict is a weight."""
    return {
        name: Tensor(tuple(value.shape), functools.partial(_to_numpy, value))
        for name, value in state.items()
        if isinstance(name, str) and hasattr(value, "dim") and not name.endswith(weight_mapping.BUFFERS)
    }


def _hf_name(name: str) -> str:
    """layers.0.attention.wq.weight to model.layers.0.self_attn.q_proj.weight."""
    name = ".".join(PIECES.get(piece, piece) for piece in name.split("."))
    return name if name.startswith("lm_head") else f"model.{name}"


def _mateconv_name(name: str) -> str:
    pieces = {theirs: ours for ours, theirs in PIECES.items()}
    return ".".join(pieces.get(piece, piece) for piece in name.removeprefix("model.").split("."))


def _configuration(state: dict[str, Tensor], has_hf_names: bool, n_heads: int | None, path: Path) -> ConfigDict:
    """What the shapes tell, and defaults for what they do not."""

    def shape(name: str, axis: int = 0, layer: str = "model.layers.0.") -> int:
        tensor = state.get(layer + name)
        if tensor is None or len(tensor.shape) <= axis:
            raise UserError(f"{path}: the tensor {layer}{name} is missing" + ("" if has_hf_names else " (in MateConv's names)"))
        return tensor.shape[axis]

    qk_norm = "model.layers.0.self_attn.q_norm.weight" in state
    defaults = (MINIMIND_QK_NORM if qk_norm else MINIMIND) if has_hf_names else MATECONV
    q_rows, k_rows = shape("self_attn.q_proj.weight"), shape("self_attn.k_proj.weight")
    told = q_rows // shape("self_attn.q_norm.weight") if qk_norm else None
    n_heads = (told or int(defaults["n_heads"])) if n_heads is None else n_heads
    head_dim = q_rows // max(n_heads, 1)
    if n_heads * head_dim != q_rows or k_rows % head_dim or told not in (None, n_heads):
        raise UserError(
            f"--n_heads: {n_heads} does not fit {path}, whose queries have {q_rows} features and keys {k_rows} (expected the "
            "number of heads that the model was trained with)"
        )
    gate = state.get("model.layers.0.mlp.gate.weight")
    if gate is not None and has_hf_names:
        raise UserError(f"{path}: a mixture of experts of MiniMind 3 is not possible (its one expert a token has the weight 1)")
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
        "tie_word_embeddings": output is None or np.array_equal(output.read(), embedding.read()),
    }
    if gate is not None:  # of whose experts a token takes 2, which no shape tells either
        shared = "model.layers.0.mlp.shared_expert.gate_proj.weight" in state
        model |= {"use_moe": True, "n_routed_experts": gate.shape[0], "n_shared_experts": int(shared)}
    return hf_config.configuration(model, str(path))


# ---- arrays -------------------------------------------------------------------------------------------------------


def _to_numpy(tensor) -> np.ndarray:
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # which numpy has not by itself
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _to_torch(torch, array: np.ndarray):
    if array.dtype == ml_dtypes.bfloat16:
        return torch.tensor(array.view(np.int16)).view(torch.bfloat16)
    return torch.tensor(array)
