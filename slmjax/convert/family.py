"""What a family's file is written with: the translation of its configuration, and rules for its tensors.

A rule goes between some of our parameters and some of their tensors, both ways. Ours are matrices [in, out];
most of theirs are [out, in]. Names in a table of a layer are relative to it; `{e}` stands for the number of
an expert.

    TABLE = TensorMap(
        around=(same("embed/table", "model.embed_tokens.weight"), ...),
        layer=(matrix("mixer/query/weight", "self_attn.q_proj.weight"), ...),
    )
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from slmjax.config import ConfigError
from slmjax.convert.settings import Settings
from slmjax.models.architecture import BlockConfig, ModelConfig
from slmjax.models.definition import define, stored_shapes
from slmjax.models.mixers.attention import AttentionConfig

Arrays = list[np.ndarray]
Shapes = list[tuple[int, ...]]
T = TypeVar("T")
LARGEST_COUNT = 4096  # layers, experts: a larger number is a mistake, or malice
LAYERS = ("num_hidden_layers", "n_layer", "block_count")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "expert_count")


class Inexpressible(ValueError):
    """What a format cannot say; the message is the reason."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """Some of our parameters and the tensors they are made of elsewhere."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    read: Callable[[Arrays, Shapes], Arrays]  # theirs, and the shapes of ours -> ours
    write: Callable[[Arrays], Arrays]  # ours -> theirs


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorMap:
    """All tensors of a family. A rule holds where the model has its parameters; the first of several for one
    parameter holds.
    """

    around: tuple[Rule, ...]  # outside the layers
    layer: tuple[Rule, ...]  # of each layer, after the prefix
    prefix: str = "model.layers.{i}."
    # begins the names of what is below the head, and is left out where that was saved alone
    base: str = "model."
    # patterns of tensors that hold nothing of the model
    ignored: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How one family of models is called in one format."""

    architecture: str  # config.json's architectures[0], or GGUF's general.architecture
    read: Callable[[Settings], ModelConfig]
    write: Callable[
        [ModelConfig], dict[str, Any]
    ]  # what it cannot say may be left out: what is read back is compared
    table: (
        TensorMap | Callable[[ModelConfig], TensorMap]
    )  # the table, or what makes it where rules depend on the numbers of heads
    # values of keys that a configuration leaves out
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def table_of(self, model: ModelConfig) -> TensorMap:
        """The table for a model of this family."""
        return self.table if isinstance(self.table, TensorMap) else self.table(model)

    def settings(self, values: Mapping[str, Any], *, where: str) -> Settings:
        """A configuration to read, with the family's defaults."""
        return Settings(values, where=where, defaults=self.defaults)


# Rules ------------------------------------------------------------------------------------------------------
def same(ours: str, theirs: str) -> Rule:
    """A vector or a table of rows, as it is."""
    return Rule(ours=(ours,), theirs=(theirs,), read=lambda arrays, _: arrays, write=lambda arrays: arrays)


def matrix(ours: str, theirs: str) -> Rule:
    """A matrix, transposed."""
    return Rule(
        ours=(ours,),
        theirs=(theirs,),
        read=lambda arrays, _: [arrays[0].T],
        write=lambda arrays: [arrays[0].T],
    )


def linear(ours: str, theirs: str) -> tuple[Rule, Rule]:
    """A linear layer: its matrix, and its bias where it has one."""
    return matrix(f"{ours}/weight", f"{theirs}.weight"), same(f"{ours}/bias", f"{theirs}.bias")


def norm(ours: str, theirs: str) -> tuple[Rule, Rule]:
    """A norm: its scale, and its bias where it has one."""
    return same(f"{ours}/scale", f"{theirs}.weight"), same(f"{ours}/bias", f"{theirs}.bias")


def joined(ours: Sequence[str], theirs: str) -> Rule:
    """Several matrices [in, out] that are one [out, in] there, or several vectors that are one."""

    def read(arrays: Arrays, shapes: Shapes) -> Arrays:
        ends = np.cumsum([shape[-1] for shape in shapes])[:-1]
        return [part.T for part in np.split(arrays[0], ends, axis=0)]

    return Rule(
        ours=tuple(ours),
        theirs=(theirs,),
        read=read,
        write=lambda arrays: [np.concatenate([array.T for array in arrays])],
    )


