"""Which format each layer's weights, inputs and caches have in a phase, set into the modules of a model.

    plan = plan_quantization(config, phases, shapes_of(config), step=None)
    plan.config                     # the same layers, in groups within which their quantizers are alike
    set_quantizers(model, plan)     # of a model of `plan.config`

Dims: R layers of a stack.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from slmjax.formats.presets import name_of
from slmjax.formats.spec import stored_bytes
from slmjax.models.architecture import HeadKind, LayerGroup, ModelConfig
from slmjax.models.decoder import Decoder
from slmjax.models.ffn.moe import Experts
from slmjax.models.layers import Linear
from slmjax.models.paths import layer_indices, logical_paths
from slmjax.models.protocols import CachingMixer, caching_mixers
from slmjax.parallel.rules import input_dim
from slmjax.quantization.activations import (
    ActivationQuantizer,
    ShardActivationQuantizer,
    init_activation_params,
)
from slmjax.quantization.assignment import (
    CACHE,
    SCALE_ESTIMATORS,
    TABLES,
    Assignment,
    TensorQuant,
    assign_formats,
)
from slmjax.quantization.rules import QuantPhase, QuantRule, phase_at
from slmjax.quantization.weights import Formats

Assignments = Mapping[str, Assignment]  # by logical path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The formats of one phase, with what must be alike in all phases."""

    config: ModelConfig  # groups divided where the quantizers inside their layers differ
    formats: Formats  # of weights, by stack path; empty in full precision
    learned_formats: Formats  # of weights that have quantizer parameters in any phase
    # by stack path of the weight: the format of its inputs, and the one that has quantizer parameters
    inputs: dict[str, tuple[TensorQuant | None, TensorQuant | None]]
    caches: dict[str, TensorQuant | None]  # by the stack path of a mixer


# Shapes -----------------------------------------------------------------------------------------------------
def stack_shapes(model: Decoder) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all parameters by stack path, and of what caching mixers store of a token.

    The layer dim is first.
    """
    _, state = nnx.split(model)
    shapes = {
        "/".join(map(str, path)): tuple(leaf.get_value().shape) for path, leaf in nnx.to_flat_state(state)
    }
    for index, group in enumerate(model.segments):
        for offset, block in enumerate(group.blocks):
            path = f"segments/{index}/blocks/{offset}/mixer"
            # A cache is no parameter, but rules name it by a path.
            shapes |= {
                f"{mixer_path}/cache": (group.config.repeats, *(mixer.cached_shape() or ()))
                for mixer_path, mixer in caching_mixers(block.mixer, path)
            }
    for index, module in enumerate(model.multi_token or ()):
        shapes |= {
            f"{mixer_path}/cache": mixer.cached_shape() or ()
            for mixer_path, mixer in caching_mixers(module.block.mixer, f"multi_token/{index}/block/mixer")
        }
    return shapes


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return `stack_shapes` of a model of this config: nothing is computed."""
    return stack_shapes(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(params=jax.random.key(0)))))


