"""A model's parameters from outside: flat dicts by path, and the layers behind the stacks.

Outside the modules all parameters are one flat dict keyed by stack path
(`segments/0/blocks/1/mixer/query/weight`, layer dim first). Checkpoints, rules and golden lists speak of
logical paths (`layers/3/mixer/query/weight`), so that nothing that is stored depends on how layers are
grouped for the scan: `unstack` and `restack` go between the two.
"""

import dataclasses
from collections.abc import Container, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from slmjax.models.architecture import BlockConfig, ModelConfig
from slmjax.models.decoder import Decoder
from slmjax.models.paths import logical_paths
from slmjax.models.quantized_modules import Plan, plan_quantization, set_inputs, stack_shapes
from slmjax.quantization import weights as numbers
from slmjax.quantization.rules import QuantPhase, phase_at

Params = dict[str, Array]  # by stack path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Definition:
    """The model without its arrays: what turns flat dicts of parameters back into a `Decoder`.

    Where weights have formats, `params` holds what is trained, and modules multiply with what `effective`
    makes of it.
    """

    config: ModelConfig
    graphdef: Any
    params: dict[str, jax.ShapeDtypeStruct]  # trained by the optimizer
    buffers: dict[str, jax.ShapeDtypeStruct]  # state that the optimizer does not touch (router biases)
    # of weights, by stack path; empty in full precision
    formats: numbers.Formats = dataclasses.field(default_factory=dict)
    # of weights beside which anything is learned in some phase
    learning: numbers.Formats = dataclasses.field(default_factory=dict)
    # formats of what is multiplied with, by stack path of the weight
    inputs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    phase: QuantPhase | None = None  # of the config's, the one that this is of; None in full precision

    def effective(self, params: Mapping[str, Array], *, key: Array | None = None) -> dict[str, Array]:
        """The parameters that modules compute with (`numerics.weights.effective`)."""
        if not self.formats and not self.learning:
            return dict(params)
        return numbers.effective(params, self.formats, key=key)

    def merge(self, params: Mapping[str, Array], buffers: Mapping[str, Array]) -> Decoder:
        """The module that computes with these arrays."""
        return self.merge_effective(self.effective(params), buffers)

    def merge_effective(self, params: Mapping[str, Array], buffers: Mapping[str, Array]) -> Decoder:
        """The same from effective parameters."""
        flat: dict[Any, Array] = {_keys(path): value for path, value in {**params, **buffers}.items()}
        return nnx.merge(self.graphdef, nnx.from_flat_state(flat))

    def merge_unrounded(self, params: Mapping[str, Array], buffers: Mapping[str, Array]) -> Decoder:
        """Return the module that computes with weights before they are rounded; inputs and caches are rounded
        as in this phase.
        """
        kept = {path: leaf for path, leaf in params.items() if not numbers.is_weight_quantizer_param(path)}
        return self.decoded().merge_effective(kept, buffers)

    def init(self, key: Array) -> tuple[dict[str, Array], dict[str, Array]]:
        """Freshly initialised parameters and buffers; jit it to have them sharded."""
        params, buffers = flat_params(Decoder(self.config, rngs=nnx.Rngs(params=key)))
        return self.with_learned(params), self.with_measured(buffers)

    def with_learned(self, params: Mapping[str, Array], *, kept: Container[str] = ()) -> dict[str, Array]:
        """The parameters with what is learned beside them as it begins for these weights; but what is beside
        the weights `kept` stays.
        """
        started = {
            path: jnp.zeros(leaf.shape, leaf.dtype)
            for path, leaf in self.params.items()
            if path not in params
        }
        learning = {path: formats for path, formats in self.learning.items() if path not in kept}
        return {**started, **params, **numbers.learned(params, learning)}

    def with_measured(self, buffers: Mapping[str, Array]) -> dict[str, Array]:
        """The buffers with those that calibration has not filled yet."""
        return {
            path: buffers.get(path, jnp.zeros(leaf.shape, leaf.dtype)) for path, leaf in self.buffers.items()
        }

    def decode(self, params: Mapping[str, Array]) -> tuple[dict[str, Array], "Definition"]:
        """Effective parameters, computed once, and the definition that is for them."""
        return jax.jit(self.effective)(params) if self.formats else self.effective(params), self.decoded()

    def decoded(self) -> "Definition":
        """The definition for effective parameters: weights are what they are, inputs and caches are rounded
        as here.
        """
        if not self.config.quant:
            return self
        params = {
            path: leaf for path, leaf in self.params.items() if not numbers.is_weight_quantizer_param(path)
        }
        config = dataclasses.replace(self.config, quant=() if self.phase is None else (self.phase.decoded(),))
        return dataclasses.replace(
            self,
            config=config,
            params=params,
            formats={},
            learning={},
            phase=config.quant[0] if config.quant else None,
        )