def experts(ours: str, theirs: str) -> Rule:
    """The matrices of all experts, [E, in, out], of which each is one [out, in] there: `theirs` has `{e}` for
    its number.
    """
    return Rule(
        ours=(ours,),
        theirs=(theirs,),
        read=lambda arrays, _: [np.stack([array.T for array in arrays])],
        write=lambda arrays: [one.T for one in arrays[0]],
    )


def stacked_experts(ours: str, theirs: str) -> Rule:
    """The matrices of all experts, [E, in, out], which are one tensor [E, out, in] there."""

    def turned(arrays: Arrays) -> Arrays:
        return [np.swapaxes(arrays[0], 1, 2)]

    return Rule(ours=(ours,), theirs=(theirs,), read=lambda arrays, _: turned(arrays), write=turned)


def paired(rule: Rule, *, num_heads: int, rope_dim: int) -> Rule:
    """A rule whose outputs are heads with their rotated dims last, where those that are rotated together lie
    side by side.

    Ours have the first of all pairs, then the second.
    """

    def reordered(arrays: Arrays, order: np.ndarray) -> Arrays:
        heads = arrays[0].reshape(*arrays[0].shape[:-1], num_heads, -1)
        plain = np.arange(heads.shape[-1] - rope_dim)
        return [heads[..., np.concatenate([plain, len(plain) + order])].reshape(arrays[0].shape)]

    halves = np.arange(rope_dim).reshape(-1, 2).T.reshape(-1)
    return dataclasses.replace(
        rule,
        read=lambda arrays, shapes: reordered(rule.read(arrays, shapes), halves),
        write=lambda arrays: rule.write(reordered(arrays, np.argsort(halves))),
    )


# The rules of a model ---------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class BoundRule:
    """A rule with the full names of what it goes between."""

    rule: Rule
    ours: list[str]
    theirs: list[str]
    shapes: Shapes  # of ours


def logical_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter and buffer of a model by logical path, with the shape it has in one layer."""
    definition = define(config)
    stored = stored_shapes(config, {**definition.params, **definition.buffers})
    return {path: tuple(leaf.shape) for path, leaf in stored.items()}


def bind(table: TensorMap, config: ModelConfig) -> list[BoundRule]:
    """The rules that make up a model, each of its parameters in one of them.

    Raises:
      Inexpressible: a parameter has no name in this family.
    """
    left = logical_shapes(config)
    bound = []
    scopes = [("", "", table.around)]
    scopes += [
        (f"layers/{layer}/", table.prefix.format(i=layer), table.layer) for layer in range(config.num_layers)
    ]
    for mine, their_prefix, rules in scopes:
        for rule in rules:
            ours = [mine + name for name in rule.ours]
            if not all(name in left for name in ours):
                continue
            own = [left.pop(name) for name in ours]
            theirs = [
                their_prefix + name for pattern in rule.theirs for name in _numbered(pattern, own[0][0])
            ]
            bound.append(BoundRule(rule=rule, ours=ours, theirs=theirs, shapes=own))
    if left:
        raise Inexpressible(f"it has no tensor for {next(iter(left))}")
    return bound


def _numbered(pattern: str, num_experts: int) -> Iterator[str]:
    if "{e}" not in pattern:
        yield pattern
        return
    for expert in range(num_experts):
        yield pattern.replace("{e}", str(expert))


def misnamed(table: TensorMap, bound: Sequence[BoundRule], found: set[str]) -> tuple[list[str], list[str]]:
    """Of the tensors that were found, those that are missing and those that have no place, sorted."""
    wanted = {name for one in bound for name in one.theirs}
    extra = (
        name for name in found - wanted if not any(re.fullmatch(pattern, name) for pattern in table.ignored)
    )
    return sorted(wanted - found), sorted(extra)


def ours_from(
    bound: Sequence[BoundRule], read: Callable[[str], np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Our parameters by logical path, one rule at a time.

    Raises:
      ValueError: a tensor has another shape than the configuration says.
    """
    for one in bound:
        arrays = [read(name) for name in one.theirs]
        try:
            made = one.rule.read(arrays, one.shapes)
        except ValueError as error:
            raise ValueError(
                f"{', '.join(one.theirs)} of shape {arrays[0].shape} does not fit {one.ours[0]}: {error}"
            ) from error
        for name, array, shape in zip(one.ours, made, one.shapes, strict=True):
            if array.shape != shape:
                raise ValueError(
                    f"{one.theirs[0]} of shape {arrays[0].shape} gives {name} the shape {array.shape}, where "
                    "the configuration says "
                    f"{shape}: weights and configuration are of different models"
                )
            yield name, array


