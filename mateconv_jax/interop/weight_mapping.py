"""The mapping between our parameters and Hugging Face's tensors. Every format is read and written through it.

Names and shapes are those of transformers' LlamaForCausalLM, with QK norm Qwen3ForCausalLM, with biases Qwen2ForCausalLM, and
with experts Qwen2MoeForCausalLM. Both sides use the rotary pairs (j, j + N/2) and (out, in) weights.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from mateconv_jax.errors import UserError

# Name endings of buffers that files may hold besides the weights; models compute them.
BUFFERS = ("rotary_emb.inv_freq", "pos_cis", "freqs_cis", "freqs_cos", "freqs_sin", "attn.mask", "attention.mask")
ROTATED = ("self_attn.q_proj.weight", "self_attn.k_proj.weight")  # outputs the rotary embedding is applied to


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that is read on demand.

    Attributes:
      shape: its shape.
      read: returns its array, in any float dtype.
    """

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


Mapping = dict[str, list[tuple[str, tuple[int, ...]]]]


def mapping(c) -> Mapping:
    """{our parameter: [(Hugging Face name, shape), …]}. Our array is the tensors' concatenation along axis 0, reshaped.

    Args:
      c: a ModelConfig, or config.model, resolved.
    """
    D, F, V, N = c.dim, c.hidden_dim, c.vocab_size, c.head_dim
    H, K = c.n_heads * N, c.n_kv_heads * N
    ours: Mapping = {"embedding_VD": [("model.embed_tokens.weight", (V, D))], "norm.scale_D": [("model.norm.weight", (D,))]}
    if not c.tie_word_embeddings:
        ours["output_VD"] = [("lm_head.weight", (V, D))]
    for i in range(c.n_layers):
        block, layer = f"blocks.{i}", f"model.layers.{i}"
        qkv = (("q", H), ("k", K), ("v", K))
        ours[f"{block}.attention_norm.scale_D"] = [(f"{layer}.input_layernorm.weight", (D,))]
        ours[f"{block}.attention.wqkv_JND"] = [(f"{layer}.self_attn.{name}_proj.weight", (rows, D)) for name, rows in qkv]
        if c.qkv_bias:
            ours[f"{block}.attention.bqkv_O"] = [(f"{layer}.self_attn.{name}_proj.bias", (rows,)) for name, rows in qkv]
        ours[f"{block}.attention.wo_DHN"] = [(f"{layer}.self_attn.o_proj.weight", (D, H))]
        if c.qk_norm:
            ours[f"{block}.attention.q_norm.scale_D"] = [(f"{layer}.self_attn.q_norm.weight", (N,))]
            ours[f"{block}.attention.k_norm.scale_D"] = [(f"{layer}.self_attn.k_norm.weight", (N,))]
        ours[f"{block}.ffn_norm.scale_D"] = [(f"{layer}.post_attention_layernorm.weight", (D,))]
        if not c.use_moe:
            ours |= _feed_forward(f"{block}.feed_forward", f"{layer}.mlp", D, F)
            continue
        experts = [f"{layer}.mlp.experts.{e}" for e in range(c.n_routed_experts)]
        ours[f"{block}.feed_forward.gate_ED"] = [(f"{layer}.mlp.gate.weight", (len(experts), D))]
        ours[f"{block}.feed_forward.w13_E2FD"] = [
            (f"{expert}.{name}_proj.weight", (F, D)) for expert in experts for name in ("gate", "up")
        ]
        ours[f"{block}.feed_forward.w2_EDF"] = [(f"{expert}.down_proj.weight", (D, F)) for expert in experts]
        if c.n_shared_experts:
            ours |= _feed_forward(f"{block}.feed_forward.shared_experts", f"{layer}.mlp.shared_expert", D, F)
    return ours


def _feed_forward(ours: str, theirs: str, D: int, F: int) -> Mapping:
    w13: list[tuple[str, tuple[int, ...]]] = [(f"{theirs}.{name}_proj.weight", (F, D)) for name in ("gate", "up")]
    return {f"{ours}.w13_2FD": w13, f"{ours}.w2_DF": [(f"{theirs}.down_proj.weight", (D, F))]}


