"""The device mesh, its axes, and the logical dims that are sharded over them.

Modules name logical dims ("batch", "heads", "ffn", ...); only this folder knows mesh axes. `make_mesh` builds
a mesh with compiler-managed (Auto) axes, which is entered with `jax.set_mesh(mesh)`.

Logical dims: arm (members of a population), batch B, time T, embed D, heads N, kv_heads K, ffn F, vocab V,
expert E; tokens is time sharded further, inside losses.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "expert", "context", "tensor")
# Members of a population; an axis of `population_mesh` alone.
ARM = "arm"

# The `*_rows` dims shard the first dim of a matrix over fsdp too, where "vocab", "heads" and "ffn" leave fsdp
# to the second dim, "embed".
LOGICAL_DIMS: Mapping[str, tuple[str, ...]] = {
    "arm": (ARM,),
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

# Logical names of an array's dims; None for a dim that is replicated.
Dims = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1, for the remaining devices."""

    data: int = -1  # replicas that each see a part of the batch
    fsdp: int = 1  # the batch, parameters and optimizer state are sharded over these devices
    expert: int = 1  # experts of a mixture are sharded over these devices
    context: int = 1  # each sequence is sharded over these devices
    tensor: int = 1  # heads, feed-forward width and vocabulary are sharded over these devices

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        if sum(size == -1 for size in sizes.values()) > 1:
            raise ValueError(f"only one mesh axis may be -1 (the remaining devices), got {sizes}")
        if bad := {axis: size for axis, size in sizes.items() if size < 1 and size != -1}:
            raise ValueError(f"mesh axes must be at least 1, or -1 for the remaining devices, got {bad}")

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Return the sizes with -1 resolved. Raises ValueError if their product is not `num_devices`."""
        sizes = {axis: getattr(self, axis) for axis in AXES}
        known = math.prod(size for size in sizes.values() if size != -1)
        if -1 in sizes.values() and num_devices % known == 0:
            sizes = {axis: num_devices // known if size == -1 else size for axis, size in sizes.items()}
        if math.prod(sizes.values()) != num_devices:
            named_sizes = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1)
            raise ValueError(
                f"the mesh {named_sizes or 'of one device'} does not fit the {num_devices} device(s) here: "
                f"set --mesh.* so that the product is {num_devices}"
            )
        return sizes


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Build the mesh over `devices` (all of them by default), for `jax.set_mesh`.

    Raises:
      ValueError: the axis sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = config.sizes(len(devices))
    # Auto leaves the partitioning to the compiler; the default of `jax.make_mesh` is Explicit.
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices
    )


def population_mesh(mesh: Mesh, *, num_members: int) -> Mesh:
    """Return the mesh of a population whose members have this mesh each: a part of the axis data is `arm`.

    The axis `arm` gets as many devices as divide both the number of members and the axis data, so that no
    device is idle. The order of the devices stays.
    """
    num_arms = math.gcd(num_members, mesh.shape["data"])
    sizes = {ARM: num_arms, **mesh.shape}
    sizes["data"] //= num_arms
    devices = mesh.devices.reshape(tuple(sizes.values()))
    return Mesh(devices, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def named_sharding(dims: Dims, shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Sharding of an array with these logical dims; a dim that its axes do not divide is replicated."""
    return NamedSharding(mesh, mesh_spec(dims, shape, dict(mesh.shape)))


def batch_divisor(mesh: Mesh) -> int:
    """Number of shards of the batch dim; the batch size must be a multiple of it."""
    return math.prod(mesh.shape[axis] for axis in LOGICAL_DIMS["batch"])


def divides(dims: Dims, shape: Sequence[int], sizes: Mapping[str, int]) -> bool:
    """Return whether every sharded dim of a shape is a multiple of the devices that it is sharded over."""
    return all(
        size % math.prod(sizes[axis] for axis in LOGICAL_DIMS[dim]) == 0
        for dim, size in zip(dims, shape, strict=True)
        if dim
    )


def mesh_spec(dims: Dims, shape: Sequence[int], sizes: Mapping[str, int]) -> PartitionSpec:
    """Map logical dims to mesh axes, leaving out axes of size 1 and dims that do not divide."""
    entries: list[tuple[str, ...] | str | None] = []
    for dim, size in zip(dims, shape, strict=True):
        # Axes of size 1 are left out so that equal shardings compare equal.
        axes = tuple(axis for axis in (LOGICAL_DIMS[dim] if dim else ()) if sizes.get(axis, 1) > 1)
        divides = bool(axes) and size % math.prod(sizes[axis] for axis in axes) == 0
        entries.append(None if not divides else axes[0] if len(axes) == 1 else axes)
    return PartitionSpec(*entries)


def current_axis_sizes() -> dict[str, int]:
    """Return the sizes of the axes of the mesh that is set; empty without one."""
    return dict(jax.sharding.get_abstract_mesh().shape)


def is_single_device() -> bool:
    """Return whether there is no mesh, or one of a single device."""
    return math.prod(current_axis_sizes().values()) == 1


def platform() -> str:
    """Platform that the program is compiled for: "cpu", "gpu" or "tpu".

    With a mesh this is the platform of its devices, which need not be attached (a plan compiles for a named
    topology); without one, the default backend.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    mesh_platform = None if device is None else device.platform
    return mesh_platform or jax.default_backend()


def num_devices(dim: str) -> int:
    """Number of devices that a logical dim is sharded over if they divide its size; 1 without a mesh."""
    return math.prod(current_axis_sizes().get(axis, 1) for axis in LOGICAL_DIMS[dim])
