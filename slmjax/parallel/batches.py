"""Global batches: which sequences this process reads, and how they become arrays sharded over the mesh.

Dims: B sequences of the global batch, T time.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding

from slmjax.parallel.mesh import LOGICAL_DIMS, named_sharding


# Cached because every step asks for the same mesh and batch size.
@functools.lru_cache(maxsize=16)
def local_sequences(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Indices into the global batch of the sequences that this process has to read, ascending.

    These are the sequences whose shards its devices hold. Several processes read the same sequence where the
    batch axes do not divide the batch size, and where other axes (context, tensor) span processes.
    """
    owners = np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)
    indices = _sequences_of(jax.process_index(), owners, mesh.axis_names, batch_size)
    # The cached array is shared by all callers.
    indices.flags.writeable = False
    return indices


def _sequences_of(process: int, owners: np.ndarray, axis_names: Sequence[str], batch_size: int) -> np.ndarray:
    """Return the sequences of one process; `owners` holds the process index of each device of the mesh."""
    # [batch shards, devices of each]: devices along other axes (context, tensor) hold the same sequences.
    axes = [axis_names.index(axis) for axis in LOGICAL_DIMS["batch"]]
    by_shard = np.moveaxis(owners, axes, range(len(axes)))
    by_shard = by_shard.reshape(math.prod(by_shard.shape[: len(axes)]), -1)
    indices = np.arange(batch_size)
    # A batch that does not divide is replicated, so that every process reads all of it.
    if batch_size % len(by_shard):
        return indices
    return indices.reshape(len(by_shard), -1)[(by_shard == process).any(axis=1)].reshape(-1)


def place_batch(batch: Any, mesh: Mesh, *, batch_size: int | None = None) -> Any:
    """Turn host arrays [B ...] or [B T ...] into global arrays sharded over sequences and time.

    Args:
      batch: a tree of arrays that hold the `local_sequences` of the global batch.
      mesh: the devices to place them on.
      batch_size: sequences of the global batch; None if the arrays hold all of them.
    """

    def place(local: np.ndarray) -> Array:
        count = local.shape[0] if batch_size is None else batch_size
        indices = np.arange(count) if batch_size is None else local_sequences(mesh, count)
        assert len(indices) == local.shape[0], (
            f"got {local.shape[0]} sequences, but this process holds {len(indices)} of {count}"
        )
        global_shape = (count, *local.shape[1:])

        def shard(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(count)
            # A shard's sequences are contiguous in the local array, as they are in the global batch.
            first = int(np.searchsorted(indices, start))
            return local[first : first + stop - start, *index[1:]]

        return jax.make_array_from_callback(global_shape, _batch_sharding(global_shape, mesh), shard)

    return jax.tree.map(place, batch)


def place_batches(batches: Sequence[Any], mesh: Mesh) -> Any:
    """Turn a batch of host arrays [B ...] of each member of a population into global arrays [N, B ...].

    Args:
      batches: trees of arrays that hold all sequences: a population is trained by one process.
      mesh: that of the population.
    """
    stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *batches)
    shardings = jax.tree.map(
        lambda x: named_sharding(("arm", "batch", "time")[: x.ndim] + (None,) * (x.ndim - 3), x.shape, mesh),
        stacked,
    )
    return jax.device_put(stacked, shardings)


def batch_shapes(batch: Any, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings that `place_batch` would give to host arrays [B ...] or [B T ...]."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_batch_sharding(x.shape, mesh)), batch
    )


def _batch_sharding(shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    return named_sharding(("batch", "time")[: len(shape)] + (None,) * (len(shape) - 2), shape, mesh)