def define(config: ModelConfig, *, step: int | None = None, is_observed: bool = False) -> Definition:
    """The definition of a model, from shapes alone: nothing is computed.

    Args:
      step: of the training step before which rules of quantization are asked for; None for the last phase,
        which is deployed.
      is_observed: for calibration (`quantized.set_inputs`).

    Raises:
      ValueError: the rules of `config.quant` do not fit the model.
    """
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(params=jax.random.key(0))))
    plan = None
    if config.quant:
        plan = plan_quantization(config, stack_shapes(model), step=step)
        config = plan.config
        model = nnx.eval_shape(lambda: _rounding(config, plan, is_observed=is_observed))
    params, buffers = flat_params(model)
    if plan is not None:
        params |= jax.eval_shape(lambda given: numbers.learned(given, plan.learning), params)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (params, buffers))
    return Definition(
        config=config,
        graphdef=nnx.graphdef(model),
        params=shapes[0],
        buffers=shapes[1],
        formats={} if plan is None else plan.formats,
        learning={} if plan is None else plan.learning,
        phase=phase_at(config.quant, step),
        inputs={} if plan is None else {path: now for path, (now, _) in plan.inputs.items()},
    )


def _rounding(config: ModelConfig, plan: Plan, *, is_observed: bool) -> Decoder:
    model = Decoder(config, rngs=nnx.Rngs(params=jax.random.key(0)))
    set_inputs(model, plan, is_observed=is_observed)
    return model


def define_for_inference(config: ModelConfig, *, step: int | None = None) -> Definition:
    """The definition with the same parameters that evaluation and sampling use: see
    `FfnConfig.for_inference`.
    """

    def block(one: BlockConfig) -> BlockConfig:
        return one if one.ffn is None else dataclasses.replace(one, ffn=one.ffn.for_inference())

    stack = tuple(
        dataclasses.replace(segment, pattern=tuple(map(block, segment.pattern))) for segment in config.stack
    )
    return define(dataclasses.replace(config, stack=stack), step=step)


def flat_params(model: Decoder) -> tuple[dict[str, Any], dict[str, Any]]:
    """A model's parameters and its buffers, as flat dicts by stack path."""
    _, params, buffers = nnx.split(model, nnx.Param, ...)
    return _flat(params), _flat(buffers)


def _flat(state: Any) -> dict[str, Any]:
    return {"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def _keys(path: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in path.split("/"))


def unstack(config: ModelConfig, tree: Any) -> dict[str, Array]:
    """A tree whose leaves belong to parameters, as a flat dict with one entry per layer (a pure function: jit
    it).

    A leaf belongs to the parameter whose stack path is among the keys of its tree path; every layer's slice
    is named by the tree path with the logical path in that place, joined by "/".
    """
    flat = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        names = _stored_names(config, keys)
        if not _is_stacked(keys):
            flat[names[0]] = leaf
            continue
        # Indexing past the end would repeat the last slice without a word.
        assert leaf.shape[:1] == (len(names),), (
            f"{'/'.join(map(_name, keys))} of shape {leaf.shape} has no dim of {len(names)} layers"
        )
        flat |= {name: leaf[index] for index, name in enumerate(names)}
    return flat


def restack(config: ModelConfig, flat: Mapping[str, Array], *, like: Any) -> Any:
    """The inverse of `unstack`: a tree built as `like`, its leaves taken from the flat dict."""

    def take(keys: tuple[Any, ...], _: Any) -> Array:
        names = _stored_names(config, keys)
        return jnp.stack([flat[name] for name in names]) if _is_stacked(keys) else flat[names[0]]

    return jax.tree_util.tree_map_with_path(take, like)


def stored_shapes(config: ModelConfig, like: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """What `unstack` would return for a tree of arrays or shapes: shapes, dtypes and shardings, without
    computing.
    """
    flat = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(like)[0]:
        stacked = _is_stacked(keys)
        shape = leaf.shape[1:] if stacked else leaf.shape
        sharding = leaf.sharding
        if stacked and isinstance(sharding, NamedSharding):
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
        flat |= dict.fromkeys(
            _stored_names(config, keys), jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)
        )
    return flat


def _is_stacked(keys: tuple[Any, ...]) -> bool:
    return any(_name(key).startswith("segments/") for key in keys)


def _stored_names(config: ModelConfig, keys: tuple[Any, ...]) -> list[str]:
    """The names under which the slices of a leaf are stored; a single one for a leaf that is not stacked."""
    names = [_name(key) for key in keys]
    stacked = next((name for name in names if name.startswith("segments/")), None)
    if stacked is None:
        return ["/".join(names)]
    return [
        "/".join(logical if name == stacked else name for name in names)
        for logical in logical_paths(config, stacked)
    ]


def _name(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))))
