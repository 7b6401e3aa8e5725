"""Rows of a batch: which of them this process reads, and how they become arrays that are divided over the
mesh.

Dims: B rows of the global batch, T time.
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


@functools.lru_cache(maxsize=16)  # asked at every step
def rows_here(mesh: Mesh, num_rows: int) -> np.ndarray:
    """Numbers of the rows of a global batch that this process's devices hold, in ascending order: those that
    it has to read.

    Where the axes of the batch do not divide the rows, and where others (context, tensor) span processes,
    several hold a row.
    """
    owners = np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)
    rows = _rows_of(jax.process_index(), owners, mesh.axis_names, num_rows)
    rows.flags.writeable = False
    return rows


def _rows_of(process: int, owners: np.ndarray, axis_names: Sequence[str], num_rows: int) -> np.ndarray:
    """The rows of one process, given each device's process, an array over the mesh."""
    axes = [axis_names.index(axis) for axis in LOGICAL_DIMS["batch"]]
    by_shard = np.moveaxis(owners, axes, range(len(axes)))
    by_shard = by_shard.reshape(math.prod(by_shard.shape[: len(axes)]), -1)
    rows = np.arange(num_rows)
    if num_rows % len(by_shard):
        return rows
    return rows.reshape(len(by_shard), -1)[(by_shard == process).any(axis=1)].reshape(-1)


def place_batch(batch: Any, mesh: Mesh, *, num_rows: int | None = None) -> Any:
    """Host arrays [B ...] or [B T ...] to global arrays divided over rows and time.

    Args:
      batch: a tree of arrays, whose rows are `rows_here` of the global batch.
      mesh: where they go.
      num_rows: of the global batch; None: the arrays hold all of them.
    """

    def place(local: np.ndarray) -> Array:
        count = local.shape[0] if num_rows is None else num_rows
        here = np.arange(count) if num_rows is None else rows_here(mesh, count)
        assert len(here) == local.shape[0], (
            f"{local.shape[0]} rows were made, and this process holds {len(here)} of {count}"
        )
        global_shape = (count, *local.shape[1:])

        def shard(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(count)
            # a shard's rows follow each other here as they do in the whole
            first = int(np.searchsorted(here, start))
            return local[first : first + stop - start, *index[1:]]

        return jax.make_array_from_callback(global_shape, _batch_sharding(global_shape, mesh), shard)

    return jax.tree.map(place, batch)


def batch_shapes(batch: Any, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of a global batch, given as host arrays [B ...] or [B T ...], once it is
    placed.
    """
    return jax.tree.map(
        lambda rows: jax.ShapeDtypeStruct(rows.shape, rows.dtype, sharding=_batch_sharding(rows.shape, mesh)),
        batch,
    )


def _batch_sharding(shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    return named_sharding(("batch", "time")[: len(shape)] + (None,) * (len(shape) - 2), shape, mesh)