def from_hf(tensors: dict[str, Tensor], c, abstract_params: nnx.State, source: str) -> nnx.State:
    """Read parameters onto their devices, one array at a time, so that the host never holds more than one.

    Args:
      tensors: by Hugging Face name. With tied weights, an output layer equal to the embedding may be included.
      c: a ModelConfig, or config.model, resolved.
      abstract_params: ShapeDtypeStructs, with a sharding where an array is to be sharded.
      source: where the tensors come from, for error messages.

    Returns:
      Parameters with the tree, dtypes and shardings of `abstract_params`.

    Raises:
      UserError: a tensor is missing, unknown or of the wrong shape.
    """
    ours = mapping(c)
    check_tensors(tensors, ours, source)

    def read(path, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        array = np.empty(leaf.shape, leaf.dtype)
        shapes = ours[parameter_name(path)]
        rows = array.reshape(-1, *shapes[0][1][1:])
        start = 0
        for name, shape in shapes:
            rows[start : start + shape[0]] = tensors[name].read()
            start += shape[0]
        sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: array[index])

    return jax.tree_util.tree_map_with_path(read, abstract_params)


def to_hf(params: nnx.State, c) -> dict[str, Tensor]:
    """The parameters as tensors by Hugging Face name, in their dtype; without an output layer if it is tied."""
    arrays = {parameter_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    tensors = {}
    for ours, shapes in mapping(c).items():
        start = 0
        for name, shape in shapes:

            def read(array=arrays[ours], start=start, shape=shape) -> np.ndarray:
                return np.asarray(array).reshape(-1, *shape[1:])[start : start + shape[0]]

            tensors[name] = Tensor(shape, read)
            start += shape[0]
    return tensors


def check_tensors(tensors: dict[str, Tensor], ours: Mapping, source: str) -> None:
    """Raises UserError unless the tensors are exactly those of the mapping `ours`."""
    expected = {name: shape for shapes in ours.values() for name, shape in shapes}
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith(BUFFERS)}
    tied = found.pop("lm_head.weight", None) if "lm_head.weight" not in expected else None
    if missing := [name for name in expected if name not in found]:
        raise UserError(f"{source}: {_list(missing)} missing")
    if extra := [name for name in found if name not in expected]:
        raise UserError(f"{source}: {_list(extra)} unknown (expected {len(expected)} tensors, such as {next(iter(expected))})")
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise UserError(f"{source}: {name} has shape {found[name].shape} (expected {shape}, from the configuration)")
    if tied is not None and not np.array_equal(tied.read(), found["model.embed_tokens.weight"].read()):
        raise UserError(
            f"{source}: lm_head.weight differs from the embedding, although the configuration ties them (expected "
            "tie_word_embeddings false, or no lm_head.weight)"
        )


def half_split(tensor: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of each head from rotary pairs (2j, 2j + 1), as in PyTorch MateConv and llama.cpp, to (j, j + N/2)."""
    return Tensor(tensor.shape, lambda: _permute(tensor.read(), (-1, head_dim // 2, 2)))


def interleaved(tensor: Tensor, head_dim: int) -> Tensor:
    """The inverse of `half_split`."""
    return Tensor(tensor.shape, lambda: _permute(tensor.read(), (-1, 2, head_dim // 2)))


def _permute(w_OD: np.ndarray, split: tuple[int, int, int]) -> np.ndarray:
    return w_OD.reshape(*split, w_OD.shape[-1]).swapaxes(1, 2).reshape(w_OD.shape)


def n_parameters(c) -> int:
    """The number of parameters, counting tied weights once. c: as in `mapping`."""
    return sum(math.prod(shape) for shapes in mapping(c).values() for _, shape in shapes)


def parameter_name(path) -> str:
    """A leaf's path in the parameter tree as a dotted name, such as blocks.0.attention.wqkv_JND."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def _list(names: list[str]) -> str:
    if len(names) == 1:
        return f"the tensor {names[0]} is"
    return f"{len(names)} tensors ({', '.join(names[:3])}{', …' if len(names) > 3 else ''}) are"