def logical_shapes(config: ModelConfig, stacked: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of each layer by logical path, for those of stacks."""
    return {
        logical: shape[1:] if path.startswith("segments/") else shape
        for path, shape in stacked.items()
        for logical in logical_paths(config, path)
    }


def assign_model_formats(
    rules: Sequence[QuantRule], config: ModelConfig, stacked: Mapping[str, tuple[int, ...]]
) -> dict[str, Assignment]:
    """Return `assign_formats` of every parameter and cache of a model, by logical path."""
    return assign_formats(rules, logical_shapes(config, stacked))


# Planning ---------------------------------------------------------------------------------------------------
def plan_quantization(
    config: ModelConfig,
    phases: Sequence[QuantPhase],
    stacked: Mapping[str, tuple[int, ...]],
    *,
    step: int | None,
) -> Plan:
    """Return the plan of the phase that a step is in.

    Args:
      phases: all phases of the run.
      stacked: `stack_shapes` of a model of this config.
      step: number of earlier training steps; None for the last phase.

    Raises:
      ValueError: as `assign_formats`; or quantizer parameters would change their shapes between phases.
    """
    by_phase = [assign_model_formats(phase.rules, config, stacked) for phase in phases]
    phase = phase_at(phases, step)
    current: Assignments = {} if phase is None else by_phase[list(phases).index(phase)]
    # Groups are divided by all phases, so that the layout of parameters is the same in each of them.
    parts = _divided_groups(config, by_phase)
    divided = dataclasses.replace(config, stack=tuple(group for groups in parts for group in groups))
    # A phase without a format for a weight still has the parameters that another phase trains.
    formats = {}
    learned_formats = {}
    inputs = {}
    caches = {}
    for path in _stack_paths(config, divided, stacked):
        logical = logical_paths(divided, path)
        if path.endswith(CACHE):
            caches[path.removesuffix("/cache")] = current[logical[0]].weight if current else None
            continue
        # Before the first phase `current` is empty, and no layer has a format.
        by_layer = tuple(current[name].weight for name in logical) if current else ()
        if any(by_layer):
            formats[path] = by_layer
        if any(learned := tuple(_learned_format(by_phase, current, name, "weight") for name in logical)):
            learned_formats[path] = learned
        # Layers of one group have the same input formats: the first stands for all.
        pair = (
            current[logical[0]].input if current else None,
            _learned_format(by_phase, current, logical[0], "input"),
        )
        # A quantizer that only another phase uses is there too, as the identity.
        if any(pair) or any(assignments[logical[0]].input for assignments in by_phase):
            inputs[path] = pair
    return Plan(
        config=divided, formats=formats, learned_formats=learned_formats, inputs=inputs, caches=caches
    )


def _with_scale_params(tensor_quant: TensorQuant | None) -> TensorQuant | None:
    """The format if its estimator has quantizer parameters, else None."""
    has_params = tensor_quant is not None and isinstance(tensor_quant.estimator, SCALE_ESTIMATORS)
    return tensor_quant if has_params else None


def _learned_format(
    by_phase: Sequence[Assignments], current: Assignments, path: str, part: str
) -> TensorQuant | None:
    """The format with quantizer parameters: of the current phase, else of the first phase that has one."""
    formats = [
        tensor_quant
        for assignments in by_phase
        if (tensor_quant := _with_scale_params(getattr(assignments[path], part))) is not None
    ]
    if len({_layout(tensor_quant) for tensor_quant in formats}) > 1:
        raise ValueError(
            f"quant: the phases learn scales of the {part} of {path} with different estimators or group "
            "sizes, and their shapes cannot change: give all phases the same, or StraightThrough(), whose "
            "scales are computed"
        )
    now = _with_scale_params(getattr(current[path], part)) if current else None
    learned = now or (formats[0] if formats else None)
    # One signed format gives all phases a sign, because shapes must not change between them.
    has_sign = any(tensor_quant.spec.has_signed_scale for tensor_quant in formats)
    return dataclasses.replace(learned, keeps_sign=True) if learned is not None and has_sign else learned


def _layout(tensor_quant: TensorQuant) -> tuple[Any, ...]:
    spec = tensor_quant.spec
    return type(tensor_quant.estimator), spec.granularity, spec.group_size, tensor_quant.axis


def _divided_groups(config: ModelConfig, by_phase: Sequence[Assignments]) -> list[list[LayerGroup]]:
    """Each group as runs of repeats that need the same quantizers in all phases.

    Formats of inputs and caches and the layout of scales are static in a scanned stack, unlike the formats of
    weights, which are rounded outside the scan.
    """
    # What each layer needs, in all phases.
    static_by_layer: dict[int, list[Any]] = {}
    for assignments in by_phase:
        for path, assignment in assignments.items():
            if path.startswith("layers/"):
                _, layer, name = path.split("/", 2)
                learned = _with_scale_params(assignment.weight)
                layout = None if learned is None else (*_layout(learned), learned.spec.has_signed_scale)
                cache = assignment.weight if path.endswith(CACHE) else None
                static_by_layer.setdefault(int(layer), []).append((name, assignment.input, cache, layout))
    # Neighbouring repeats with equal needs become one group.
    divided = []
    first = 0
    for group in config.stack:
        size = len(group.pattern)
        parts: list[LayerGroup] = []
        for repeat in range(group.repeats):
            layers = range(first + repeat * size, first + (repeat + 1) * size)
            if repeat and all(
                static_by_layer.get(layer - size) == static_by_layer.get(layer) for layer in layers
            ):
                parts[-1] = dataclasses.replace(parts[-1], repeats=parts[-1].repeats + 1)
            else:
                parts.append(LayerGroup(pattern=group.pattern))
        divided.append(parts)
        first += size * group.repeats
    return divided


def _stack_paths(config: ModelConfig, divided: ModelConfig, stacked: Mapping[str, Any]) -> list[str]:
    """The stack paths of the divided config, for those of the config."""
    if divided == config:
        return list(stacked)
    # Through logical paths, which do not depend on the groups.
    known = {logical for path in stacked for logical in logical_paths(config, path)}
    paths = [path for path in stacked if layer_indices(config, path) is None]
    for index, group in enumerate(divided.stack):
        for offset in range(len(group.pattern)):
            prefix = f"segments/{index}/blocks/{offset}/"
            # Layers of a part have the same parameters: those of its first stand for all. Any name below it
            # would do.
            layer = (layer_indices(divided, prefix + "any") or [0])[0]
            layer_prefix = f"layers/{layer}/"
            paths += [
                prefix + logical.removeprefix(layer_prefix)
                for logical in sorted(known)
                if logical.startswith(layer_prefix)
            ]
    return paths


# Into the modules -------------------------------------------------------------------------------------------
def set_quantizers(model: Decoder, plan: Plan, *, is_calibrating: bool = False) -> None:
    """Set the quantizers of inputs and caches into the modules of a model of `plan.config`.

    Args:
      is_calibrating: nothing is rounded, and the gradient of quantizer parameters is their initial value.

    Raises:
      ValueError: weights with the same inputs have different formats for them, or a layer has no input
        quantizer.
    """
    for path, tensor_quant in plan.caches.items():
        mixer = _module(model, path)
        assert isinstance(mixer, CachingMixer), path
        # Scales of caches are computed for each token: there are no parameters to stack.
        mixer.cache_quantizer = None if tensor_quant is None else ActivationQuantizer(tensor_quant)
    formats_by_owner: dict[tuple[str, str], Any] = {}
    for path, (tensor_quant, learned) in plan.inputs.items():
        owner, name = _owner(model, path)
        if owner is None:
            continue
        # Gate and up projections of experts share the quantizer of their inputs.
        key = (path.rpartition("/")[0] if name != "head_quantizer" else "", name)
        if formats_by_owner.setdefault(key, (tensor_quant, learned)) != (tensor_quant, learned):
            raise ValueError(
                f"quant: {path} is multiplied with the same inputs as its neighbours, and has another format "
                "for them: give them one"
            )
        # Experts compute inside shard_map, so that their hidden layer is quantized a shard at a time.
        if name == "hidden_quantizer":
            owner.hidden_quantizer = ShardActivationQuantizer(tensor_quant, dim="ffn")
            continue
        layers = layer_indices(plan.config, path)
        quantizer = ActivationQuantizer(
            tensor_quant,
            dim=input_dim(path),
            learned=learned,
            params=init_activation_params(learned, num_layers=None if layers is None else len(layers)),
            is_calibrating=is_calibrating,
        )
        setattr(owner, name, quantizer)


def _owner(model: Decoder, path: str) -> tuple[Any, str]:
    """The module that multiplies a weight with its inputs, and the attribute of its quantizer.

    None for a table of which rows are only looked up.
    """
    if path in TABLES:
        # A tied table is multiplied with the hidden states, and the decoder owns their quantizer.
        is_head = path == ("embed/table" if model.config.head is HeadKind.TIED else "head/weight")
        return (model, "head_quantizer") if is_head else (None, "")
    parent, _, name = path.rpartition("/")
    module = _module(model, parent)
    if isinstance(module, Experts):
        return module, "hidden_quantizer" if name == "down" else "input_quantizer"
    if not isinstance(module, Linear):
        raise ValueError(
            f"quant: the inputs of {path} cannot be quantized, only those of linear layers, experts and the "
            "head: leave out its input format"
        )
    return module, "input_quantizer"


def _module(model: Any, path: str) -> Any:
    module = model
    for part in path.split("/"):
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    return module


# Reports ----------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """The format of one parameter or cache, and its size as deployed."""

    path: str  # logical
    shape: tuple[int, ...]
    format: str | None  # of the parameter, or of what a cache stores; None in floating point
    input: str | None  # of the inputs that it is multiplied with
    bytes: int  # scales included; 4 for each number in floating point; of a cache for each token
    reason: str  # why it stays in floating point

    @property
    def bits(self) -> float:
        """Bits of each number, scales included."""
        return 8 * self.bytes / max(math.prod(self.shape), 1)


def assignment_lines(config: ModelConfig, phases: Sequence[QuantPhase]) -> list[Line]:
    """Return a line for every parameter and every cache of a model in the last phase.

    Raises:
      ValueError: the rules do not fit the model (`assign_formats`).
    """
    rules = phases[-1].rules if phases else ()
    assignments = assign_model_formats(rules, config, shapes_of(config))
    # Of the other tables rows are only looked up.
    head = "embed/table" if config.head is HeadKind.TIED else "head/weight"
    for table in set(TABLES) & set(assignments) - {head}:
        assignments[table] = dataclasses.replace(assignments[table], input=None)
    return [_line(assignment) for assignment in assignments.values()]


def _line(assignment: Assignment) -> Line:
    weight = assignment.weight
    size = math.prod(assignment.shape)
    return Line(
        path=assignment.path,
        shape=assignment.shape,
        format=None if weight is None else name_of(weight.spec),
        input=None if assignment.input is None else name_of(assignment.input.spec),
        bytes=4 * size if weight is None else stored_bytes(weight.spec, assignment.shape, axis=weight.axis),
        reason=assignment.reason,
    )
