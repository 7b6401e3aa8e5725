"""Grouped matrix products, each row with the matrix of its group: the inner product of a mixture of experts.

Dims: M rows, D in, F out, E groups.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from slmjax.kernels import cpu
from slmjax.kernels.choice import announce
from slmjax.parallel import communication, mesh


def grouped_matmul(
    x: Float[Array, "M D"], weights: Float[Array, "E D F"], group_sizes: Int[Array, " E"]
) -> Float[Array, "M F"]:
    """Each row times the matrix of its group, in the dtype of `x`; rows past the sum of `group_sizes` give 0.

    Args:
      x: rows sorted by group.
      group_sizes: int32, how many rows each group has; they sum to at most M.
    """
    # Both forms have gradients of their own: under `sharding.local` all arguments must enter as equally
    # divided.
    return choose_grouped_matmul(mesh.platform())(
        *communication.match_varying(x, weights.astype(x.dtype), group_sizes)
    )


def choose_grouped_matmul(platform: str) -> Callable[[Array, Array, Array], Array]:
    """The form of `grouped_matmul` for a platform.

    `jax.lax.ragged_dot` is one kernel on TPU and GPU. On CPU it multiplies every row with every group's
    matrix, so that blocks of rows are used instead.
    """
    announce(
        f"grouped products on {platform}: "
        + ("blocks of rows" if platform == "cpu" else "jax.lax.ragged_dot")
    )
    return _blocked_groups if platform == "cpu" else _ragged_groups


def _ragged_groups(x: Array, weights: Array, group_sizes: Array) -> Array:
    # What a kernel leaves in the rows past the last group is not specified, in the product and in its
    # gradient.
    grouped = (jnp.arange(x.shape[0]) < jnp.sum(group_sizes))[:, None]
    return jnp.where(grouped, jax.lax.ragged_dot(jnp.where(grouped, x, 0), weights, group_sizes), 0)


@jax.custom_vjp
def _blocked_groups(x: Array, weights: Array, group_sizes: Array) -> Array:
    """A loop over blocks of rows, each of one group. Rows are sorted, so that a block is a slice and nothing
    is gathered.
    """
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
    """Rows per block; then group, first row and number of rows of each block, and how many of the blocks are
    in use.
    """
    num_groups = group_sizes.shape[0]
    # half of an even share: few rows of padding, few rounds
    block = min(256, max(8, -(-(num_rows // num_groups) // 16) * 8))
    blocks = -(-group_sizes // block)
    ends = jnp.cumsum(blocks)
    index = jnp.arange(-(-num_rows // block) + num_groups)
    group = jnp.minimum(jnp.searchsorted(ends, index, side="right"), num_groups - 1)
    skipped = block * (index - (ends - blocks)[group])
    first = (jnp.cumsum(group_sizes) - group_sizes)[group] + skipped
    return block, group, first, jnp.clip(group_sizes[group] - skipped, 0, block), ends[-1]


def _block_products(x: Array, weights: Array, group_sizes: Array, *, contracted: int) -> Array:
    """Rows times their group's matrix, contracting this dim of it. A block overhangs into the next group's
    rows, which the next block then overwrites; the overhang of the last is zeros."""
    num_rows = x.shape[0]
    block, group, first, count, num_blocks = _block_layout(group_sizes, num_rows)
    padded = jnp.pad(x, [(0, block), (0, 0)])
    offset = jnp.arange(block)[:, None]

    def multiply(index: Array, out: Array) -> Array:
        rows = jax.lax.dynamic_slice_in_dim(padded, first[index], block)
        matrix = jax.lax.dynamic_index_in_dim(weights, group[index], keepdims=False)
        product = cpu.product(rows, matrix, (-1, contracted - 2)).astype(x.dtype)
        return jax.lax.dynamic_update_slice_in_dim(
            out, jnp.where(offset < count[index], product, 0), first[index], axis=0
        )

    start, _ = communication.match_varying(
        jnp.zeros((num_rows + block, weights.shape[2 - contracted]), x.dtype), x
    )
    return jax.lax.fori_loop(0, num_blocks, multiply, start)[:num_rows]


def _block_outer_products(x: Array, dy: Array, group_sizes: Array) -> Array:
    """For each group the sum over its rows of the outer product of `x` and `dy`, in float32: [E, D, F]."""
    block, group, first, count, num_blocks = _block_layout(group_sizes, x.shape[0])
    # what else there is may not be finite
    grouped = jnp.where((jnp.arange(x.shape[0]) < jnp.sum(group_sizes))[:, None], x, 0)
    columns = cpu.transposed(jnp.pad(grouped, [(0, block), (0, 0)]))
    padded_dy = jnp.pad(dy, [(0, block), (0, 0)])
    offset = jnp.arange(block)[:, None]

    def accumulate(index: Array, total: Array) -> Array:
        rows = jax.lax.dynamic_slice_in_dim(columns, first[index], block, axis=1)
        outputs = jnp.where(
            offset < count[index], jax.lax.dynamic_slice_in_dim(padded_dy, first[index], block), 0
        )
        product = cpu.product(rows, outputs, (-1, -2))
        before = jax.lax.dynamic_index_in_dim(total, group[index], keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(total, before + product, group[index], axis=0)

    start, _ = communication.match_varying(
        jnp.zeros((group_sizes.shape[0], x.shape[1], dy.shape[1]), jnp.float32), x
    )
    return jax.lax.fori_loop(0, num_blocks, accumulate, start)
