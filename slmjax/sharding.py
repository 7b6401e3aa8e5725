"""The device mesh, the rules that place parameters on it, and the one `shard_map` entry point.

Modules name logical dims ("batch", "heads", "ffn", ...); only this file knows mesh axes. `make_mesh` builds a mesh
with compiler-managed (Auto) axes and is entered with `jax.set_mesh(mesh)`; inside it `constrain`, `local` and the
collectives work by logical dims, and without a mesh they are the identity, so the same code runs on one device.

Logical dims: batch B, time T, tokens (time divided further, inside losses), embed D, heads N, kv_heads K, ffn F, vocab V,
expert E.
"""

import contextvars
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "expert", "context", "tensor")
LOGICAL_DIMS: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "time": ("context",),
    "tokens": ("context", "tensor"),
    "expert": ("expert",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "ffn": ("tensor",),
    "vocab": ("tensor",),
    "vocab_rows": ("tensor", "fsdp"),
    "head_rows": ("tensor", "fsdp"),
    "ffn_rows": ("tensor", "fsdp"),
    "embed": ("fsdp",),
}
Dims = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1, "the rest of the devices"."""

    data: int = -1  # replicas that each see a part of the batch
    fsdp: int = 1  # the batch too is split over these devices, and so are parameters and optimizer state
    expert: int = 1  # experts of a mixture are divided over these devices
    context: int = 1  # each sequence is divided over these devices
    tensor: int = 1  # heads, feed-forward width and vocabulary are divided over these devices

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        if sum(size == -1 for size in sizes.values()) > 1:
            raise ValueError(f"only one mesh axis may be -1 (the rest of the devices), got {sizes}")
        if bad := {axis: size for axis, size in sizes.items() if size < 1 and size != -1}:
            raise ValueError(f"mesh axes must be at least 1, or -1 for the rest of the devices, got {bad}")

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Axis sizes with -1 resolved. Raises ValueError when the product is not `num_devices`."""
        sizes = {axis: getattr(self, axis) for axis in AXES}
        known = math.prod(size for size in sizes.values() if size != -1)
        if -1 in sizes.values() and num_devices % known == 0:
            sizes = {axis: num_devices // known if size == -1 else size for axis, size in sizes.items()}
        if math.prod(sizes.values()) != num_devices:
            asked = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "of one device"
            raise ValueError(
                f"the mesh {asked} does not fit the {num_devices} device(s) here: set --mesh.* so that the product is {num_devices}"
            )
        return sizes


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over `devices` (all of them by default), for `jax.set_mesh`.

    Raises:
      ValueError: the axis sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = config.sizes(len(devices))
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def named_sharding(dims: Dims, shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Where an array with these logical dims lives; what its axes do not divide is whole everywhere."""
    return NamedSharding(mesh, _spec(dims, shape, dict(mesh.shape)))


def batch_divisor(mesh: Mesh) -> int:
    """How many shards the rows of a batch are cut into: the batch size must be a multiple of it."""
    return math.prod(mesh.shape[axis] for axis in LOGICAL_DIMS["batch"])


# Rules ----------------------------------------------------------------------------------------------------------------
# (pattern of the logical path, logical dims of the unstacked parameter); the first match with dims that divide wins, or the last.
# Rows are preferred to columns for fsdp: a part of them is then long enough for TPUs' lanes however many devices there are.
RULES: tuple[tuple[str, Dims], ...] = (
    (r"embed/table|head/weight|positions/weight", ("vocab_rows", None)),
    (r"embed/table|head/weight|positions/weight", ("vocab", "embed")),
    (r".*/mixer/(query|query_up|latent_up)/weight", ("embed", "heads")),
    (r".*/mixer/(query|latent)_down/weight", ("embed", None)),
    (r".*/mixer/(key|value)/weight", ("embed", "kv_heads")),
    (r".*/mixer/output/weight", ("head_rows", None)),
    (r".*/mixer/output/weight", ("heads", "embed")),
    (r".*/experts/(gate|up)", ("expert", "embed", "ffn")),
    (r".*/experts/down", ("expert", "ffn_rows", None)),
    (r".*/experts/down", ("expert", "ffn", "embed")),
    (r".*/experts/(gate|up)_bias", ("expert", "ffn")),
    (r".*/experts/down_bias", ("expert", None)),
    (r".*/ffn/(shared/)?(gate|up)/weight", ("embed", "ffn")),
    (r".*/ffn/(shared/)?down/weight", ("ffn_rows", None)),
    (r".*/ffn/(shared/)?down/weight", ("ffn", "embed")),
    (r".*/router/weight", ("embed", None)),
)


def partition_spec(path: str, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """Where a parameter lives: its logical path (or stacked path) and shape to a PartitionSpec.

    A parameter under `segments/` carries a leading layer dim, which is never divided. Vectors (norm scales, biases) are
    replicated. A dim that its axes do not divide is replicated as well. A matrix that no rule names is divided over
    fsdp along its largest dim, so that a new mixer is sharded before anyone writes a rule for it.
    """
    stacked = path.startswith("segments/")
    own = tuple(shape[1:] if stacked else shape)
    sizes = dict(mesh.shape)
    rules = [dims for pattern, dims in RULES if re.fullmatch(pattern, path) and len(dims) == len(own)]
    dims = next((dims for dims in rules if _divides(dims, own, sizes)), rules[-1] if rules else None)
    if dims is None:
        largest = int(np.argmax(own)) if len(own) > 1 else -1
        dims = tuple("embed" if index == largest else None for index in range(len(own)))
    spec = _spec(dims, own, sizes)
    return PartitionSpec(None, *spec) if stacked else spec


def input_dim(path: str) -> str | None:
    """The logical name of the last dim of what a weight is multiplied with, by its path, where that may be divided in a computation."""
    dims = next((dims for pattern, dims in RULES if re.fullmatch(pattern, path) and dims[-2] in ("heads", "ffn")), None)
    return None if dims is None else dims[-2]


def _divides(dims: Dims, shape: Sequence[int], sizes: Mapping[str, int]) -> bool:
    return all(size % math.prod(sizes[axis] for axis in LOGICAL_DIMS[dim]) == 0 for dim, size in zip(dims, shape, strict=True) if dim)


def _spec(dims: Dims, shape: Sequence[int], sizes: Mapping[str, int]) -> PartitionSpec:
    """Logical dims to mesh axes, leaving out axes of size 1 and dims that do not divide."""
    entries: list[tuple[str, ...] | str | None] = []
    for dim, size in zip(dims, shape, strict=True):
        axes = tuple(axis for axis in (LOGICAL_DIMS[dim] if dim else ()) if sizes.get(axis, 1) > 1)
        divides = bool(axes) and size % math.prod(sizes[axis] for axis in axes) == 0
        entries.append(None if not divides else axes[0] if len(axes) == 1 else axes)
    return PartitionSpec(*entries)


def parameter_shardings(shapes: Mapping[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """Shardings of a flat dict of parameters (or anything with `.shape`) by the rules."""
    return {path: NamedSharding(mesh, partition_spec(path, leaf.shape, mesh)) for path, leaf in shapes.items()}


def placed_shapes(shapes: Any, places: Any) -> Any:
    """A tree of arrays or shapes as shapes and dtypes with the shardings of a tree like it."""
    return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, places)


def like_parameters(tree: Any, params: Mapping[str, Any], mesh: Mesh) -> Any:
    """Shardings of optimizer state: a leaf that belongs to a parameter and has its shape is placed as it is.

    A leaf belongs to the parameter whose path is one of its tree keys. All else (counters, factored moments) is
    replicated.
    """

    def place(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
        path = parameter_of(keys, params)
        same = path is not None and tuple(leaf.shape) == tuple(params[path].shape)
        return NamedSharding(mesh, partition_spec(path, leaf.shape, mesh) if same and path else PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, tree)


def parameter_of(keys: tuple[Any, ...], params: Mapping[str, Any]) -> str | None:
    """The parameter path among the keys of a tree path, if there is one."""
    return next((str(key.key) for key in keys if isinstance(key, jax.tree_util.DictKey) and key.key in params), None)


# Inside the compiled program ------------------------------------------------------------------------------------------
_divided_dims: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar("divided_dims", default=frozenset())


def _current_sizes() -> dict[str, int]:
    return dict(jax.sharding.get_abstract_mesh().shape)


def platform() -> str:
    """What the program is made for ("cpu", "gpu", "tpu"): the mesh's devices, which need not be here; without a mesh, those that are."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    named = None if device is None else device.platform
    return named or jax.default_backend()


def num_devices(dim: str) -> int:
    """How many of the mesh's devices a logical dim is divided over, where its size allows; 1 without a mesh."""
    return math.prod(_current_sizes().get(axis, 1) for axis in LOGICAL_DIMS[dim])


def constrain(x: Array, dims: Dims) -> Array:
    """`x` with its sharding pinned to these logical dims; the identity without a mesh."""
    sizes = _current_sizes()
    if math.prod(sizes.values()) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, _spec(dims, x.shape, sizes))


def split_rows(rows: Array, *, num_parts: int) -> Array:
    """[B, ...] to [A, B/A, ...]: part a takes every A-th row, so that each device's rows stay on it."""
    parts = jnp.swapaxes(rows.reshape(rows.shape[0] // num_parts, num_parts, *rows.shape[1:]), 0, 1)
    return constrain(parts, (None, "batch", "time")[: rows.ndim + 1] + (None,) * (rows.ndim - 2))


def joined_rows(parts: Array) -> Array:
    """The inverse of `split_rows`: [A, B/A, ...] to [B, ...]."""
    rows = jnp.swapaxes(parts, 0, 1).reshape(-1, *parts.shape[2:])
    return constrain(rows, ("batch", "time")[: rows.ndim] + (None,) * (rows.ndim - 2))


def local(fn: Callable[..., Any], *, in_dims: tuple[Dims, ...], out_dims: Any, checked: bool = True) -> Callable[..., Any]:
    """`fn` run by every device on its own shard: the one way into `jax.shard_map`.

    A logical dim is divided when it divides evenly in every argument that has it; otherwise all devices see it whole, and
    `sum_over`, `gather` and `scatter_sum` over it do nothing.

    Args:
      fn: takes arrays, one per entry of `in_dims`; an argument may be a pytree whose leaves all have the same
        dims, or these and further ones that are not divided.
      in_dims: logical dims per argument.
      out_dims: logical dims of the result, or a tuple of them for a tuple of results; () for a scalar (a pytree of
        scalars too).
      checked: the tracer proves that what is returned whole is the same on all devices. It cannot look into fused kernels: where
        there are any, False.
    """
    sizes = _current_sizes()
    if math.prod(sizes.values()) == 1:
        return fn

    def run(*args: Any) -> Any:
        leaves = [(leaf.shape, dims) for arg, dims in zip(args, in_dims, strict=True) for leaf in jax.tree.leaves(arg)]
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
    """Inside `local`: the sum over the devices that these logical dims are divided over."""
    return jax.lax.psum(x, axes) if (axes := _divided_axes(dims)) else x


def gather(x: Array, dim: str, *, axis: int) -> Array:
    """Inside `local`: the shards that the devices of a logical dim hold, joined along an array axis.

    It counts as differing between devices, so that it may not be returned as it is in a dim that is not divided.
    """
    return shards_of(dim).gather(x, axis=axis)


def scatter_sum(x: Array, dim: str, *, axis: int) -> Array:
    """Inside `local`: the sum over a logical dim's devices, each keeping its part of an array axis."""
    return jax.lax.psum_scatter(x, axes, scatter_dimension=axis, tiled=True) if (axes := _divided_axes((dim,))) else x


def index_along(dim: str) -> Array | int:
    """Inside `local`: which shard of a logical dim this device holds (0 where the dim is whole)."""
    return shards_of(dim).index()


def num_shards(dim: str) -> int:
    """Inside `local`: how many shards a logical dim is divided into (1 where it is whole)."""
    return math.prod(_current_sizes()[axis] for axis in _divided_axes((dim,)))


def is_divided(dim: str) -> bool:
    """Inside `local`: whether this logical dim really was divided."""
    return dim in _divided_dims.get()


@dataclasses.dataclass(frozen=True)
class Shards:
    """The devices that a logical dim is divided over, for code that is traced later than `local` runs: rules of custom gradients."""

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
        return Shards(axes, math.prod(_current_sizes()[axis] for axis in axes))

    def max(self, x: Array) -> Array:
        """The largest on any of the devices; it has no gradient."""
        return jax.lax.pmax(jax.lax.stop_gradient(x), self.axes) if self.axes else jax.lax.stop_gradient(x)


def shards_of(dim: str) -> Shards:
    """Inside `local`: the devices that a logical dim is divided over."""
    return Shards(_divided_axes((dim,)), num_shards(dim))


def table_dims(num_rows: int, *, batch_size: int) -> Dims:
    """How a table [V, D] is to enter `local`, for `gathered_table`, beside a batch of so many rows.

    By its rows, if they divide: the sum that is the gradient of the gathered table is then scattered by rows, which TPUs do piece by
    piece, while of columns narrower than their lanes they would send all to everyone. The rules place a table so too.
    """
    if batch_size % num_devices("batch"):  # all have the same rows of the batch, and what they gather would count as different
        return ("vocab", None)
    return ("vocab_rows", None) if num_rows % num_devices("vocab_rows") == 0 else ("vocab", "embed")


def gathered_table(table: Array, *, whole: bool = False) -> tuple[Array, Shards]:
    """Inside `local`: a table with all its columns, and its rows over the vocabulary's devices, or all of them if `whole`."""
    by_rows, vocab = shards_of("vocab_rows"), shards_of("vocab")
    table = by_rows.within("embed").gather(shards_of("embed").gather(table, axis=1), axis=0)
    vocab = by_rows.within("vocab") if by_rows.axes else vocab
    return (vocab.gather(table, axis=0), Shards()) if whole else (table, vocab)


def halo(x: Array, dim: str, *, size: int, axis: int) -> Array:
    """Inside `local`: `x` with the `size` entries before it along a divided array axis, from the devices that hold them.

    The first shards have fewer entries before them, and zeros in their place. Only these entries are sent: from the neighbour,
    and where a shard is shorter than the halo from as many further devices as it takes. No more than all other shards hold is
    added; the identity where the dim is whole.
    """
    axes, length, others = _divided_axes((dim,)), x.shape[axis], num_shards(dim) - 1
    parts = [x]
    for hop in range(1, min(-(-size // length), others) + 1):
        count = min(length, size - (hop - 1) * length)
        tail = jax.lax.slice_in_dim(x, length - count, length, axis=axis)
        parts.insert(0, jax.lax.ppermute(tail, axes, [(source, source + hop) for source in range(others + 1 - hop)]))
    return jnp.concatenate(parts, axis=axis) if len(parts) > 1 else x


def sum_before(x: Array, dim: str) -> Array:
    """Inside `local`: the sum of `x` over the shards of a logical dim that come before this one; zeros where the dim is whole."""
    if not is_divided(dim):
        return jnp.zeros_like(x)
    all_shards = gather(x[None], dim, axis=0)
    earlier = jnp.arange(all_shards.shape[0]) < index_along(dim)
    return jnp.sum(jnp.where(earlier.reshape(-1, *(1,) * x.ndim), all_shards, 0), axis=0, dtype=x.dtype)


def alike(*arrays: Array) -> tuple[Array, ...]:
    """Inside `local`: the arrays, marked as differing between devices wherever one of them does; elsewhere the identity.

    Needed where the tracer cannot see it by itself: at the door of a custom gradient, and for the zeros a loop starts from.
    The gradient of what was equal on all devices is then summed over them.
    """
    axes = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    union = frozenset().union(*axes)
    return tuple(jax.lax.pcast(x, tuple(sorted(union - own)), to="varying") for x, own in zip(arrays, axes, strict=True))
