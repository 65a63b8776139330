"""Gradients of a batch that is split over devices: each device computes those of its rows, then they are summed.

With shard_map and not by XLA's partitioner, which sums one array at a time, in the dtype of the computation, and once per
accumulated micro-batch.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

# Bytes per all-reduce, which then overlaps with the rest of the backward pass, as in PyTorch's DistributedDataParallel. Two of
# them exceed what XLA would combine again (30 MiB).
BUCKET_BYTES = 25 * 10**6

_REPLICATED = PartitionSpec()


def over_devices(sums: Callable, abstract_params: nnx.State, dtype: str, compute_dtype: jnp.dtype) -> Callable:
    """`sums` over the rows of all devices.

    Args:
      sums: (params, batch, step, scale, device, gather) -> (totals, gradients, factor) of the rows in `batch`; totals, a tree,
        and gradients are summed. `sums` calls gather(params) for full parameters; gradients are with respect to the shards.
      abstract_params: shapes and shardings, over a mesh with the axes data and fsdp.
      dtype: in which gradients are summed.
      compute_dtype: in which sharded parameters are gathered.

    Returns:
      (params, batch, step, scale) -> the same three for the global batch; gradients are fp32 and sharded as the parameters are.
    """
    mesh = jax.tree.leaves(abstract_params)[0].sharding.mesh
    specs = jax.tree.map(lambda p: p.sharding.spec, abstract_params)

    def gather(params):
        def gather_leaf(path, p, spec):
            is_gate = any(getattr(key, "key", None) == "gate_ED" for key in path)  # a mixture's gate computes in fp32
            gathered = p.dtype if is_gate else compute_dtype
            return p if spec == _REPLICATED else _gather(p, spec.index("fsdp"), dtype, gathered)

        return jax.tree.map_with_path(gather_leaf, params, specs)

    def of_this_device(params, batch, step, scale):
        device = jax.lax.axis_index(("data", "fsdp"))
        totals, grads, factor = sums(params, batch, step, scale, device, gather)
        return jax.lax.psum(totals, ("data", "fsdp")), _all_reduce(grads, specs, dtype, mesh), factor

    rows = PartitionSpec(None, ("data", "fsdp"))
    return jax.shard_map(
        of_this_device,
        mesh=mesh,
        in_specs=(specs, rows, _REPLICATED, _REPLICATED),
        out_specs=(_REPLICATED, specs, _REPLICATED),
        check_vma=False,  # would add another sum to every gradient
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(p, axis: int, dtype: str, compute_dtype: jnp.dtype):
    """The full parameter of a shard along `axis`; backward, the shard of the gradient, summed in `dtype`."""
    return jax.lax.all_gather(p.astype(compute_dtype), "fsdp", axis=axis, tiled=True)


def _gather_backward(axis, dtype, compute_dtype, _, g):
    return (jax.lax.psum_scatter(g.astype(dtype), "fsdp", scatter_dimension=axis, tiled=True).astype(jnp.float32),)


_gather.defvjp(lambda p, *static: (_gather(p, *static), None), _gather_backward)


def _all_reduce(grads, specs, dtype: str, mesh):
    """Sum gradients of replicated parameters over all devices, and those of shards, already summed within the fsdp group, over
    `data`; the result is fp32.
    """
    paths, structure = jax.tree.flatten_with_path(grads)
    leaves = [g for _, g in paths]
    is_shard = [spec != _REPLICATED for spec in jax.tree.leaves(specs, is_leaf=lambda spec: isinstance(spec, PartitionSpec))]
    # In the order in which the backward pass finishes them: the last block first, the (tied) embedding last.
    order = sorted(range(len(leaves)), key=lambda i: (paths[i][0][0].key != "blocks", -i))
    for axes, members in (
        (("data", "fsdp"), [i for i in order if not is_shard[i]]),
        (("data",), [i for i in order if is_shard[i]]),
    ):
        if all(mesh.shape[axis] == 1 for axis in axes):
            continue
        for bucket in buckets(members, [leaves[i].size * jnp.dtype(dtype).itemsize for i in members]):
            flat = jnp.concatenate([leaves[i].ravel().astype(dtype) for i in bucket])
            flat = jax.lax.psum(flat, axes).astype(jnp.float32)
            ends = np.cumsum([leaves[i].size for i in bucket])
            for i, part in zip(bucket, jnp.split(flat, ends[:-1]), strict=True):
                leaves[i] = part.reshape(leaves[i].shape)
    return jax.tree.unflatten(structure, leaves)


def buckets(members: list, sizes: list[int]) -> list[list]:
    """`members` in order, split where BUCKET_BYTES are reached."""
    cut, filled = [], BUCKET_BYTES
    for member, size in zip(members, sizes, strict=True):
        if filled >= BUCKET_BYTES:
            cut.append([])
            filled = 0
        cut[-1].append(member)
        filled += size
    return cut
