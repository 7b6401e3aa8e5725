"""A model's parameters from outside: flat dicts by path, and the layers behind the stacks.

Outside the modules all parameters are one flat dict keyed by stack path (`segments/0/blocks/1/mixer/query/weight`, layer
dim first). Checkpoints, rules and golden lists speak of logical paths (`layers/3/mixer/query/weight`), so that nothing
that is stored depends on how layers are grouped for the scan: `unstack` and `restack` go between the two.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from slmjax.architecture import BlockConfig, ModelConfig
from slmjax.model import Decoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Definition:
    """The model without its arrays: what turns flat dicts of parameters back into a `Decoder`."""

    config: ModelConfig
    graphdef: Any
    params: dict[str, jax.ShapeDtypeStruct]  # trained by the optimizer
    buffers: dict[str, jax.ShapeDtypeStruct]  # state that the optimizer does not touch (router biases)

    def merge(self, params: Mapping[str, Array], buffers: Mapping[str, Array]) -> Decoder:
        """The module that computes with these arrays."""
        flat: dict[Any, Array] = {_keys(path): value for path, value in {**params, **buffers}.items()}
        return nnx.merge(self.graphdef, nnx.from_flat_state(flat))

    def init(self, key: Array) -> tuple[dict[str, Array], dict[str, Array]]:
        """Freshly initialised parameters and buffers; jit it to have them sharded."""
        return flat_params(Decoder(self.config, rngs=nnx.Rngs(params=key)))


def define(config: ModelConfig) -> Definition:
    """The definition of a model, from shapes alone: nothing is computed."""
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(params=jax.random.key(0))))
    params, buffers = flat_params(model)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (params, buffers))
    return Definition(config=config, graphdef=nnx.graphdef(model), params=shapes[0], buffers=shapes[1])


def define_for_inference(config: ModelConfig) -> Definition:
    """The definition with the same parameters that evaluation and sampling use: see `FfnConfig.for_inference`."""

    def block(one: BlockConfig) -> BlockConfig:
        return one if one.ffn is None else dataclasses.replace(one, ffn=one.ffn.for_inference())

    stack = tuple(dataclasses.replace(segment, pattern=tuple(map(block, segment.pattern))) for segment in config.stack)
    return define(dataclasses.replace(config, stack=stack))


def flat_params(model: Decoder) -> tuple[dict[str, Any], dict[str, Any]]:
    """A model's parameters and its buffers, as flat dicts by stack path."""
    _, params, buffers = nnx.split(model, nnx.Param, ...)
    return _flat(params), _flat(buffers)


def _flat(state: Any) -> dict[str, Any]:
    return {"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def _keys(path: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in path.split("/"))


def block_at(config: ModelConfig, path: str) -> BlockConfig:
    """The configuration of the block that a stacked parameter belongs to."""
    parts = path.split("/")
    return config.stack[int(parts[1])].pattern[int(parts[3])]


def layer_indices(config: ModelConfig, path: str) -> list[int] | None:
    """The layers whose slices a stacked parameter holds, in order; None for a parameter outside the layers."""
    parts = path.split("/")
    if parts[0] != "segments":
        return None
    index, offset = int(parts[1]), int(parts[3])
    first = sum(len(segment.pattern) * segment.repeats for segment in config.stack[:index])
    segment = config.stack[index]
    return [first + offset + len(segment.pattern) * repeat for repeat in range(segment.repeats)]


def logical_paths(config: ModelConfig, path: str) -> list[str]:
    """Logical paths of a parameter: `layers/{i}/...` for each slice of a stacked one, the path itself for any other."""
    layers = layer_indices(config, path)
    return [path] if layers is None else [f"layers/{layer}/{path.split('/', 4)[4]}" for layer in layers]


def unstack(config: ModelConfig, tree: Any) -> dict[str, Array]:
    """A tree whose leaves belong to parameters, as a flat dict with one entry per layer (a pure function: jit it).

    A leaf belongs to the parameter whose stack path is among the keys of its tree path; every layer's slice is named by
    the tree path with the logical path in that place, joined by "/".
    """
    flat = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        names = _stored_names(config, keys)
        if not _is_stacked(keys):
            flat[names[0]] = leaf
            continue
        # Indexing past the end would repeat the last slice without a word.
        assert leaf.shape[:1] == (len(names),), f"{'/'.join(map(_name, keys))} of shape {leaf.shape} has no dim of {len(names)} layers"
        flat |= {name: leaf[index] for index, name in enumerate(names)}
    return flat


def restack(config: ModelConfig, flat: Mapping[str, Array], *, like: Any) -> Any:
    """The inverse of `unstack`: a tree built as `like`, its leaves taken from the flat dict."""

    def take(keys: tuple[Any, ...], _: Any) -> Array:
        names = _stored_names(config, keys)
        return jnp.stack([flat[name] for name in names]) if _is_stacked(keys) else flat[names[0]]

    return jax.tree_util.tree_map_with_path(take, like)


def stored_shapes(config: ModelConfig, like: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """What `unstack` would return for a tree of arrays or shapes: shapes, dtypes and shardings, without computing."""
    flat = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(like)[0]:
        stacked = _is_stacked(keys)
        shape, sharding = (leaf.shape[1:] if stacked else leaf.shape), leaf.sharding
        if stacked and isinstance(sharding, NamedSharding):
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
        flat |= dict.fromkeys(_stored_names(config, keys), jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding))
    return flat


def _is_stacked(keys: tuple[Any, ...]) -> bool:
    return any(_name(key).startswith("segments/") for key in keys)


def _stored_names(config: ModelConfig, keys: tuple[Any, ...]) -> list[str]:
    """The names under which the slices of a leaf are stored; a single one for a leaf that is not stacked."""
    names = [_name(key) for key in keys]
    stacked = next((name for name in names if name.startswith("segments/")), None)
    if stacked is None:
        return ["/".join(names)]
    return ["/".join(logical if name == stacked else name for name in names) for logical in logical_paths(config, stacked)]


def _name(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))))
