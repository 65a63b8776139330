"""The device mesh and all partition rules.

Two axes: `data` shards only the batch; `fsdp` shards the batch and also parameters, EMA and optimizer state (ZeRO-3,
Rajbhandari et al., 2020), which XLA gathers where a layer needs them.
"""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mateconv_jax.errors import UserError

MIN_SHARDED_SIZE = 2**14  # elements; smaller arrays are replicated, because gathering them would cost more than it saves


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes `data` and `fsdp`.

    Args:
      data, fsdp: the sizes of the axes; one may be -1 (the remaining devices).
      devices: None: those of all processes.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    count = jax.device_count() if devices is None else len(devices)
    if data == -1 and fsdp > 0:
        data = count // fsdp
    elif fsdp == -1 and data > 0:
        fsdp = count // data
    if data * fsdp != count or data < 1:
        raise UserError(
            f"mesh.data, mesh.fsdp: {data} x {fsdp} does not match the {count} devices (expected factors of {count}; one of "
            "them may be -1)"
        )
    # Auto: with jax.make_mesh's default, Explicit, indexing a replicated table by sharded tokens is a type error.
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def batch(mesh: Mesh, rows_axis: int = 0) -> NamedSharding:
    """Shard rows over all devices. rows_axis: the axis of an array that holds rows."""
    return NamedSharding(mesh, PartitionSpec(*[None] * rows_axis, ("data", "fsdp")))


def to_devices(rows: dict[str, np.ndarray], mesh: Mesh, rows_axis: int = 0) -> dict[str, jax.Array]:
    """The global batch from each process's own rows: arrays (B, …), or with rows_axis=1 (A micro-batches, B, …)."""
    return jax.tree.map(functools.partial(jax.make_array_from_process_local_data, batch(mesh, rows_axis)), rows)


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def with_shardings(mesh: Mesh, tree):
    """Add shardings to a tree of ShapeDtypeStructs: large arrays are sharded over `fsdp` along the first axis it divides (along
    a later one, gathering would transpose), all others replicated.
    """
    fsdp = mesh.shape["fsdp"]

    def rule(x):
        axes = [axis for axis in range(x.ndim) if x.shape[axis] % fsdp == 0]
        if fsdp == 1 or not axes or np.prod(x.shape) < MIN_SHARDED_SIZE:
            sharding = replicated(mesh)
        else:
            sharding = NamedSharding(mesh, PartitionSpec(*[None] * axes[0], "fsdp"))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(rule, tree)


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises UserError if the global batch cannot be split evenly over the devices."""
    devices = mesh.size
    if batch_size % devices:
        below, above = batch_size // devices * devices, -(-batch_size // devices) * devices
        raise UserError(
            f"training.batch_size: {batch_size} rows cannot be split over {devices} devices "
            f"(it is the global batch: expected a multiple of {devices}, such as {below or above} or {above})"
        )
