"""A model's parameters from outside: flat dicts by path, and the layers behind the stacks.

    definition = define(config)                       # from shapes alone, nothing is computed
    params, buffers = jax.jit(definition.init)(key)
    model = definition.merge(params, buffers)

Outside the modules all parameters are one flat dict keyed by stack path
(`segments/0/blocks/1/mixer/query/weight`, layer dim first). Checkpoints, rules and golden lists use logical
paths (`layers/3/mixer/query/weight`), so that nothing that is stored depends on how layers are grouped for
the scan: `unstack` and `restack` convert between the two.

Layers may multiply with something other than the trained parameters: adapters add to them, pruning masks
them, quantization rounds them. Each is a `ParamTransform`, which a definition applies once a step, in this
order.
"""

import abc
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from slmjax.models.architecture import BlockConfig, ModelConfig
from slmjax.models.decoder import Decoder
from slmjax.models.paths import logical_paths

Params = dict[str, Array]  # by stack path


# Transforms -------------------------------------------------------------------------------------------------
class ParamTransform(abc.ABC):
    """A pure function of the parameters that runs once a step, before layers multiply with them.

    It may have parameters of its own, which are in the same flat dict, are trained with the others, and which
    no layer has.
    """

    @property
    @abc.abstractmethod
    def is_identity(self) -> bool:
        """Whether parameters stay as they are."""

    @abc.abstractmethod
    def __call__(self, params: Mapping[str, Array], *, key: Array | None) -> Params:
        """Return the parameters of the layers.

        Args:
          params: the trained ones, with those of the transform.
          key: randomness of training; None in evaluation.
        """

    @abc.abstractmethod
    def init(self, params: Mapping[str, Array]) -> Params:
        """Return `params` with the transform's own parameters at their initial values."""

    @abc.abstractmethod
    def strip(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return `params` without the transform's own."""

    @abc.abstractmethod
    def applied(self) -> "ParamTransform":
        """Return the transform for parameters to which this one has been applied: an identity."""


# Definitions ------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class Definition:
    """The model without its arrays: converts flat dicts of parameters back into a `Decoder`."""

    config: ModelConfig
    graphdef: Any
    params: dict[str, jax.ShapeDtypeStruct]  # trained by the optimizer
    buffers: dict[str, jax.ShapeDtypeStruct]  # state that the optimizer does not touch (router biases)
    transforms: tuple[ParamTransform, ...] = ()  # in the order in which they are applied

    @property
    def is_transformed(self) -> bool:
        """Whether layers multiply with something other than the trained parameters."""
        return not all(transform.is_identity for transform in self.transforms)

    def transform(self, params: Mapping[str, Array], *, key: Array | None = None) -> Params:
        """Return the parameters that layers multiply with.

        Args:
          key: randomness of training; None in evaluation.
        """
        for transform in self.transforms:
            if not transform.is_identity:
                params = transform(params, key=key)
        return dict(params)

    def transformed(self) -> "Definition":
        """Return the definition for parameters that `transform` has returned."""
        if not self.transforms:
            return self
        params = self.params
        # Each transform removes its own parameters only: the layers' own remain after the last.
        for transform in self.transforms:
            params = transform.strip(params)
        transforms = tuple(transform.applied() for transform in self.transforms)
        return dataclasses.replace(self, params=params, transforms=transforms)

    def transform_once(self, params: Mapping[str, Array]) -> tuple[Params, "Definition"]:
        """Return the parameters that layers multiply with, computed now, and the definition for them."""
        # As one program: op by op, rounding would allocate several arrays of the size of each weight.
        transform = jax.jit(self.transform) if self.is_transformed else self.transform
        return transform(params), self.transformed()

    def merge(self, params: Mapping[str, Array], buffers: Mapping[str, Array]) -> Decoder:
        """Return the module for trained parameters."""
        return self.merge_transformed(self.transform(params), buffers)

    def merge_transformed(self, params: Mapping[str, Array], buffers: Mapping[str, Array]) -> Decoder:
        """Return the module for parameters that `transform` has returned."""
        flat: dict[Any, Array] = {_keys(path): value for path, value in {**params, **buffers}.items()}
        return nnx.merge(self.graphdef, nnx.from_flat_state(flat))

    def merge_untransformed(self, params: Mapping[str, Array], buffers: Mapping[str, Array]) -> Decoder:
        """Return the module that multiplies with trained parameters as they are, before any transform.

        What layers do to their inputs and caches stays.
        """
        for transform in self.transforms:
            params = transform.strip(params)
        return self.merge_transformed(params, buffers)

    def init(self, key: Array) -> tuple[Params, Params]:
        """Return freshly initialised parameters and buffers; jit it to have them sharded."""
        # A plain model comes first, so that its initial weights do not depend on transforms or quantizers.
        params, buffers = flat_params(Decoder(self.config, rngs=nnx.Rngs(params=key)))
        return self.with_own_params(params), self.with_missing_buffers(buffers)

    def with_own_params(self, params: Mapping[str, Array]) -> Params:
        """Return the parameters of a plain model with the initial ones of transforms and quantizers."""
        # Zeros stand in for scales of activations, which calibration measures later.
        params = {**_zeros_of_missing(self.params, params), **params}
        for transform in self.transforms:
            params = transform.init(params)
        return params

    def with_missing_buffers(self, buffers: Mapping[str, Array]) -> Params:
        """Return the buffers of a plain model with those that it lacks (calibrated scales), as zeros."""
        return {**_zeros_of_missing(self.buffers, buffers), **buffers}


def _zeros_of_missing(shapes: Mapping[str, Any], arrays: Mapping[str, Any]) -> Params:
    return {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in shapes.items() if path not in arrays}


def define(config: ModelConfig) -> Definition:
    """Return the definition of a model without transforms, from shapes alone: nothing is computed."""
    # Tracing for shapes draws nothing: the key has no effect.
    return definition_of(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(params=jax.random.key(0)))))


