"""The mesh and every partition rule.

Two axes: `data` splits the batch alone, `fsdp` splits the batch and, with it, parameters, EMA and optimizer state (ZeRO-3,
Rajbhandari et al., 2020), which XLA gathers where a layer needs them.
"""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mateconv_jax.errors import UserError

SMALLEST_SPLIT = 2**14  # elements; a smaller array is whole on every device, a gather would cost more than it saves


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The axes `data` and `fsdp` over devices (None: those of all processes); -1 for one of them: what the other leaves.

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
            f"mesh.data, mesh.fsdp: {data} x {fsdp} are not the {count} devices there are (expected factors of {count}, of "
            "which one may be -1)"
        )
    # Auto: with jax.make_mesh's default, Explicit, indexing a replicated table by sharded tokens is a type error.
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def batch(mesh: Mesh, rows_axis: int = 0) -> NamedSharding:
    """Rows split over all devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * rows_axis, ("data", "fsdp")))


def to_devices(rows: dict[str, np.ndarray], mesh: Mesh, rows_axis: int = 0) -> dict[str, jax.Array]:
    """This process's rows as part of the global batch: arrays (B, …), or with rows_axis=1 (A micro-batches, B, …)."""
    return jax.tree.map(functools.partial(jax.make_array_from_process_local_data, batch(mesh, rows_axis)), rows)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def with_shardings(mesh: Mesh, tree):
    """A tree of shapes, each with its sharding: every large array is split over `fsdp`, along the first axis that this divides
    (along a later one, gathering would transpose it).
    """
    fsdp = mesh.shape["fsdp"]

    def rule(x):
        axes = [axis for axis in range(x.ndim) if x.shape[axis] % fsdp == 0]
        if fsdp == 1 or not axes or np.prod(x.shape) < SMALLEST_SPLIT:
            sharding = replicated(mesh)
        else:
            sharding = NamedSharding(mesh, PartitionSpec(*[None] * axes[0], "fsdp"))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(rule, tree)


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises UserError where the global batch cannot be split evenly."""
    devices = mesh.size
    if batch_size % devices:
        below, above = batch_size // devices * devices, -(-batch_size // devices) * devices
        raise UserError(
            f"training.batch_size: {batch_size} rows cannot be split over {devices} devices "
            f"(it is the global batch: expected a multiple of {devices}, such as {below or above} or {above})"
        )
