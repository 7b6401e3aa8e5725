"""A model under rules of quantization: which format each layer's weights, inputs and caches have in a phase,
set into its modules.

    plan = plan_quantization(config, build, step=None)     # config.quant says the phases
    plan.config                                            # the same layers, in segments within which they
    are alike set_inputs(model, plan)

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
from slmjax.models.protocols import CachingMixer
from slmjax.parallel.rules import input_dim
from slmjax.quantization.activations import ActivationQuantizer, initial
from slmjax.quantization.assignment import CACHE, LEARNED_INPUTS, Assignment, TensorQuant, assign_formats
from slmjax.quantization.rules import phase_at
from slmjax.quantization.weights import Formats

Assignments = Mapping[str, Assignment]  # by logical path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What the rules come to in one phase, with what must be alike in all phases."""

    config: ModelConfig  # segments divided where the layers of one differ in what is set into modules
    formats: Formats  # of weights, by stack path; empty in full precision
    learning: Formats  # of weights beside which anything is learned in some phase
    inputs: dict[
        str, tuple[TensorQuant | None, TensorQuant | None]
    ]  # by stack path: now, and what learns in some phase
    caches: dict[str, TensorQuant | None]  # by the stack path of a mixer


def stack_shapes(model: Decoder) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters of a model by stack path; and of what caching mixers keep of a token, layer
    dim first.
    """
    _, state = nnx.split(model)
    shapes = {
        "/".join(map(str, path)): tuple(leaf.get_value().shape) for path, leaf in nnx.to_flat_state(state)
    }
    for index, segment in enumerate(model.segments):
        for offset, block in enumerate(segment.blocks):
            if isinstance(block.mixer, CachingMixer):
                shapes[f"segments/{index}/blocks/{offset}{CACHE}"] = (
                    segment.config.repeats,
                    *block.mixer.cached_shape(),
                )
    return shapes


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """`stack_shapes` of a model of this config: nothing is computed."""
    return stack_shapes(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(params=jax.random.key(0)))))


def logical_shapes(config: ModelConfig, stacked: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The same, of each layer, by logical path."""
    return {
        logical: shape[1:] if path.startswith("segments/") else shape
        for path, shape in stacked.items()
        for logical in logical_paths(config, path)
    }


def entries_of(config: ModelConfig, stacked: Mapping[str, tuple[int, ...]]) -> list[dict[str, Assignment]]:
    """What the rules of each phase say of every path. Raises ValueError as `assign_formats` does."""
    shapes = logical_shapes(config, stacked)
    return [assign_formats(phase.rules, shapes) for phase in config.quant]


def plan_quantization(
    config: ModelConfig, stacked: Mapping[str, tuple[int, ...]], *, step: int | None
) -> Plan:
    """What `config.quant` comes to at a step.

    Args:
      stacked: `stack_shapes` of a model of this config.
      step: which phase; None for the last.

    Raises:
      ValueError: as `assign_formats`; or scales that are learned would change their shapes between phases.
    """
    phases = entries_of(config, stacked)
    current = phase_at(config.quant, step)
    now: Assignments = {} if current is None else phases[config.quant.index(current)]
    divided = dataclasses.replace(
        config, stack=tuple(part for parts in _divided_segments(config, phases) for part in parts)
    )
    paths = _restacked(config, divided, stacked)
    formats = {}
    learning = {}
    inputs = {}
    caches = {}
    for path in paths:
        logical = logical_paths(divided, path)
        if path.endswith(CACHE):
            caches[path.removesuffix("/cache")] = now[logical[0]].weight if now else None
            continue
        of_layers = tuple(now[name].weight for name in logical) if now else ()
        if any(of_layers):
            formats[path] = of_layers
        if any(learners := tuple(_learner(phases, now, name, "weight") for name in logical)):
            learning[path] = learners
        pair = now[logical[0]].input if now else None, _learner(phases, now, logical[0], "input")
        if any(pair) or any(entries[logical[0]].input for entries in phases):
            inputs[path] = pair
    return Plan(config=divided, formats=formats, learning=learning, inputs=inputs, caches=caches)


def _learns(numbers: TensorQuant | None) -> TensorQuant | None:
    return numbers if numbers is not None and isinstance(numbers.estimator, LEARNED_INPUTS) else None


def _learner(phases: Sequence[Assignments], now: Assignments, path: str, part: str) -> TensorQuant | None:
    """The format beside which something is learned of a weight or its input: that of the phase, else of the
    first phase that has one.
    """
    found = [numbers for entries in phases if (numbers := _learns(getattr(entries[path], part))) is not None]
    if len({_layout(numbers) for numbers in found}) > 1:
        raise ValueError(
            f"quant: the phases learn scales of the {part} of {path} in different ways or for groups of "
            "different sizes, and what is "
            "learned keeps its shape: give all phases the same, or StraightThrough(), whose scales follow "
            "the numbers"
        )
    current = _learns(getattr(now[path], part)) if now else None
    learner = current or (found[0] if found else None)
    has_sign = any(numbers.spec.has_signed_scale for numbers in found)
    return dataclasses.replace(learner, keeps_sign=True) if learner is not None and has_sign else learner


def _layout(numbers: TensorQuant) -> tuple[Any, ...]:
    return type(numbers.estimator), numbers.spec.granularity, numbers.spec.group_size, numbers.axis


