"""Building blocks of a family's file: its configuration, and rules for its tensors.

A rule converts between some of our parameters and some of their tensors, in both directions. Ours are
matrices [in, out]; most of theirs are [out, in]. Names in the rules of a layer are relative to the layer;
`{e}` stands for the index of an expert.

    TENSOR_MAP = TensorMap(
        around=(same("embed/table", "model.embed_tokens.weight"), ...),
        layer=(matrix("mixer/query/weight", "self_attn.q_proj.weight"), ...),
    )
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from slmjax.config import ConfigError, from_json, to_json
from slmjax.convert.settings import Settings
from slmjax.models.architecture import MOST_LAYERS, BlockConfig, ModelConfig
from slmjax.models.definition import define, stored_shapes
from slmjax.models.ffn.moe import MoeConfig
from slmjax.models.mixers.attention import AttentionConfig
from slmjax.models.protocols import innermost

Arrays = list[np.ndarray]
Shapes = list[tuple[int, ...]]
T = TypeVar("T")
LARGEST_COUNT = MOST_LAYERS  # of layers or experts; more is a mistake, or an attempt to exhaust memory
MOST_EXPERTS = 2**18  # of all layers together; the largest released models have about 2**15
# The same count has another name in each library.
LAYERS = ("num_hidden_layers", "n_layer", "block_count")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "expert_count")


class Inexpressible(ValueError):
    """A model that a format cannot represent; the message is the reason."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """Conversion between some of our parameters and some tensors of a foreign model."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    read: Callable[[Arrays, Shapes], Arrays]  # theirs, and the shapes of ours -> ours
    write: Callable[[Arrays], Arrays]  # ours -> theirs


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorMap:
    """The rules for all tensors of a family.

    A rule applies if the model has all of its parameters. If several apply to a parameter, the first is used.
    """

    around: tuple[Rule, ...]  # outside the layers
    # of each layer, after the prefix; a function if they depend on its block, as layers of several kinds have
    # the same names of ours for different ones of theirs
    layer: tuple[Rule, ...] | Callable[[BlockConfig], tuple[Rule, ...]]
    prefix: str = "model.layers.{i}."
    # prefix of the names below the head; absent if the model was saved without its head
    base: str = "model."
    # patterns of tensors that are not parameters
    ignored: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)
    # parts of names and what files may have in their place, where libraries save other names than releases
    other_names: tuple[tuple[str, str], ...] = ()

    def layer_rules(self, block: BlockConfig) -> tuple[Rule, ...]:
        """Return the rules of a layer."""
        return self.layer if isinstance(self.layer, tuple) else self.layer(block)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """Configuration and tensor names of one family of models in one format."""

    architecture: str  # config.json's architectures[0], or GGUF's general.architecture
    read: Callable[[Settings], ModelConfig]
    # may leave out what the format cannot represent: the exporter reads the result back and compares
    write: Callable[[ModelConfig], dict[str, Any]]
    # a function if the rules depend on the config, such as on the number of heads
    tensor_map: TensorMap | Callable[[ModelConfig], TensorMap]
    # values of keys that a configuration may leave out
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def tensor_map_for(self, model: ModelConfig) -> TensorMap:
        """Return the tensor map for a model of this family."""
        return self.tensor_map if isinstance(self.tensor_map, TensorMap) else self.tensor_map(model)

    def settings(self, values: Mapping[str, Any], *, where: str) -> Settings:
        """Wrap a configuration for reading, with the family's defaults."""
        return Settings(values, where=where, defaults=self.defaults)


# Rules ------------------------------------------------------------------------------------------------------
def same(ours: str, theirs: str) -> Rule:
    """Rule for a vector or an embedding table, unchanged."""
    return Rule(ours=(ours,), theirs=(theirs,), read=lambda arrays, _: arrays, write=lambda arrays: arrays)


def matrix(ours: str, theirs: str) -> Rule:
    """Rule for a matrix, transposed."""
    return Rule(
        ours=(ours,),
        theirs=(theirs,),
        read=lambda arrays, _: [arrays[0].T],
        write=lambda arrays: [arrays[0].T],
    )


def linear(ours: str, theirs: str) -> tuple[Rule, Rule]:
    """Rules for a linear layer: its matrix, and its bias if it has one."""
    return matrix(f"{ours}/weight", f"{theirs}.weight"), same(f"{ours}/bias", f"{theirs}.bias")


def norm(ours: str, theirs: str) -> tuple[Rule, Rule]:
    """Rules for a norm: its scale, and its bias if it has one."""
    return same(f"{ours}/scale", f"{theirs}.weight"), same(f"{ours}/bias", f"{theirs}.bias")


