"""Rules that map a parameter's path and shape to a PartitionSpec.

Sharding is decided here, by name, and not in the modules: a mixer whose linear maps have the names below, at
any depth, is sharded without a rule of its own.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slmjax.parallel.mesh import Dims, divides, mesh_spec

# (pattern of the logical path, logical dims of the unstacked parameter). The first match whose dims all
# divide is taken, otherwise the last match. fsdp shards rows rather than columns where it can: a shard then
# keeps the full last dim, which fills the 128 lanes of a TPU however many devices there are.
RULES: tuple[tuple[str, Dims], ...] = (
    (r"embed/(table|per_layer)|head/weight|positions/weight", ("vocab_rows", None)),
    (r"embed/(table|per_layer)|head/weight|positions/weight", ("vocab", "embed")),
    # Columns are heads, or channels that belong to heads: `inner` is what a recurrence reads, `gate` what
    # multiplies its result, `decay`, `rate`, `step` and `strength` are for each head or channel.
    (
        r".*/mixer/(.*/)?(query|inner|receptance|decay|rate|step|strength|(\w+_)?gate|\w+_up)/weight",
        ("embed", "heads"),
    ),
    (r".*/mixer/(.*/)?\w+_down/weight", ("embed", None)),
    (r".*/mixer/(.*/)?(key|value)/weight", ("embed", "kv_heads")),
    (r".*/mixer/(.*/)?output/weight", ("head_rows", None)),
    (r".*/mixer/(.*/)?output/weight", ("heads", "embed")),
    (r".*/mixer/(.*/)?(\w+_)?taps", (None, "heads")),
    (r".*/experts/(gate|up)", ("expert", "embed", "ffn")),
    (r".*/experts/down", ("expert", "ffn_rows", None)),
    (r".*/experts/down", ("expert", "ffn", "embed")),
    (r".*/experts/(gate|up)_bias", ("expert", "ffn")),
    (r".*/experts/down_bias", ("expert", None)),
    (r".*/ffn/(shared/)?(gate|up)/weight", ("embed", "ffn")),
    (r".*/ffn/(shared/)?down/weight", ("ffn_rows", None)),
    (r".*/ffn/(shared/)?down/weight", ("ffn", "embed")),
    (r".*/(router|shared_gate)/weight", ("embed", None)),
)


def partition_spec(path: str, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """Return the PartitionSpec of a parameter, given its logical path (or stacked path) and shape.

    A parameter under `segments/` carries a leading layer dim, which is never sharded. Vectors (norm scales,
    biases) are replicated. A dim that its axes do not divide is replicated as well. A matrix that no rule
    names is sharded over fsdp along its largest dim.
    """
    stacked = path.startswith("segments/")
    layer_dims = tuple(shape[1:] if stacked else shape)
    sizes = dict(mesh.shape)
    matches = [
        dims for pattern, dims in RULES if re.fullmatch(pattern, path) and len(dims) == len(layer_dims)
    ]
    dims = next(
        (dims for dims in matches if divides(dims, layer_dims, sizes)), matches[-1] if matches else None
    )
    if dims is None:
        largest = int(np.argmax(layer_dims)) if len(layer_dims) > 1 else -1
        dims = tuple("embed" if index == largest else None for index in range(len(layer_dims)))
    spec = mesh_spec(dims, layer_dims, sizes)
    return PartitionSpec(None, *spec) if stacked else spec


def input_dim(path: str) -> str | None:
    """Logical name of the last dim of a weight's input, if that dim may be sharded; else None."""
    # The second-last dim of a weight is its input. Only "heads" and "ffn" are sharded in activations too;
    # "embed" is sharded for storage, and gathered before the product.
    dims = next(
        (dims for pattern, dims in RULES if re.fullmatch(pattern, path) and dims[-2] in ("heads", "ffn")),
        None,
    )
    return None if dims is None else dims[-2]


def parameter_shardings(shapes: Mapping[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """Return the shardings of a flat dict of parameters (or anything with `.shape`) by the rules."""
    return {
        path: NamedSharding(mesh, partition_spec(path, leaf.shape, mesh)) for path, leaf in shapes.items()
    }


def shapes_with_shardings(shapes: Any, shardings: Any) -> Any:
    """Turn a tree of arrays or shapes, and a tree of shardings like it, into shapes that carry shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def like_parameters(tree: Any, params: Mapping[str, Any], mesh: Mesh) -> Any:
    """Return the shardings of optimizer state: a leaf with the shape of its parameter is sharded like it.

    A leaf belongs to the parameter whose path is one of its tree keys. All else (counters, factored moments)
    is replicated.
    """

    def sharding(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
        path = parameter_of(keys, params)
        if path is None or tuple(leaf.shape) != tuple(params[path].shape):
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, partition_spec(path, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def parameter_of(keys: tuple[Any, ...], params: Mapping[str, Any]) -> str | None:
    """Return the parameter path among the keys of a tree path, if there is one."""
    return next(
        (str(key.key) for key in keys if isinstance(key, jax.tree_util.DictKey) and key.key in params), None
    )