def _divided_segments(config: ModelConfig, phases: Sequence[Assignments]) -> list[list[LayerGroup]]:
    """Each segment as runs of repeats whose layers have the same inputs, caches and learned scales in all
    phases.
    """
    by_layer: dict[int, list[Any]] = {}
    for entries in phases:
        for path, entry in entries.items():
            if path.startswith("layers/"):
                _, layer, name = path.split("/", 2)
                learner = _learns(entry.weight)
                layout = None if learner is None else (*_layout(learner), learner.spec.has_signed_scale)
                alike = (name, entry.input, entry.weight if path.endswith(CACHE) else None, layout)
                by_layer.setdefault(int(layer), []).append(alike)
    divided = []
    first = 0
    for segment in config.stack:
        size = len(segment.pattern)
        parts: list[LayerGroup] = []
        for repeat in range(segment.repeats):
            start = first + repeat * size
            if repeat and [by_layer.get(layer - size) for layer in range(start, start + size)] == [
                by_layer.get(layer) for layer in range(start, start + size)
            ]:
                parts[-1] = dataclasses.replace(parts[-1], repeats=parts[-1].repeats + 1)
            else:
                parts.append(LayerGroup(pattern=segment.pattern))
        divided.append(parts)
        first += size * segment.repeats
    return divided


def _restacked(config: ModelConfig, divided: ModelConfig, stacked: Mapping[str, Any]) -> list[str]:
    """The stack paths of the divided config."""
    if divided == config:
        return list(stacked)
    known = {logical for path in stacked for logical in logical_paths(config, path)}
    paths = [path for path in stacked if layer_indices(config, path) is None]
    for index, segment in enumerate(divided.stack):
        for offset in range(len(segment.pattern)):
            prefix = f"segments/{index}/blocks/{offset}/"
            layer = (layer_indices(divided, prefix + "any") or [0])[0]
            own = f"layers/{layer}/"
            paths += [
                prefix + logical.removeprefix(own) for logical in sorted(known) if logical.startswith(own)
            ]
    return paths


# Into the modules -------------------------------------------------------------------------------------------
def set_inputs(model: Decoder, plan: Plan, *, is_observed: bool = False) -> None:
    """Sets what rounds inputs and caches into the modules of a model of `plan.config`.

    Args:
      is_observed: for calibration: nothing is rounded, and the gradient of what is learned is what it should
        begin as.
    """
    for path, numbers in plan.caches.items():
        mixer = _module(model, path)
        assert isinstance(mixer, CachingMixer), path
        mixer.cache = None if numbers is None else ActivationQuantizer(numbers)
    set_by: dict[tuple[str, str], Any] = {}
    for path, (numbers, learner) in plan.inputs.items():
        owner, name = _owner(model, path)
        if owner is None:
            continue
        place = (path.rpartition("/")[0] if name != "head_input" else "", name)
        if set_by.setdefault(place, (numbers, learner)) != (numbers, learner):
            raise ValueError(
                f"quant: {path} is multiplied with the same inputs as its neighbours, and has another format "
                "for them: give them one"
            )
        layers = layer_indices(plan.config, path)
        learned = initial(learner, num_layers=None if layers is None else len(layers))
        dim = input_dim(path)
        setattr(
            owner,
            name,
            ActivationQuantizer(numbers, dim=dim, learner=learner, learned=learned, is_observed=is_observed),
        )


def _owner(model: Decoder, path: str) -> tuple[Any, str]:
    """The module that rounds the input of a weight, and the attribute with which it does; None for a table
    that is only looked up in.
    """
    if path in ("embed/table", "head/weight"):
        is_head = path == "head/weight" or model.config.head is HeadKind.TIED
        return (model, "head_input") if is_head else (None, "")
    parent, _, name = path.rpartition("/")
    module = _module(model, parent)
    if isinstance(module, Experts):
        return module, "hidden_input" if name == "down" else "input"
    if not isinstance(module, Linear):
        raise ValueError(
            f"quant: the input of {path} cannot be rounded, only those of linear layers, experts and the "
            "head: leave out its input format"
        )
    return module, "input"


def _module(model: Any, path: str) -> Any:
    found = model
    for part in path.split("/"):
        found = found[int(part)] if part.isdigit() else getattr(found, part)
    return found


# For people -------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """What becomes of one path, and what it takes as it is deployed."""

    path: str
    shape: tuple[int, ...]
    format: str | None  # of the parameter, or of what a cache keeps; None in floating point
    input: str | None  # of what it is multiplied with
    bytes: int  # scales included; 4 for each number in floating point; of a cache for each token
    reason: str  # why it stays in floating point

    @property
    def bits(self) -> float:
        """Bits of each number, scales included."""
        return 8 * self.bytes / max(math.prod(self.shape), 1)


def assignment_lines(config: ModelConfig) -> list[Line]:
    """A line for every parameter and every cache of a model, as its last phase has them.

    Raises:
      ValueError: the rules do not fit the model (`numerics.coverage.cover`).
    """
    shapes = logical_shapes(config, shapes_of(config))
    rules = config.quant[-1].rules if config.quant else ()
    entries = assign_formats(rules, shapes)
    if config.head is HeadKind.UNTIED:  # then nothing is multiplied with the embedding
        entries["embed/table"] = dataclasses.replace(entries["embed/table"], input=None)
    return [_line(entry) for entry in entries.values()]


def _line(entry: Assignment) -> Line:
    weight = entry.weight
    numbers = math.prod(entry.shape)
    size = 4 * numbers if weight is None else stored_bytes(weight.spec, entry.shape, axis=weight.axis)
    return Line(
        path=entry.path,
        shape=entry.shape,
        format=None if weight is None else name_of(weight.spec),
        input=None if entry.input is None else name_of(entry.input.spec),
        bytes=size,
        reason=entry.reason,
    )
