"""Sharding constraints, the one entry point to `jax.shard_map`, and the collectives used inside it.

All of them take logical dims (see mesh.py). Without a mesh, or on one of a single device, they are the
identity, so that the same code runs on one device.
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

from slmjax.parallel.mesh import (
    LOGICAL_DIMS,
    Dims,
    current_axis_sizes,
    is_single_device,
    mesh_spec,
    num_devices,
)

# Logical dims that the enclosing `shard_mapped` really sharded. Set while the function is traced, so that the
# collectives below need no argument for it; a ContextVar because programs are traced in several threads.
_sharded_dims: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar(
    "sharded_dims", default=frozenset()
)


# In the program that the compiler partitions ----------------------------------------------------------------


def constrain(x: Array, dims: Dims) -> Array:
    """Pin the sharding of `x` to these logical dims; the identity without a mesh."""
    if is_single_device():
        return x
    return jax.lax.with_sharding_constraint(x, mesh_spec(dims, x.shape, current_axis_sizes()))


def split_microbatches(batch: Array, *, num_microbatches: int) -> Array:
    """Split [B, ...] into [A, B/A, ...], A microbatches.

    Microbatch a takes every A-th sequence: each device then keeps its sequences, where contiguous slices
    would have to be sent between devices.
    """
    size = batch.shape[0] // num_microbatches
    parts = jnp.swapaxes(batch.reshape(size, num_microbatches, *batch.shape[1:]), 0, 1)
    return constrain(parts, (None, "batch", "time")[: batch.ndim + 1] + (None,) * (batch.ndim - 2))


def join_microbatches(parts: Array) -> Array:
    """Join [A, B/A, ...] into [B, ...]: the inverse of `split_microbatches`."""
    batch = jnp.swapaxes(parts, 0, 1).reshape(-1, *parts.shape[2:])
    return constrain(batch, ("batch", "time")[: batch.ndim] + (None,) * (batch.ndim - 2))


# Inside shard_map -------------------------------------------------------------------------------------------


def shard_mapped(
    fn: Callable[..., Any], *, in_dims: tuple[Dims, ...], out_dims: Any, checked: bool = True
) -> Callable[..., Any]:
    """Return `fn` run by every device on its own shard: the package's only call of `jax.shard_map`.

    A logical dim is sharded if its size divides evenly in every argument that has it. Otherwise it is
    replicated, and `sum_over`, `gather` and `scatter_sum` over it are the identity.

    Args:
      fn: takes arrays, one per entry of `in_dims`; an argument may be a pytree whose leaves all have the same
        dims, or these and further ones that are replicated.
      in_dims: logical dims per argument.
      out_dims: logical dims of the result, or a tuple of them for a tuple of results; () for a scalar (a
        pytree of scalars too).
      checked: have the tracer prove that results declared as replicated are the same on all devices. It
        cannot look into fused kernels: pass False where there are any.
    """
    if is_single_device():
        return fn
    sizes = current_axis_sizes()

    def run(*args: Any) -> Any:
        leaves = [
            (leaf.shape, dims)
            for arg, dims in zip(args, in_dims, strict=True)
            for leaf in jax.tree.leaves(arg)
        ]
        named = [(dim, size) for shape, dims in leaves for dim, size in zip(dims, shape, strict=False) if dim]
        # An argument whose size does not divide makes the dim replicated in all: their shards must match.
        replicated = {
            dim for dim, size in named if size % math.prod(sizes[axis] for axis in LOGICAL_DIMS[dim])
        }
        sharded = frozenset(dim for dim, _ in named) - replicated

        def spec(dims: Dims) -> PartitionSpec:
            return PartitionSpec(*(LOGICAL_DIMS[dim] if dim in sharded else None for dim in dims))

        def shard_fn(*shards: Any) -> Any:
            token = _sharded_dims.set(sharded)
            try:
                return fn(*shards)
            finally:
                _sharded_dims.reset(token)

        out_specs = jax.tree.map(spec, out_dims, is_leaf=_is_dims)
        in_specs = tuple(spec(dims) for dims in in_dims)
        return jax.shard_map(shard_fn, in_specs=in_specs, out_specs=out_specs, check_vma=checked)(*args)

    return run


def _is_dims(value: Any) -> bool:
    return isinstance(value, tuple) and all(item is None or isinstance(item, str) for item in value)


def _sharded_axes(dims: Sequence[str]) -> tuple[str, ...]:
    sharded = _sharded_dims.get()
    return tuple(axis for dim in dims if dim in sharded for axis in LOGICAL_DIMS[dim])


def sum_over(x: Any, *dims: str) -> Any:
    """Inside `shard_mapped`: return the sum over the devices that these logical dims are sharded over."""
    return jax.lax.psum(x, axes) if (axes := _sharded_axes(dims)) else x


def gather(x: Array, dim: str, *, axis: int) -> Array:
    """Inside `shard_mapped`: return all shards of a logical dim, joined along an array axis.

    JAX tracks the result as varying between devices, so it cannot be returned in a dim declared replicated.
    """
    return shards_of(dim).gather(x, axis=axis)


def scatter_sum(x: Array, dim: str, *, axis: int) -> Array:
    """Inside `shard_mapped`: sum over a logical dim's devices; each keeps its shard of an array axis."""
    return (
        jax.lax.psum_scatter(x, axes, scatter_dimension=axis, tiled=True)
        if (axes := _sharded_axes((dim,)))
        else x
    )


def index_along(dim: str) -> Array | int:
    """Inside `shard_mapped`: return the index of this device's shard of a logical dim; 0 if replicated."""
    return shards_of(dim).index()