def definition_of(model: Decoder, *, transforms: tuple[ParamTransform, ...] = ()) -> Definition:
    """Return the definition of a model of arrays or shapes."""
    params, buffers = flat_params(model)
    # Parameters of transforms are known here only: no module has an attribute for them.
    for transform in transforms:
        params = jax.eval_shape(transform.init, params)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (params, buffers))
    return Definition(
        config=model.config,
        graphdef=nnx.graphdef(model),
        params=shapes[0],
        buffers=shapes[1],
        transforms=transforms,
    )


def inference_config(config: ModelConfig) -> ModelConfig:
    """Return the model for evaluation and sampling, with the same parameters (`FfnConfig.for_inference`)."""

    def for_inference(block: BlockConfig) -> BlockConfig:
        return block if block.ffn is None else dataclasses.replace(block, ffn=block.ffn.for_inference())

    stack = tuple(
        dataclasses.replace(group, pattern=tuple(map(for_inference, group.pattern))) for group in config.stack
    )
    further = config.multi_token
    if further is not None and further.block is not None:
        further = dataclasses.replace(further, block=for_inference(further.block))
    return dataclasses.replace(config, stack=stack, multi_token=further)


def define_for_inference(config: ModelConfig) -> Definition:
    """Return `define` of the model for evaluation and sampling."""
    return define(inference_config(config))


# Stack paths and logical paths ------------------------------------------------------------------------------
def flat_params(model: Decoder) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a model's parameters and its buffers, as flat dicts by stack path."""
    # Every variable that is no Param is a buffer: router biases, calibrated scales, signs.
    _, params, buffers = nnx.split(model, nnx.Param, ...)
    return _flat(params), _flat(buffers)


def _flat(state: Any) -> dict[str, Any]:
    return {"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def _keys(path: str) -> tuple[str | int, ...]:
    # NNX has integers for items of lists; a stack path writes them as digits.
    return tuple(int(part) if part.isdigit() else part for part in path.split("/"))


def unstack(config: ModelConfig, tree: Any) -> Params:
    """Return a tree whose leaves belong to parameters as a flat dict with one entry per layer.

    A leaf belongs to the parameter whose stack path is among the keys of its tree path. Every layer's slice
    is named by the tree path with the logical path in place of the stack path, joined by "/". A pure
    function: jit it.
    """
    flat = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        names = _stored_names(config, keys)
        if not _is_stacked(keys):
            flat[names[0]] = leaf
            continue
        # Indexing past the end would silently repeat the last slice.
        assert leaf.shape[:1] == (len(names),), (
            f"{'/'.join(map(_name, keys))} of shape {leaf.shape} has no dim of {len(names)} layers"
        )
        flat |= {name: leaf[index] for index, name in enumerate(names)}
    return flat


def restack(config: ModelConfig, flat: Mapping[str, Array], *, like: Any) -> Any:
    """Return the inverse of `unstack`: a tree built as `like`, its leaves taken from the flat dict."""

    def take(keys: tuple[Any, ...], _: Any) -> Array:
        names = _stored_names(config, keys)
        return jnp.stack([flat[name] for name in names]) if _is_stacked(keys) else flat[names[0]]

    return jax.tree_util.tree_map_with_path(take, like)


def stored_shapes(config: ModelConfig, like: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes, dtypes and shardings that `unstack` would return for a tree of arrays or shapes."""
    flat = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(like)[0]:
        stacked = _is_stacked(keys)
        # A layer's slice has no layer dim, and its sharding no entry for it.
        shape = leaf.shape[1:] if stacked else leaf.shape
        sharding = leaf.sharding
        if stacked and isinstance(sharding, NamedSharding):
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
        flat |= dict.fromkeys(
            _stored_names(config, keys), jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)
        )
    return flat


def _is_stacked(keys: tuple[Any, ...]) -> bool:
    # Optimizer states have their own keys around the path of a parameter: any of the keys may be it.
    return any(_name(key).startswith("segments/") for key in keys)


def _stored_names(config: ModelConfig, keys: tuple[Any, ...]) -> list[str]:
    """The names under which the slices of a leaf are stored; a single one for a leaf that is not stacked."""
    names = [_name(key) for key in keys]
    stacked = next((name for name in names if name.startswith("segments/")), None)
    logical_of = {} if stacked is None else {stacked: logical_paths(config, stacked)}
    num_slices = 1 if stacked is None else len(logical_of[stacked])
    return [
        _FORMER_MODULE.sub(
            lambda match: FORMER_MODULES[match.group()],
            "/".join(logical_of[name][index] if name == stacked else name for name in names),
        )
        for index in range(num_slices)
    ]


# Modules whose parameters are stored under the names that they had in the first checkpoints.
FORMER_MODULES: Mapping[str, str] = {
    "input_quantizer": "input",
    "hidden_quantizer": "hidden_input",
    "head_quantizer": "head_input",
}
# Only complete parts of a path match: at its beginning or after a slash, and before a slash.
_FORMER_MODULE = re.compile(rf"(?<![^/])({'|'.join(FORMER_MODULES)})(?=/)")


def _name(key: Any) -> str:
    # JAX's DictKey has `key`, SequenceKey `idx` and GetAttrKey `name`; a plain string has none of them.
    return str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))))
