"""The mesh and every partition rule: the batch is split over all devices, everything else is whole on each."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mateconv_jax.errors import UserError


def make_mesh() -> Mesh:
    """All devices on one axis, `data`."""
    # Auto: with jax.make_mesh's default, Explicit, indexing a replicated table by sharded tokens is a type error.
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def batch(mesh: Mesh, rows_axis: int = 0) -> NamedSharding:
    """Rows split over the devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * rows_axis, "data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Parameters, optimizer state, EMA."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises UserError where the global batch cannot be split evenly."""
    devices = mesh.shape["data"]
    if batch_size % devices:
        below, above = batch_size // devices * devices, -(-batch_size // devices) * devices
        raise UserError(
            f"training.batch_size: {batch_size} rows cannot be split over {devices} devices "
            f"(it is the global batch: expected a multiple of {devices}, such as {below or above} or {above})"
        )