def theirs_from(
    bound: Sequence[BoundRule], read: Callable[[str], np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Their tensors by name, one rule at a time."""
    for one in bound:
        made = one.rule.write([read(name) for name in one.ours])
        yield from zip(one.theirs, made, strict=True)


def rounded(name: str, array: np.ndarray, dtype: np.dtype | None) -> np.ndarray:
    """A tensor in another dtype. Raises ValueError where a number is too large for it."""
    if dtype is None:
        return array
    with np.errstate(over="ignore"):
        found = array.astype(dtype)
    if dtype == np.float16 and np.any(np.isinf(found) & np.isfinite(array)):
        raise ValueError(
            f"{name} has numbers above {np.finfo(np.float16).max:g}, the largest of float16: export with "
            "--dtype bf16 or f32"
        )
    return found


def read_settings(
    family: "Family", values: Mapping[str, Any], *, where: str, notes: list[str] | None = None
) -> ModelConfig:
    """The model that a family makes of somebody's settings.

    Args:
      notes: a list to add to, what whoever reads the model should know.

    Raises:
      ConfigError: a setting is missing, not understood, or of no sensible kind; the message names the file.
    """
    settings = family.settings(values, where=where)
    for name in LAYERS:
        if name in values:
            settings.positive(name, 1)
    for name in (*LAYERS, *EXPERTS):
        if isinstance(count := values.get(name), int) and count > LARGEST_COUNT:
            raise ConfigError(f"{where}: {name} is {count:,}, and no model has more than {LARGEST_COUNT:,}")
    try:
        model = family.read(settings)
        for block in model.blocks():
            if isinstance(block.mixer, AttentionConfig):
                check_rotation(block.mixer, model)
    except ConfigError:
        raise
    except (ValueError, TypeError, ZeroDivisionError, AttributeError, OverflowError) as error:
        raise ConfigError(
            f"{where} does not describe a {family.architecture} that can be computed: {error}"
        ) from error
    settings.finish()
    if notes is not None:
        notes += settings.notes
    return model


# Whether a family can say it --------------------------------------------------------------------------------
def expect_kind(value: Any, kind: type[T], what: str) -> T:
    """`value`, if it is of this class. Raises Inexpressible if not."""
    if not isinstance(value, kind):
        raise Inexpressible(f"{what} is {type(value).__name__}, and has to be {kind.__name__}")
    return value


def first_block(model: ModelConfig) -> tuple[AttentionConfig, Any]:
    """Attention and feed-forward layer of the first layer, after which a family of like layers is written."""
    block = next(model.blocks())
    return expect_kind(block.mixer, AttentionConfig, "layer 0's mixer"), block.ffn


def attentions(model: ModelConfig) -> list[AttentionConfig]:
    """The mixers of all layers. Raises Inexpressible where one is no attention."""
    return [expect_kind(block.mixer, AttentionConfig, "a mixer") for block in model.blocks()]


def with_windows(
    attention: AttentionConfig, ffn: Any, windows: Sequence[int | None], **more: Any
) -> list[BlockConfig]:
    """Blocks that differ in their windows alone; `more` are fields of the `BlockConfig`."""
    return [
        BlockConfig(mixer=dataclasses.replace(attention, window=window), ffn=ffn, **more)
        for window in windows
    ]


def check_rotation(attention: AttentionConfig, model: ModelConfig) -> None:
    """Raise ValueError where the rotated dims are an odd number, or more than a head has."""
    rotated = attention.resolved_rotary_dim(model.layer_shape())
    if rotated and attention.rotary_dim is None and rotated != attention.head_dim:
        raise ValueError(
            f"all {attention.head_dim} dims of a head are rotated, in pairs, so that they must be even"
        )


def check_whole_rotation(attention: AttentionConfig) -> None:
    """Raise Inexpressible unless all dims of a head are rotated."""
    rotated = attention.rotary_dim or attention.head_dim
    if attention.rope_base is not None and rotated != attention.head_dim:
        raise Inexpressible(f"all dims of all heads are rotated, and not {rotated} of {attention.head_dim}")


def lookup(table: Mapping[Any, T], key: Any, what: str) -> T:
    """An entry of a table of what a format knows. Raises Inexpressible if there is none."""
    if key not in table:
        raise Inexpressible(
            f"{what} is {getattr(key, 'value', key)!r}, and it knows "
            f"{', '.join(str(getattr(k, 'value', k)) for k in table)}"
        )
    return table[key]