def num_shards(dim: str) -> int:
    """Inside `shard_mapped`: return the number of shards of a logical dim; 1 if it is replicated."""
    return math.prod(current_axis_sizes()[axis] for axis in _sharded_axes((dim,)))


def is_sharded(dim: str) -> bool:
    """Inside `shard_mapped`: return whether this logical dim is sharded here; its size may not divide."""
    return dim in _sharded_dims.get()


@dataclasses.dataclass(frozen=True)
class Shards:
    """Devices that a logical dim is sharded over.

    The functions above ask the enclosing `shard_mapped`. This is for code traced after that has returned,
    such as the backward rules of custom gradients.
    """

    axes: tuple[str, ...] = ()  # none if the dim is replicated
    count: int = 1

    def index(self) -> Array | int:
        """Return the index of this device's shard."""
        return jax.lax.axis_index(self.axes) if self.axes else 0

    def sum(self, x: Array) -> Array:
        """Return the sum over the devices."""
        return jax.lax.psum(x, self.axes) if self.axes else x

    def gather(self, x: Array, *, axis: int) -> Array:
        """Return the shards of all the devices, joined along an array axis."""
        return jax.lax.all_gather(x, self.axes, axis=axis, tiled=True) if self.axes else x

    def within(self, dim: str) -> "Shards":
        """Return the shards over only those mesh axes that another logical dim may be sharded over."""
        axes = tuple(axis for axis in self.axes if axis in LOGICAL_DIMS[dim])
        return Shards(axes, math.prod(current_axis_sizes()[axis] for axis in axes))

    def max(self, x: Array) -> Array:
        """Return the maximum over the devices, without a gradient (`pmax` has none)."""
        return jax.lax.pmax(jax.lax.stop_gradient(x), self.axes) if self.axes else jax.lax.stop_gradient(x)


def shards_of(dim: str) -> Shards:
    """Inside `shard_mapped`: return the devices that a logical dim is sharded over."""
    return Shards(_sharded_axes((dim,)), num_shards(dim))


def table_dims(num_rows: int, *, batch_size: int) -> Dims:
    """Return the logical dims with which a table [V, D] enters `shard_mapped`, for `gathered_table`.

    The table is sharded by rows if they divide, as the parameter rules do. The gradient of the gathered table
    is then a sum scattered by rows, which TPUs reduce piece by piece; scattered by columns narrower than
    their lanes, all of it would be sent to every device.

    Args:
      num_rows: V.
      batch_size: sequences of the batch that enters with the table.
    """
    # A batch that does not divide is the same on all devices, but a table gathered over them would be tracked
    # as varying, and so would the result.
    if batch_size % num_devices("batch"):
        return ("vocab", None)
    return ("vocab_rows", None) if num_rows % num_devices("vocab_rows") == 0 else ("vocab", "embed")


def gathered_table(table: Array, *, replicated: bool = False) -> tuple[Array, Shards]:
    """Inside `shard_mapped`: return a table with all its columns, and the devices that shard its rows.

    Its rows stay sharded over the vocabulary's devices, or are gathered too if `replicated`.
    """
    # `table_dims` chose one of two: rows over both axes, or rows over tensor and columns over fsdp. The other
    # gather is then the identity.
    by_rows = shards_of("vocab_rows")
    vocab = shards_of("vocab")
    table = by_rows.within("embed").gather(shards_of("embed").gather(table, axis=1), axis=0)
    vocab = by_rows.within("vocab") if by_rows.axes else vocab
    return (vocab.gather(table, axis=0), Shards()) if replicated else (table, vocab)


def halo(x: Array, dim: str, *, size: int, axis: int) -> Array:
    """Inside `shard_mapped`: extend `x` by the `size` entries before it along a sharded array axis.

    Only these entries are sent: by the neighbour and, where the halo is longer than a shard, by as many
    further devices as it takes. The first shards have fewer entries before them, and zeros in their place. At
    most the entries of all other shards are added. The identity if the dim is replicated.
    """
    axes = _sharded_axes((dim,))
    length = x.shape[axis]
    others = num_shards(dim) - 1
    parts = [x]
    for hop in range(1, min(-(-size // length), others) + 1):
        count = min(length, size - (hop - 1) * length)
        tail = jax.lax.slice_in_dim(x, length - count, length, axis=axis)
        # A device that no pair names as a target receives zeros: segment 0, which attention masks.
        pairs = [(source, source + hop) for source in range(others + 1 - hop)]
        parts.insert(0, jax.lax.ppermute(tail, axes, pairs))
    return jnp.concatenate(parts, axis=axis) if len(parts) > 1 else x


def sum_before(x: Array, dim: str) -> Array:
    """Inside `shard_mapped`: sum `x` over the shards before this one; zeros if the dim is replicated."""
    if not is_sharded(dim):
        return jnp.zeros_like(x)
    # A gather and a masked sum: there is no collective for prefix sums, and `x` is small (counts).
    all_shards = gather(x[None], dim, axis=0)
    earlier = jnp.arange(all_shards.shape[0]) < index_along(dim)
    return jnp.sum(jnp.where(earlier.reshape(-1, *(1,) * x.ndim), all_shards, 0), axis=0, dtype=x.dtype)


def match_varying(*arrays: Array) -> tuple[Array, ...]:
    """Inside `shard_mapped`: mark all arrays as varying over each mesh axis that one of them varies over.

    Needed where the tracer cannot infer it: at the entry of a custom gradient, and for the zeros that a loop
    starts from. The gradient of an array that was equal on all devices is then summed over them. Outside
    `shard_mapped` this is the identity.
    """
    varying = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    union = frozenset().union(*varying)
    return tuple(
        jax.lax.pcast(x, tuple(sorted(union - axes)), to="varying")
        for x, axes in zip(arrays, varying, strict=True)
    )
