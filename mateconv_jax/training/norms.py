"""Norms of trees that launch few kernels on a GPU: one of each leaf, as optax.tree.norm takes it, is two kernels a leaf."""

import jax
import jax.numpy as jnp


def squares_by_leaf(tree) -> jax.Array:
    """The sum of squares of each leaf, in the order of jax.tree.leaves, fp32 (leaves,); leaves of one shape at once."""
    leaves = jax.tree.leaves(tree)
    of_shape: dict[tuple[int, ...], list[int]] = {}
    for i, x in enumerate(leaves):
        of_shape.setdefault(x.shape, []).append(i)
    squares = [jnp.square(jnp.stack([leaves[i] for i in same])) for same in of_shape.values()]
    sums = jnp.concatenate([jnp.sum(x, axis=range(1, x.ndim)) for x in squares])
    order = [i for same in of_shape.values() for i in same]
    return sums[jnp.array([order.index(i) for i in range(len(leaves))])]


def global_norm(tree) -> jax.Array:
    """The norm of all leaves together."""
    return jnp.sqrt(jnp.sum(squares_by_leaf(tree)))


def norm_beside(tree) -> jax.Array:
    """The same of what is just being computed: rows are summed in the kernels that compute it."""

    def rows(x):
        # Not along axes on which a kernel can work in parallel, but along short ones: FSDP may have split the axis after them.
        summed = [axis for axis in range(x.ndim - 1) if x.shape[axis] < 16] + [x.ndim - 1] * (x.ndim > 1)
        return jnp.sum(jnp.square(x), axis=summed).ravel()

    # Without the barrier XLA would sum each leaf to its end.
    return jnp.sqrt(jnp.sum(jax.lax.optimization_barrier(jnp.concatenate([rows(x) for x in jax.tree.leaves(tree)]))))
