"""Norms of trees with few kernel launches on a GPU: optax.tree.norm takes two kernels per leaf."""

import jax
import jax.numpy as jnp


def squares_by_leaf(tree) -> jax.Array:
    """Sum of squares of each leaf, in the order of jax.tree.leaves, fp32 (leaves,). Leaves of the same shape go together."""
    leaves = jax.tree.leaves(tree)
    of_shape: dict[tuple[int, ...], list[int]] = {}
    for i, x in enumerate(leaves):
        of_shape.setdefault(x.shape, []).append(i)
    squares = [jnp.square(jnp.stack([leaves[i] for i in same])) for same in of_shape.values()]
    sums = jnp.concatenate([jnp.sum(x, axis=range(1, x.ndim)) for x in squares])
    order = [i for same in of_shape.values() for i in same]
    return sums[jnp.array([order.index(i) for i in range(len(leaves))])]


def global_norm(tree) -> jax.Array:
    """Norm of all leaves as one vector, fp32."""
    return jnp.sqrt(jnp.sum(squares_by_leaf(tree)))


def norm_beside(tree) -> jax.Array:
    """global_norm of a tree that is being computed: rows are summed in the kernels that compute them."""

    def rows(x):
        # Along short axes (FSDP may have sharded the axis after them) and the last, not along those that a kernel parallelises.
        summed = [axis for axis in range(x.ndim - 1) if x.shape[axis] < 16] + [x.ndim - 1] * (x.ndim > 1)
        return jnp.sum(jnp.square(x), axis=summed).ravel()

    # Without the barrier XLA would reduce each leaf to a scalar.
    return jnp.sqrt(jnp.sum(jax.lax.optimization_barrier(jnp.concatenate([rows(x) for x in jax.tree.leaves(tree)]))))
