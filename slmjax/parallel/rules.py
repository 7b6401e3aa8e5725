"""Rules that map a parameter's path and shape to a PartitionSpec."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slmjax.parallel.mesh import Dims, divides, mesh_spec

# Rules ------------------------------------------------------------------------------------------------------
# (pattern of the logical path, logical dims of the unstacked parameter); the first match with dims that
# divide wins, or the last. Rows are preferred to columns for fsdp: a part of them is then long enough for
# TPUs' lanes however many devices there are.
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

    A parameter under `segments/` carries a leading layer dim, which is never divided. Vectors (norm scales,
    biases) are replicated. A dim that its axes do not divide is replicated as well. A matrix that no rule
    names is divided over fsdp along its largest dim, so that a new mixer is sharded before anyone writes a
    rule for it.
    """
    stacked = path.startswith("segments/")
    own = tuple(shape[1:] if stacked else shape)
    sizes = dict(mesh.shape)
    rules = [dims for pattern, dims in RULES if re.fullmatch(pattern, path) and len(dims) == len(own)]
    dims = next((dims for dims in rules if divides(dims, own, sizes)), rules[-1] if rules else None)
    if dims is None:
        largest = int(np.argmax(own)) if len(own) > 1 else -1
        dims = tuple("embed" if index == largest else None for index in range(len(own)))
    spec = mesh_spec(dims, own, sizes)
    return PartitionSpec(None, *spec) if stacked else spec


def input_dim(path: str) -> str | None:
    """The logical name of the last dim of what a weight is multiplied with, by its path, where that may be
    divided in a computation.
    """
    dims = next(
        (dims for pattern, dims in RULES if re.fullmatch(pattern, path) and dims[-2] in ("heads", "ffn")),
        None,
    )
    return None if dims is None else dims[-2]


def parameter_shardings(shapes: Mapping[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """Shardings of a flat dict of parameters (or anything with `.shape`) by the rules."""
    return {
        path: NamedSharding(mesh, partition_spec(path, leaf.shape, mesh)) for path, leaf in shapes.items()
    }


def placed_shapes(shapes: Any, places: Any) -> Any:
    """A tree of arrays or shapes as shapes and dtypes with the shardings of a tree like it."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, places
    )


def like_parameters(tree: Any, params: Mapping[str, Any], mesh: Mesh) -> Any:
    """Shardings of optimizer state: a leaf that belongs to a parameter and has its shape is placed as it is.

    A leaf belongs to the parameter whose path is one of its tree keys. All else (counters, factored moments)
    is replicated.
    """

    def place(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
        path = parameter_of(keys, params)
        same = path is not None and tuple(leaf.shape) == tuple(params[path].shape)
        return NamedSharding(
            mesh, partition_spec(path, leaf.shape, mesh) if same and path else PartitionSpec()
        )

    return jax.tree_util.tree_map_with_path(place, tree)


def parameter_of(keys: tuple[Any, ...], params: Mapping[str, Any]) -> str | None:
    """The parameter path among the keys of a tree path, if there is one."""
    return next(
        (str(key.key) for key in keys if isinstance(key, jax.tree_util.DictKey) and key.key in params), None
    )
