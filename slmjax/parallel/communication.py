"""The device mesh, the rules that place parameters on it, and the one `shard_map` entry point.

Modules name logical dims ("batch", "heads", "ffn", ...); only this file knows mesh axes. `make_mesh` builds a
mesh with compiler-managed (Auto) axes and is entered with `jax.set_mesh(mesh)`; inside it `constrain`,
`shard_mapped` and the collectives work by logical dims, and without a mesh they are the identity, so the same
code runs on one device.

Logical dims: batch B, time T, tokens (time divided further, inside losses), embed D, heads N, kv_heads K, ffn
F, vocab V, expert E.
"""

import contextvars
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from slmjax.parallel.mesh import LOGICAL_DIMS, Dims, current_axis_sizes, mesh_spec, num_devices

# Inside the compiled program --------------------------------------------------------------------------------
_divided_dims: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar(
    "divided_dims", default=frozenset()
)


def constrain(x: Array, dims: Dims) -> Array:
    """`x` with its sharding pinned to these logical dims; the identity without a mesh."""
    sizes = current_axis_sizes()
    if math.prod(sizes.values()) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, mesh_spec(dims, x.shape, sizes))


def split_rows(rows: Array, *, num_parts: int) -> Array:
    """[B, ...] to [A, B/A, ...]: part a takes every A-th row, so that each device's rows stay on it."""
    parts = jnp.swapaxes(rows.reshape(rows.shape[0] // num_parts, num_parts, *rows.shape[1:]), 0, 1)
    return constrain(parts, (None, "batch", "time")[: rows.ndim + 1] + (None,) * (rows.ndim - 2))


def joined_rows(parts: Array) -> Array:
    """The inverse of `split_rows`: [A, B/A, ...] to [B, ...]."""
    rows = jnp.swapaxes(parts, 0, 1).reshape(-1, *parts.shape[2:])
    return constrain(rows, ("batch", "time")[: rows.ndim] + (None,) * (rows.ndim - 2))


def shard_mapped(
    fn: Callable[..., Any], *, in_dims: tuple[Dims, ...], out_dims: Any, checked: bool = True
) -> Callable[..., Any]:
    """`fn` run by every device on its own shard: the one way into `jax.shard_map`.

    A logical dim is divided when it divides evenly in every argument that has it; otherwise all devices see
    it whole, and `sum_over`, `gather` and `scatter_sum` over it do nothing.

    Args:
      fn: takes arrays, one per entry of `in_dims`; an argument may be a pytree whose leaves all have the same
        dims, or these and further ones that are not divided.
      in_dims: logical dims per argument.
      out_dims: logical dims of the result, or a tuple of them for a tuple of results; () for a scalar (a
        pytree of scalars too).
      checked: the tracer proves that what is returned whole is the same on all devices. It cannot look into
        fused kernels: where there are any, False.
    """
    sizes = current_axis_sizes()
    if math.prod(sizes.values()) == 1:
        return fn

    def run(*args: Any) -> Any:
        leaves = [
            (leaf.shape, dims)
            for arg, dims in zip(args, in_dims, strict=True)
            for leaf in jax.tree.leaves(arg)
        ]
        named = [(dim, size) for shape, dims in leaves for dim, size in zip(dims, shape, strict=False) if dim]
        whole = {dim for dim, size in named if size % math.prod(sizes[axis] for axis in LOGICAL_DIMS[dim])}
        divided = frozenset(dim for dim, _ in named) - whole

        def spec(dims: Dims) -> PartitionSpec:
            return PartitionSpec(*(LOGICAL_DIMS[dim] if dim in divided else None for dim in dims))

        def shard_fn(*shards: Any) -> Any:
            token = _divided_dims.set(divided)
            try:
                return fn(*shards)
            finally:
                _divided_dims.reset(token)

        out_specs = jax.tree.map(spec, out_dims, is_leaf=_is_dims)
        in_specs = tuple(spec(dims) for dims in in_dims)
        return jax.shard_map(shard_fn, in_specs=in_specs, out_specs=out_specs, check_vma=checked)(*args)

    return run


def _is_dims(value: Any) -> bool:
    return isinstance(value, tuple) and all(item is None or isinstance(item, str) for item in value)


def _divided_axes(dims: Sequence[str]) -> tuple[str, ...]:
    divided = _divided_dims.get()
    return tuple(axis for dim in dims if dim in divided for axis in LOGICAL_DIMS[dim])


def sum_over(x: Any, *dims: str) -> Any:
    """Inside `shard_mapped`: the sum over the devices that these logical dims are divided over."""
    return jax.lax.psum(x, axes) if (axes := _divided_axes(dims)) else x


def gather(x: Array, dim: str, *, axis: int) -> Array:
    """Inside `shard_mapped`: the shards that the devices of a logical dim hold, joined along an array axis.

    It counts as differing between devices, so that it may not be returned as it is in a dim that is not
    divided.
    """
    return shards_of(dim).gather(x, axis=axis)


def scatter_sum(x: Array, dim: str, *, axis: int) -> Array:
    """Inside `shard_mapped`: the sum over a logical dim's devices, each keeping its part of an array axis."""
    return (
        jax.lax.psum_scatter(x, axes, scatter_dimension=axis, tiled=True)
        if (axes := _divided_axes((dim,)))
        else x
    )


def index_along(dim: str) -> Array | int:
    """Inside `shard_mapped`: which shard of a logical dim this device holds (0 where the dim is whole)."""
    return shards_of(dim).index()


def num_shards(dim: str) -> int:
    """Inside `shard_mapped`: how many shards a logical dim is divided into (1 where it is whole)."""
    return math.prod(current_axis_sizes()[axis] for axis in _divided_axes((dim,)))


def is_sharded(dim: str) -> bool:
    """Inside `shard_mapped`: whether this logical dim really was divided."""
    return dim in _divided_dims.get()


@dataclasses.dataclass(frozen=True)
class Shards:
    """The devices that a logical dim is divided over, for code that is traced later than `shard_mapped` runs:
    rules of custom gradients.
    """

    axes: tuple[str, ...] = ()  # none where the dim is whole
    count: int = 1

    def index(self) -> Array | int:
        """Which shard this device holds."""
        return jax.lax.axis_index(self.axes) if self.axes else 0

    def sum(self, x: Array) -> Array:
        """The sum over the devices."""
        return jax.lax.psum(x, self.axes) if self.axes else x

    def gather(self, x: Array, *, axis: int) -> Array:
        """The shards of all of them, joined along an array axis."""
        return jax.lax.all_gather(x, self.axes, axis=axis, tiled=True) if self.axes else x

    def within(self, dim: str) -> "Shards":
        """The division over those devices alone that another logical dim may be divided over."""
        axes = tuple(axis for axis in self.axes if axis in LOGICAL_DIMS[dim])
        return Shards(axes, math.prod(current_axis_sizes()[axis] for axis in axes))

    def max(self, x: Array) -> Array:
        """The largest on any of the devices; it has no gradient."""
        return jax.lax.pmax(jax.lax.stop_gradient(x), self.axes) if self.axes else jax.lax.stop_gradient(x)


def shards_of(dim: str) -> Shards:
    """Inside `shard_mapped`: the devices that a logical dim is divided over."""
    return Shards(_divided_axes((dim,)), num_shards(dim))


def table_dims(num_rows: int, *, batch_size: int) -> Dims:
    """How a table [V, D] is to enter `shard_mapped`, for `gathered_table`, beside a batch of so many rows.

    By its rows, if they divide: the sum that is the gradient of the gathered table is then scattered by rows,
    which TPUs do piece by piece, while of columns narrower than their lanes they would send all to everyone.
    The rules place a table so too.
    """
    if batch_size % num_devices(
        "batch"
    ):  # all have the same rows of the batch, and what they gather would count as different
        return ("vocab", None)
    return ("vocab_rows", None) if num_rows % num_devices("vocab_rows") == 0 else ("vocab", "embed")


def gathered_table(table: Array, *, whole: bool = False) -> tuple[Array, Shards]:
    """Inside `shard_mapped`: a table with all its columns, and its rows over the vocabulary's devices, or all
    of them if `whole`.
    """
    by_rows = shards_of("vocab_rows")
    vocab = shards_of("vocab")
    table = by_rows.within("embed").gather(shards_of("embed").gather(table, axis=1), axis=0)
    vocab = by_rows.within("vocab") if by_rows.axes else vocab
    return (vocab.gather(table, axis=0), Shards()) if whole else (table, vocab)


def halo(x: Array, dim: str, *, size: int, axis: int) -> Array:
    """Inside `shard_mapped`: `x` with the `size` entries before it along a divided array axis, from the
    devices that hold them.

    The first shards have fewer entries before them, and zeros in their place. Only these entries are sent:
    from the neighbour, and where a shard is shorter than the halo from as many further devices as it takes.
    No more than all other shards hold is added; the identity where the dim is whole.
    """
    axes = _divided_axes((dim,))
    length = x.shape[axis]
    others = num_shards(dim) - 1
    parts = [x]
    for hop in range(1, min(-(-size // length), others) + 1):
        count = min(length, size - (hop - 1) * length)
        tail = jax.lax.slice_in_dim(x, length - count, length, axis=axis)
        parts.insert(
            0, jax.lax.ppermute(tail, axes, [(source, source + hop) for source in range(others + 1 - hop)])
        )
    return jnp.concatenate(parts, axis=axis) if len(parts) > 1 else x


def sum_before(x: Array, dim: str) -> Array:
    """Inside `shard_mapped`: the sum of `x` over the shards of a logical dim that come before this one; zeros
    where the dim is whole.
    """
    if not is_sharded(dim):
        return jnp.zeros_like(x)
    all_shards = gather(x[None], dim, axis=0)
    earlier = jnp.arange(all_shards.shape[0]) < index_along(dim)
    return jnp.sum(jnp.where(earlier.reshape(-1, *(1,) * x.ndim), all_shards, 0), axis=0, dtype=x.dtype)


def match_varying(*arrays: Array) -> tuple[Array, ...]:
    """Inside `shard_mapped`: the arrays, marked as differing between devices wherever one of them does;
    elsewhere the identity.

    Needed where the tracer cannot see it by itself: at the door of a custom gradient, and for the zeros a
    loop starts from. The gradient of what was equal on all devices is then summed over them.
    """
    axes = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    union = frozenset().union(*axes)
    return tuple(
        jax.lax.pcast(x, tuple(sorted(union - own)), to="varying")
        for x, own in zip(arrays, axes, strict=True)
    )
