"""Grouped matrix products, each row with the matrix of its group: the products of a mixture of experts.

Dims: M rows, D in, F out, E groups.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from slmjax.kernels import products
from slmjax.parallel import communication, mesh


def grouped_matmul(
    x: Float[Array, "M D"], weights: Float[Array, "E D F"], group_sizes: Int[Array, " E"]
) -> Float[Array, "M F"]:
    """Return each row times its group's matrix, in the dtype of `x`; rows past the last group give 0.

    Args:
      x: rows sorted by group.
      group_sizes: int32, the number of rows of each group; they sum to at most M.
    """
    # Both implementations have custom gradients, which inside `shard_mapped` need arguments that vary over
    # the same mesh axes.
    return choose_grouped_matmul(mesh.platform())(
        *communication.match_varying(x, weights.astype(x.dtype), group_sizes)
    )


def choose_grouped_matmul(platform: str) -> Callable[[Array, Array, Array], Array]:
    """Return the implementation of `grouped_matmul` for a platform.

    `jax.lax.ragged_dot` is one kernel on TPU and GPU. On CPU it multiplies every row with every group's
    matrix, so blocks of rows are used there.
    """
    name = "blocks of rows" if platform == "cpu" else "jax.lax.ragged_dot"
    products.log_choice(f"grouped products on {platform}: {name}")
    return _blocked_groups if platform == "cpu" else _ragged_groups


def _ragged_groups(x: Array, weights: Array, group_sizes: Array) -> Array:
    # The contents of rows past the last group are unspecified, in the product and in its gradient.
    grouped = (jnp.arange(x.shape[0]) < jnp.sum(group_sizes))[:, None]
    return jnp.where(grouped, jax.lax.ragged_dot(jnp.where(grouped, x, 0), weights, group_sizes), 0)


@jax.custom_vjp
def _blocked_groups(x: Array, weights: Array, group_sizes: Array) -> Array:
    """Loop over blocks of rows of one group each; rows are sorted, so a block is a slice, not a gather."""
    return _block_products(x, weights, group_sizes, contracted=0)


def _blocked_groups_forward(
    x: Array, weights: Array, group_sizes: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
    return _block_products(x, weights, group_sizes, contracted=0), (x, weights, group_sizes)


def _blocked_groups_backward(saved: tuple[Array, Array, Array], dy: Array) -> tuple[Array, Array, None]:
    x, weights, group_sizes = saved
    dx = _block_products(dy, weights, group_sizes, contracted=1)
    return dx, _block_outer_products(x, dy, group_sizes).astype(weights.dtype), None


_blocked_groups.defvjp(_blocked_groups_forward, _blocked_groups_backward)


def _block_layout(group_sizes: Array, num_rows: int) -> tuple[int, Array, Array, Array, Array]:
    """Return rows per block, each block's group, first row and number of rows, and the number of blocks used.

    The arrays have a static number of blocks, an upper bound: all full blocks, and a partial one per group.
    """
    num_groups = group_sizes.shape[0]
    # Half the rows of a group under an even load: little padding, and few iterations.
    block = min(256, max(8, -(-(num_rows // num_groups) // 16) * 8))
    blocks = -(-group_sizes // block)
    ends = jnp.cumsum(blocks)
    index = jnp.arange(-(-num_rows // block) + num_groups)
    group = jnp.minimum(jnp.searchsorted(ends, index, side="right"), num_groups - 1)
    skipped = block * (index - (ends - blocks)[group])
    first = (jnp.cumsum(group_sizes) - group_sizes)[group] + skipped
    return block, group, first, jnp.clip(group_sizes[group] - skipped, 0, block), ends[-1]


def _block_products(x: Array, weights: Array, group_sizes: Array, *, contracted: int) -> Array:
    """Multiply rows with their group's matrix, of which dim `contracted` is contracted.

    The last block of a group overhangs into the next group's rows, which the next block then overwrites; the
    overhang of the last block of all is zeros.
    """
    num_rows = x.shape[0]
    block, group, first, count, num_blocks = _block_layout(group_sizes, num_rows)
    padded = jnp.pad(x, [(0, block), (0, 0)])
    offset = jnp.arange(block)[:, None]

    def multiply(index: Array, out: Array) -> Array:
        rows = jax.lax.dynamic_slice_in_dim(padded, first[index], block)
        matrix = jax.lax.dynamic_index_in_dim(weights, group[index], keepdims=False)
        product = products.product(rows, matrix, (-1, contracted - 2)).astype(x.dtype)
        return jax.lax.dynamic_update_slice_in_dim(
            out, jnp.where(offset < count[index], product, 0), first[index], axis=0
        )

    start, _ = communication.match_varying(
        jnp.zeros((num_rows + block, weights.shape[2 - contracted]), x.dtype), x
    )
    return jax.lax.fori_loop(0, num_blocks, multiply, start)[:num_rows]


def _block_outer_products(x: Array, dy: Array, group_sizes: Array) -> Array:
    """Return for each group the sum over its rows of the outer product of `x` and `dy`: float32 [E, D, F]."""
    block, group, first, count, num_blocks = _block_layout(group_sizes, x.shape[0])
    # Rows past the last group may hold NaN, which a product with zeros would keep.
    grouped = jnp.where((jnp.arange(x.shape[0]) < jnp.sum(group_sizes))[:, None], x, 0)
    columns = products.transposed(jnp.pad(grouped, [(0, block), (0, 0)]))
    padded_dy = jnp.pad(dy, [(0, block), (0, 0)])
    offset = jnp.arange(block)[:, None]

    def accumulate(index: Array, total: Array) -> Array:
        rows = jax.lax.dynamic_slice_in_dim(columns, first[index], block, axis=1)
        outputs = jnp.where(
            offset < count[index], jax.lax.dynamic_slice_in_dim(padded_dy, first[index], block), 0
        )
        product = products.product(rows, outputs, (-1, -2))
        before = jax.lax.dynamic_index_in_dim(total, group[index], keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(total, before + product, group[index], axis=0)

    start, _ = communication.match_varying(
        jnp.zeros((group_sizes.shape[0], x.shape[1], dy.shape[1]), jnp.float32), x
    )
    return jax.lax.fori_loop(0, num_blocks, accumulate, start)
