"""Our parameters under Hugging Face's names, which every other format is read into and written from.

Names and shapes are those of transformers' LlamaForCausalLM and, with norms of queries and keys, Qwen3ForCausalLM; those of a
mixture of experts are Qwen2MoeForCausalLM's. Their rotary pairs are ours, (j, j + N/2), and weights are (out, in) on both
sides.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from mateconv_jax.errors import UserError

# Buffers that files hold beside the weights, and that a model computes.
BUFFERS = ("rotary_emb.inv_freq", "pos_cis", "freqs_cis", "freqs_cos", "freqs_sin", "attn.mask", "attention.mask")
TURNED = ("self_attn.q_proj.weight", "self_attn.k_proj.weight")  # by the rotary embedding


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that is not read before it is asked for. read: its array in any float dtype, of this shape."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


Parts = dict[str, list[tuple[str, tuple[int, ...]]]]


def parts(c) -> Parts:
    """{our parameter: [(Hugging Face's name, its shape), …]}. Joined along their first axis, they are our array reshaped.

    Args:
      c: a ModelConfig, or config.model, resolved.
    """
    D, F, V, N = c.dim, c.hidden_dim, c.vocab_size, c.head_dim
    H, K = c.n_heads * N, c.n_kv_heads * N
    ours: Parts = {"embedding_VD": [("model.embed_tokens.weight", (V, D))], "norm.scale_D": [("model.norm.weight", (D,))]}
    if not c.tie_word_embeddings:
        ours["output_VD"] = [("lm_head.weight", (V, D))]
    for i in range(c.n_layers):
        block, layer = f"blocks.{i}", f"model.layers.{i}"
        qkv = (("q", H), ("k", K), ("v", K))
        ours[f"{block}.attention_norm.scale_D"] = [(f"{layer}.input_layernorm.weight", (D,))]
        ours[f"{block}.attention.wqkv_JND"] = [(f"{layer}.self_attn.{name}_proj.weight", (rows, D)) for name, rows in qkv]
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


def _feed_forward(ours: str, theirs: str, D: int, F: int) -> Parts:
    w13: list[tuple[str, tuple[int, ...]]] = [(f"{theirs}.{name}_proj.weight", (F, D)) for name in ("gate", "up")]
    return {f"{ours}.w13_2FD": w13, f"{ours}.w2_DF": [(f"{theirs}.down_proj.weight", (D, F))]}


def from_hf(tensors: dict[str, Tensor], c, abstract_params: nnx.State, source: str) -> nnx.State:
    """Parameters read array by array onto their devices; the host holds one of them at a time.

    Args:
      tensors: by Hugging Face's names. Of tied weights, an output layer equal to the embedding may be there too.
      c: a ModelConfig, or config.model, resolved.
      abstract_params: the tree to fill, ShapeDtypeStructs, with shardings where the arrays shall be spread.
      source: where the tensors come from, for errors.

    Returns:
      Parameters like `abstract_params`, in its dtypes.

    Raises:
      UserError: a tensor is missing, one has no place here, or one has another shape.
    """
    ours = parts(c)
    check(tensors, ours, source)

    def read(path, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        array = np.empty(leaf.shape, leaf.dtype)
        shapes = ours[_name(path)]
        rows = array.reshape(-1, *shapes[0][1][1:])
        start = 0
        for name, shape in shapes:
            rows[start : start + shape[0]] = tensors[name].read()
            start += shape[0]
        sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: array[index])

    return jax.tree_util.tree_map_with_path(read, abstract_params)


def to_hf(params: nnx.State, c) -> dict[str, Tensor]:
    """The same tensors by Hugging Face's names, in the parameters' dtype; without the output layer where it is tied."""
    arrays = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    tensors = {}
    for ours, shapes in parts(c).items():
        start = 0
        for name, shape in shapes:

            def read(array=arrays[ours], start=start, shape=shape) -> np.ndarray:
                return np.asarray(array).reshape(-1, *shape[1:])[start : start + shape[0]]

            tensors[name] = Tensor(shape, read)
            start += shape[0]
    return tensors


def check(tensors: dict[str, Tensor], ours: dict[str, list[tuple[str, tuple[int, ...]]]], source: str) -> None:
    """Raises UserError where the tensors are not exactly those of `ours`; see `parts`."""
    expected = {name: shape for shapes in ours.values() for name, shape in shapes}
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith(BUFFERS)}
    tied = found.pop("lm_head.weight", None) if "lm_head.weight" not in expected else None
    if missing := [name for name in expected if name not in found]:
        raise UserError(f"{source}: {_some(missing)} missing")
    if extra := [name for name in found if name not in expected]:
        raise UserError(
            f"{source}: {_some(extra)} not known (expected {len(expected)} tensors, such as {next(iter(expected))})"
        )
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise UserError(f"{source}: {name} has the shape {found[name].shape} (expected {shape}, from the configuration)")
    if tied is not None and not np.array_equal(tied.read(), found["model.embed_tokens.weight"].read()):
        raise UserError(
            f"{source}: lm_head.weight is not the embedding, although the configuration ties them (expected "
            "tie_word_embeddings false, or no lm_head.weight)"
        )


def half_split(tensor: Tensor, head_dim: int) -> Tensor:
    """Rows (2j, 2j + 1) of each head, as PyTorch MateConv and llama.cpp pair them, to (j, j + N/2)."""
    return Tensor(tensor.shape, lambda: _swap(tensor.read(), (-1, head_dim // 2, 2)))


def interleaved(tensor: Tensor, head_dim: int) -> Tensor:
    """Rows (j, j + N/2) of each head to (2j, 2j + 1)."""
    return Tensor(tensor.shape, lambda: _swap(tensor.read(), (-1, 2, head_dim // 2)))


def _swap(w_OD: np.ndarray, split: tuple[int, int, int]) -> np.ndarray:
    return w_OD.reshape(*split, w_OD.shape[-1]).swapaxes(1, 2).reshape(w_OD.shape)


def n_parameters(c) -> int:
    return sum(math.prod(shape) for shapes in parts(c).values() for _, shape in shapes)


def _name(path) -> str:
    """blocks.0.attention.wqkv_JND, of a leaf's path in the parameter tree."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def _some(names: list[str]) -> str:
    if len(names) == 1:
        return f"the tensor {names[0]} is"
    return f"{len(names)} tensors ({', '.join(names[:3])}{', …' if len(names) > 3 else ''}) are"