def joined(ours: Sequence[str], theirs: str) -> Rule:
    """Rule for several matrices [in, out] joined into one [out, in], or several vectors joined into one."""

    def read(arrays: Arrays, shapes: Shapes) -> Arrays:
        # The parts may differ in width: with grouped queries, key and value are narrower than the query.
        ends = np.cumsum([shape[-1] for shape in shapes])[:-1]
        return [part.T for part in np.split(arrays[0], ends, axis=0)]

    return Rule(
        ours=tuple(ours),
        theirs=(theirs,),
        read=read,
        write=lambda arrays: [np.concatenate([array.T for array in arrays])],
    )


def interleaved(ours: Sequence[str], theirs: str, *, num_groups: int) -> Rule:
    """Rule for matrices [in, out] joined into one [out, in] whose rows are sorted by group, such as a head.

    The outputs of each of ours are those of the groups in order. Of theirs, each group has the outputs of the
    first of ours, then those of the second, and so on. Vectors are joined in the same way.
    """

    def read(arrays: Arrays, shapes: Shapes) -> Arrays:
        whole = arrays[0].T
        groups = whole.reshape(*whole.shape[:-1], num_groups, -1)
        ends = np.cumsum([shape[-1] // num_groups for shape in shapes])[:-1]
        return [part.reshape(*whole.shape[:-1], -1) for part in np.split(groups, ends, axis=-1)]

    def write(arrays: Arrays) -> Arrays:
        groups = [array.reshape(*array.shape[:-1], num_groups, -1) for array in arrays]
        return [np.concatenate(groups, axis=-1).reshape(*arrays[0].shape[:-1], -1).T]

    return Rule(ours=tuple(ours), theirs=(theirs,), read=read, write=write)


def convolution(ours: Sequence[str], theirs: str) -> Rule:
    """Rule for the taps [W, C] of depthwise convolutions joined into one tensor [C, 1, W]."""
    rule = joined(ours, theirs)
    return dataclasses.replace(
        rule,
        read=lambda arrays, shapes: rule.read([np.squeeze(arrays[0], axis=1)], shapes),
        write=lambda arrays: [array[:, None, :] for array in rule.write(arrays)],
    )


def experts(ours: str, theirs: str) -> Rule:
    """Rule for experts [E, in, out] that are E matrices [out, in]; `theirs` has `{e}` for the index."""
    return Rule(
        ours=(ours,),
        theirs=(theirs,),
        read=lambda arrays, _: [np.stack([array.T for array in arrays])],
        write=lambda arrays: [expert.T for expert in arrays[0]],
    )


def stacked_experts(ours: str, theirs: str) -> Rule:
    """Rule for experts [E, in, out] that are one tensor [E, out, in]."""

    def transpose(arrays: Arrays) -> Arrays:
        return [np.swapaxes(arrays[0], 1, 2)]

    return Rule(ours=(ours,), theirs=(theirs,), read=lambda arrays, _: transpose(arrays), write=transpose)


def paired(rule: Rule, *, num_heads: int, rope_dim: int) -> Rule:
    """Reorder the rotated dims of a rule whose outputs are heads: theirs interleave the pairs.

    The rotated dims come last in each head. Theirs are x0 y0 x1 y1 ..., ours are x0 x1 ... y0 y1 ...
    """

    def reordered(arrays: Arrays, order: np.ndarray) -> Arrays:
        # The outputs are the last dim of matrices and of biases, so that one function serves both.
        heads = arrays[0].reshape(*arrays[0].shape[:-1], num_heads, -1)
        plain = np.arange(heads.shape[-1] - rope_dim)
        return [heads[..., np.concatenate([plain, len(plain) + order])].reshape(arrays[0].shape)]

    # Indices of the first of all pairs, then the second; their inverse is argsort.
    halves = np.arange(rope_dim).reshape(-1, 2).T.reshape(-1)
    return dataclasses.replace(
        rule,
        read=lambda arrays, shapes: reordered(rule.read(arrays, shapes), halves),
        write=lambda arrays: rule.write(reordered(arrays, np.argsort(halves))),
    )


# The rules of a model ---------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class BoundRule:
    """A rule with the full names of its parameters and tensors."""

    rule: Rule
    ours: list[str]
    theirs: list[str]
    shapes: Shapes  # of ours

    def read(self, arrays: Arrays) -> Arrays:
        """Convert their tensors to our parameters."""
        return self.rule.read(arrays, self.shapes)

    def write(self, arrays: Arrays) -> Arrays:
        """Convert our parameters, or arrays of their shapes, to their tensors."""
        return self.rule.write(arrays)


def logical_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter and buffer by logical path, for a single layer."""
    definition = define(config)
    stored = stored_shapes(config, {**definition.params, **definition.buffers})
    return {path: tuple(leaf.shape) for path, leaf in stored.items()}


def bind(tensor_map: TensorMap, config: ModelConfig) -> list[BoundRule]:
    """Return the rules that make up a model, each of its parameters in one of them.

    Raises:
      Inexpressible: a parameter has no name in this family.
    """
    # A parameter is removed once a rule has it: none is converted twice, and what is left has no tensor.
    remaining = logical_shapes(config)
    bound_rules = []
    scopes = [("", "", tensor_map.around)]
    scopes += [
        (f"layers/{layer}/", tensor_map.prefix.format(i=layer), tensor_map.layer_rules(block))
        for layer, block in enumerate(config.blocks())
    ]
    for our_prefix, their_prefix, rules in scopes:
        for rule in rules:
            ours = [our_prefix + name for name in rule.ours]
            # One map serves models with and without, say, biases: skip rules whose parameters are absent.
            if not all(name in remaining for name in ours):
                continue
            shapes = [remaining.pop(name) for name in ours]
            num_experts = shapes[0][0]
            theirs = [
                their_prefix + name
                for pattern in rule.theirs
                for name in _expand_experts(pattern, num_experts)
            ]
            bound_rules.append(BoundRule(rule=rule, ours=ours, theirs=theirs, shapes=shapes))
    if remaining:
        raise Inexpressible(f"it has no tensor for {next(iter(remaining))}")
    return bound_rules


def _expand_experts(pattern: str, num_experts: int) -> Iterator[str]:
    if "{e}" not in pattern:
        yield pattern
        return
    for expert in range(num_experts):
        yield pattern.replace("{e}", str(expert))


def missing_and_extra(
    tensor_map: TensorMap, rules: Sequence[BoundRule], names: set[str]
) -> tuple[list[str], list[str]]:
    """Compare the names of a model's tensors with the rules: those missing and those unexpected, sorted."""
    expected = {name for rule in rules for name in rule.theirs}
    # Old releases store buffers, such as rotary frequencies, next to the parameters.
    extra = (
        name
        for name in names - expected
        if not any(re.fullmatch(pattern, name) for pattern in tensor_map.ignored)
    )
    return sorted(expected - names), sorted(extra)


def local_parameters(
    rules: Sequence[BoundRule], read: Callable[[str], np.ndarray], *, where: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield our parameters by logical path, one rule at a time.

    Args:
      read: reads one of their tensors.
      where: name of the file or directory, for messages.

    Raises:
      ValueError: a tensor's shape does not match the configuration.
    """
    for rule in rules:
        shapes: Shapes = []
        # Only the tensors of one rule are in memory at a time.
        try:
            arrays = [read(name) for name in rule.theirs]
            shapes = [array.shape for array in arrays]
            converted = rule.read(arrays)
        # A rule moves values between dims: of other shapes it may find too few dims, or entries.
        except (ValueError, IndexError) as error:
            what = (
                f"{', '.join(rule.theirs)} of shape {shapes[0]} does not fit {rule.ours[0]}: "
                if shapes
                else ""
            )
            message = f"{what}{error}"
            raise ValueError(message if where in message else f"{where}: {message}") from error
        for name, array, shape in zip(rule.ours, converted, rule.shapes, strict=True):
            # Transposes and reshapes accept any size, so that a wrong width shows only here.
            if array.shape != shape:
                raise ValueError(
                    f"{where}: {rule.theirs[0]} of shape {shapes[0]} gives {name} the shape "
                    f"{array.shape}, but the configuration requires {shape}: weights and configuration "
                    "belong to different models"
                )
            yield name, array


def foreign_tensors(
    rules: Sequence[BoundRule], read: Callable[[str], np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield their tensors by name, one rule at a time; `read` reads one of our parameters."""
    for rule in rules:
        converted = rule.write([read(name) for name in rule.ours])
        yield from zip(rule.theirs, converted, strict=True)


def cast_tensor(name: str, array: np.ndarray, dtype: np.dtype | None) -> np.ndarray:
    """Cast a tensor; None keeps its dtype. Raises ValueError if a value overflows float16."""
    if dtype is None:
        return array
    # bfloat16 and float32 have the same range: only float16 can overflow.
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    # Infinities that were in the tensor before are the model's own, and no overflow.
    if dtype == np.float16 and np.any(np.isinf(cast) & np.isfinite(array)):
        raise ValueError(
            f"{name} has values above {np.finfo(np.float16).max:g}, the largest in float16: export with "
            "--dtype bf16 or f32"
        )
    return cast


def read_settings(
    family: "Family", values: Mapping[str, Any], *, where: str, notes: list[str] | None = None
) -> ModelConfig:
    """Read a foreign configuration as a `ModelConfig`.

    Args:
      where: name of the file, for messages.
      notes: list to which notes for the user are added.

    Raises:
      ConfigError: a setting is missing, not supported, or invalid; the message names the file.
    """
    # Every key must be taken below, or `finish` refuses the file.
    settings = family.settings(values, where=where)
    # Checked first: readers make a list of that many blocks.
    for name in LAYERS:
        if name in values:
            settings.positive(name, 1)
    for name in (*LAYERS, *EXPERTS):
        if isinstance(count := values.get(name), int) and count > LARGEST_COUNT:
            raise ConfigError(f"{where}: {name} is {count:,}: at most {LARGEST_COUNT:,} is supported")
    # The values are anybody's: what they break in a reader is an error of the file, not of ours.
    try:
        model = family.read(settings)
        # All blocks of a stack are in its patterns; there may be thousands of layers.
        for block in dict.fromkeys(block for group in model.stack for block in group.pattern):
            for mixer in innermost(block.mixer):
                if isinstance(mixer, AttentionConfig):
                    # Raises where the heads do not divide the width.
                    mixer.resolved_head_dim(model.layer_dims())
                    check_rotation(mixer, model)
        # Dataclasses take values of any type: reading the model as from a file checks all of them.
        from_json(ModelConfig, to_json(model))
    # An error of the settings has a message for the user already.
    except ConfigError as error:
        if str(error).startswith(where):
            raise
        raise ConfigError(f"{where}: {error}") from error
    except (ValueError, TypeError, ArithmeticError, AttributeError, LookupError) as error:
        raise ConfigError(f"{where} does not describe a valid {family.architecture}: {error}") from error
    # Each expert of each layer has tensors with names of their own.
    num_experts = sum(block.ffn.num_experts for block in model.blocks() if isinstance(block.ffn, MoeConfig))
    if num_experts > MOST_EXPERTS:
        raise ConfigError(
            f"{where}: its layers have {num_experts:,} experts together: at most {MOST_EXPERTS:,} are "
            "supported"
        )
    settings.finish()
    if notes is not None:
        notes += settings.notes
    return model


# Checks of writers ------------------------------------------------------------------------------------------
def expect_kind(value: Any, kind: type[T], what: str) -> T:
    """Return `value` if it is of this class. Raises Inexpressible if not."""
    if not isinstance(value, kind):
        raise Inexpressible(f"{what} is {type(value).__name__}, but must be {kind.__name__}")
    return value


def first_block(model: ModelConfig) -> tuple[AttentionConfig, Any]:
    """Return the attention and feed-forward configs of layer 0, for families whose layers are all alike."""
    block = next(model.blocks())
    return expect_kind(block.mixer, AttentionConfig, "layer 0's mixer"), block.ffn


def attentions(model: ModelConfig) -> list[AttentionConfig]:
    """Return the mixers of all layers. Raises Inexpressible if one is not attention."""
    return [expect_kind(block.mixer, AttentionConfig, "a mixer") for block in model.blocks()]


def with_windows(
    attention: AttentionConfig, ffn: Any, windows: Sequence[int | None], **more: Any
) -> list[BlockConfig]:
    """Return blocks that differ only in their windows; `more` are fields of the `BlockConfig`."""
    return [
        BlockConfig(mixer=dataclasses.replace(attention, window=window), ffn=ffn, **more)
        for window in windows
    ]


def check_rotation(attention: AttentionConfig, model: ModelConfig) -> None:
    """Raise ValueError if the number of rotated dims is odd, or larger than a head."""
    rotated = attention.resolved_rotary_dim(model.layer_dims())
    if rotated and attention.rotary_dim is None and rotated != attention.head_dim:
        raise ValueError(
            f"all {attention.head_dim} dims of a head are rotated, in pairs: the number must be even"
        )


def check_whole_rotation(attention: AttentionConfig) -> None:
    """Raise Inexpressible unless all dims of a head are rotated."""
    # Without positions nothing is rotated, whatever `rotary_dim` is.
    rotated = attention.rotary_dim or attention.head_dim
    if attention.rope_base is not None and rotated != attention.head_dim:
        raise Inexpressible(f"all dims of all heads are rotated, not {rotated} of {attention.head_dim}")


def lookup(supported: Mapping[Any, T], key: Any, what: str) -> T:
    """Return the entry of a key that a format supports. Raises Inexpressible if there is none."""
    if key not in supported:
        raise Inexpressible(
            f"{what} is {getattr(key, 'value', key)!r}, but the format supports only "
            f"{', '.join(str(getattr(k, 'value', k)) for k in supported)}"
        )
    return supported[key]
