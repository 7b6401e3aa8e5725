"""The part of a teacher for each parameter of a smaller student, from the two definitions, without arrays.

    cuts = student_cuts(teacher, student, chosen=(0, 3))
    cuts["layers/1/mixer/query/weight"]   # Cut(source="layers/3/mixer/query/weight", indices=(rows, columns))

Layers are named by logical path on both sides, so the grouping of either model's layers does not matter. A
narrower student takes the leading indices of every dim: of the width, of feed-forward layers, of experts, of
heads. Query heads belong to the key-value head that they read, so they are cut in groups: of each key-value
head that stays, the first query heads stay. The dims of a head are not cut, since they rotate in pairs, each
with its own frequency. A matrix of a layer that keeps one row in r is multiplied by the root of r, since its
outputs are sums of fewer numbers: this lowers the initial loss of a narrower student.

A student with an untied head takes the teacher's head, or the embedding of a teacher with a tied head. A
student with a tied head takes the embedding, and drops the head of a teacher that has one.

Dims: K key-value heads, G query heads of a key-value head, H head dim.
"""

import dataclasses
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from slmjax.models.architecture import BlockConfig, ModelConfig
from slmjax.models.canonical_form import canonical
from slmjax.models.definition import Definition, stored_shapes
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.ffn.moe import MoeConfig
from slmjax.models.mixers.attention import AttentionConfig, OutputGate, QkNorm
from slmjax.models.mixers.latent import LatentAttentionConfig
from slmjax.models.paths import FURTHER, PER_LAYER_PROJECTION, PER_LAYER_TABLE, is_in_layers

log = logging.getLogger(__name__)

EMBEDDING = "embed/table"
HEAD = "head/weight"
PER_LAYER = (PER_LAYER_TABLE, PER_LAYER_PROJECTION)  # columns of every layer, side by side
TABLES = (EMBEDDING, PER_LAYER_TABLE, HEAD)  # a row for each token
KNOWN_PARTS = (AttentionConfig, LatentAttentionConfig, MlpConfig, MoeConfig)  # whose inner dims may be cut

# Settings in which a student may differ from its teacher without a warning: sizes, which are cut, and those
# that only training reads.
_SIZES = (
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "hidden_dim",
    "num_experts",
    "shared_hidden_dim",
    "latent_dim",
    "query_rank",
)
_OF_TRAINING = ("balance", "balance_weight", "bias_rate", "z_weight", "capacity_factor")
_SHARED_SETTINGS = (
    "norm_eps",
    "embed_multiplier",
    "residual_multiplier",
    "logit_multiplier",
    "logit_softcap",
    "loops",
    "per_layer_embeddings",
)

Dim = Int[np.ndarray, "..."]  # the teacher's indices that stay in a dim, ascending


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """The part of a parameter of the teacher that initialises one of the student's."""

    source: str  # logical path in the teacher
    # for each dim; a table has all its rows here, and the vocabularies decide which are taken
    indices: tuple[Dim, ...]
    scale: float = 1.0  # factor of the part


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pair:
    """A layer of the student, and the layer of the teacher that initialises it."""

    index: int
    source: int
    teacher: BlockConfig
    student: BlockConfig
    widths: tuple[ModelConfig, ModelConfig]  # of the teacher and of the student

    @property
    def description(self) -> str:
        return f"layer {self.index} of the student and layer {self.source} of the teacher, its source,"


def student_cuts(teacher: Definition, student: Definition, *, chosen: Sequence[int]) -> dict[str, Cut]:
    """Return the cut for each parameter and buffer of the student, by logical path.

    Buffers that the teacher does not have are left out, and so are modules of `multi_token`. Logs a warning
    where settings differ that change what the same parameters compute (a window, the base of the positions).

    Args:
      teacher: definition of the teacher.
      student: definition of the student.
      chosen: the teacher's layer for each of the student's.

    Raises:
      ValueError: the student has a parameter that the teacher lacks, lacks one that it has, is wider, or has
        another kind of layer.
    """
    if teacher.config.norm_kind is not student.config.norm_kind:
        raise ValueError(
            f"model.norm_kind is {teacher.config.norm_kind.value} in the teacher, whose scales have another "
            f"meaning for {student.config.norm_kind.value}: set it to the same"
        )
    # Layers by number, whatever the groups of either model.
    blocks = list(teacher.config.blocks())
    pairs = [
        _Pair(
            index=index,
            source=source,
            teacher=blocks[source],
            student=block,
            widths=(teacher.config, student.config),
        )
        for index, (source, block) in enumerate(zip(chosen, student.config.blocks(), strict=True))
    ]
    for pair in pairs:
        _check_kinds(pair)
    _warn_of_settings(pairs, teacher.config, student.config)
    teacher_shapes = _shapes(teacher, teacher.params) | _shapes(teacher, teacher.buffers)
    buffers = _shapes(student, student.buffers)
    cuts = {}
    for name, shape in (_shapes(student, student.params) | buffers).items():
        # Modules of further tokens begin afresh: those of another model predict from its own hidden states.
        if name.startswith(FURTHER):
            continue
        pair = pairs[int(name.split("/")[1])] if name.startswith("layers/") else None
        source = name if pair is None else f"layers/{pair.source}/{_within(name)}"
        # An untied head of a student whose teacher ties it.
        source = EMBEDDING if name == HEAD and HEAD not in teacher_shapes else source
        if source in teacher_shapes:
            cuts[name] = Cut(
                source=source,
                indices=_indices(name, source, teacher_shapes[source], shape, pair)
                if name not in PER_LAYER
                else _per_layer_indices(name, teacher_shapes[source], shape, pairs),
                scale=_scale(teacher_shapes[source], shape) if is_in_layers(name) else 1.0,
            )
        # A buffer without a source is initialised as in a new model: it holds no trained values.
        elif name not in buffers:
            raise ValueError(
                f"the student has {name}, and the teacher has no {source} to initialise it from: leave it "
                "out of the student's model"
            )
    _refuse_dropped(teacher_shapes, cuts, pairs)
    return cuts


def _shapes(definition: Definition, params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in stored_shapes(definition.config, params).items()}


def _within(name: str) -> str:
    """Return the path within the layer: layers/3/mixer/query/weight -> mixer/query/weight."""
    return name.split("/", 2)[2]


def _refuse_dropped(teacher_names: Iterable[str], cuts: Mapping[str, Cut], pairs: Sequence[_Pair]) -> None:
    """Raise ValueError if a parameter of the teacher has no counterpart in the student.

    Without one of its parameters a layer computes another function. The head is an exception: a student with
    a tied head uses the embedding instead.
    """
    for name in teacher_names:
        if name.startswith(FURTHER):
            continue
        layer = int(name.split("/")[1]) if name.startswith("layers/") else None
        if layer is None:
            counterparts = [name]
        else:
            counterparts = [f"layers/{pair.index}/{_within(name)}" for pair in pairs if pair.source == layer]
        if missing := [path for path in counterparts if path not in cuts and path != HEAD]:
            raise ValueError(
                f"the teacher has {name}, without which it computes another function, and the student has no "
                f"{missing[0]}: add it to the student's model"
            )


# Kinds and settings -----------------------------------------------------------------------------------------
def _check_kinds(pair: _Pair) -> None:
    """Raise ValueError if the parameters of one layer have no meaning in the other."""
    theirs = pair.teacher
    ours = pair.student
    for part in ("mixer", "ffn"):
        kinds = [type(getattr(block, part)) for block in (theirs, ours)]
        if kinds[0] is not kinds[1]:
            names = ["none" if kind is type(None) else kind.__name__ for kind in kinds]
            raise ValueError(
                f"{pair.description} differ in kind: {part} is {names[1]} here and {names[0]} there; choose "
                "other layers, or another kind"
            )
    for what, values in _same_settings(pair):
        if values[0] != values[1]:
            raise ValueError(
                f"{pair.description} differ in {what}: {_shown(values[1])} here and {_shown(values[0])} "
                "there. Set it to the same"
            )
    if isinstance(theirs.mixer, AttentionConfig) and isinstance(ours.mixer, AttentionConfig):
        groups = [mixer.num_heads // mixer.kv_heads for mixer in (theirs.mixer, ours.mixer)]
        if groups[1] > groups[0]:
            raise ValueError(
                f"layers/{pair.index}/mixer/query/weight has {groups[1]} query heads for each key-value head "
                f"in the student, and that of the teacher's layer {pair.source} has {groups[0]}: take as "
                "many key-value heads as the teacher has, or fewer query heads"
            )


def _same_settings(pair: _Pair) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yield the settings in which the layers must agree, with the teacher's and the student's value."""
    theirs = pair.teacher.mixer
    ours = pair.student.mixer
    yield "the place of their norms", (pair.teacher.norm, pair.student.norm)
    if isinstance(theirs, AttentionConfig) and isinstance(ours, AttentionConfig):
        shapes = [config.layer_dims() for config in pair.widths]
        yield "qk_norm", (theirs.qk_norm, ours.qk_norm)
        yield "output_gate", (theirs.output_gate, ours.output_gate)
        # The dims of a head rotate in pairs, by frequencies that depend on their number: none can be dropped.
        yield (
            "head_dim, which cannot be cut (rotary positions)",
            (theirs.resolved_head_dim(shapes[0]), ours.resolved_head_dim(shapes[1])),
        )
    elif isinstance(theirs, LatentAttentionConfig) and isinstance(ours, LatentAttentionConfig):
        for name in ("plain_dim", "rope_dim", "value_dim"):
            yield f"{name}, which cannot be cut", (getattr(theirs, name), getattr(ours, name))


def _shown(value: Any) -> Any:
    return getattr(value, "value", value)


def _warn_of_settings(pairs: Sequence[_Pair], teacher: ModelConfig, student: ModelConfig) -> None:
    """Log a warning for settings that differ and that no parameter shows.

    An explicit default is no difference.
    """
    # In canonical form, in which defaults are written out.
    teacher = canonical(teacher)
    student = canonical(student)
    blocks = [list(config.blocks()) for config in (teacher, student)]
    differing: dict[tuple[str, Any, Any], list[str]] = {}
    for name in _SHARED_SETTINGS:
        differing.setdefault((name, getattr(teacher, name), getattr(student, name)), [])
    for pair in pairs:
        theirs_block = blocks[0][pair.source]
        our_block = blocks[1][pair.index]
        parts = [(theirs_block.mixer, our_block.mixer), (theirs_block.ffn, our_block.ffn)]
        settings = [("num_loops", theirs_block.num_loops, our_block.num_loops)] + [
            (field.name, getattr(theirs, field.name), getattr(ours, field.name))
            for theirs, ours in parts
            if theirs is not None
            for field in dataclasses.fields(theirs)
            if field.name not in (*_SIZES, *_OF_TRAINING)
        ]
        for setting in settings:
            differing.setdefault(setting, []).append(str(pair.index))
    for (name, theirs, ours), layers in differing.items():
        if theirs != ours:
            where = f" of layer {', '.join(layers)}" if layers else ""
            change = f"{name}{where} is {_shown(ours)}, and was {_shown(theirs)} in the teacher"
            log.warning("init: %s: its parameters were not trained for that", change)


# Indices ----------------------------------------------------------------------------------------------------
def _indices(
    name: str, source: str, theirs: tuple[int, ...], ours: tuple[int, ...], pair: _Pair | None
) -> tuple[Dim, ...]:
    """Return the teacher's indices that stay, for each dim.

    Raises ValueError for a student that is wider, or that is narrower inside a part of an unknown kind.
    """
    # The vocabularies decide about the rows of a table, after it is read.
    if name in TABLES:
        ours = (theirs[0], *ours[1:])
    dims = [np.arange(min(sizes)) for sizes in zip(theirs, ours, strict=True)]
    if pair is not None and (unusual := _unusual_dims(pair).get(_within(name))) is not None:
        dims[unusual[0]] = unusual[1]
    if tuple(map(len, dims)) != ours:
        raise ValueError(
            f"{name} is {list(ours)} in the student, and {source} of the teacher is {list(theirs)}: a "
            "student is cut out of its teacher, and cannot be wider than it. Make it narrower, or start from "
            "fresh parameters"
        )
    if pair is not None:
        part = getattr(pair.student, _within(name).split("/")[0], None)
        widths = tuple(config.embed_dim for config in pair.widths)
        # Dims that are neither equal nor the width of the models are inside a part: how they are laid out is
        # known for some kinds only.
        inner = [
            sizes for sizes in zip(theirs, ours, strict=True) if sizes[0] != sizes[1] and sizes != widths
        ]
        if inner and part is not None and type(part) not in KNOWN_PARTS:
            raise ValueError(
                f"{name} is {list(ours)} in the student, and {source} of the teacher is {list(theirs)}: how "
                f"the inside of {type(part).__name__} is cut is not known. Leave its own sizes as the "
                "teacher has them"
            )
    return tuple(dims)


def _per_layer_indices(
    name: str, theirs: tuple[int, ...], ours: tuple[int, ...], pairs: Sequence[_Pair]
) -> tuple[Dim, ...]:
    """Return the teacher's indices in an array whose columns are those of all layers, side by side."""
    teacher, student = (config.per_layer_embeddings for config in pairs[0].widths)
    assert teacher is not None and student is not None
    if student.dim > teacher.dim or (name not in TABLES and ours[0] > theirs[0]):
        raise ValueError(
            f"{name} is {list(ours)} in the student, and {list(theirs)} in the teacher: a student is cut out "
            "of its teacher, and cannot be wider than it"
        )
    rows = np.arange(theirs[0] if name in TABLES else ours[0])
    columns = [pair.source * teacher.dim + np.arange(student.dim) for pair in pairs]
    return rows, np.concatenate(columns)


def _scale(theirs: tuple[int, ...], ours: tuple[int, ...]) -> float:
    """Return the factor that keeps the variance of outputs of a matrix [..., in, out] with fewer inputs."""
    # Vectors are no sums over inputs.
    return math.sqrt(theirs[-2] / ours[-2]) if len(ours) > 1 else 1.0


def _unusual_dims(pair: _Pair) -> dict[str, tuple[int, Dim]]:
    """Return the dims of a mixer's parameters that are not cut by leading indices, by path in the layer.

    The values are the number of the dim and the indices that stay.
    """
    theirs = pair.teacher.mixer
    ours = pair.student.mixer
    if isinstance(theirs, AttentionConfig) and isinstance(ours, AttentionConfig):
        # [K, G] query heads of the teacher: the first heads of each key-value head that stays.
        heads = (
            np.arange(theirs.num_heads)
            .reshape(theirs.kv_heads, -1)[: ours.kv_heads, : ours.num_heads // ours.kv_heads]
            .reshape(-1)
        )
        head_dim = theirs.resolved_head_dim(pair.widths[0].layer_dims())
        # [D, K * G * H], cut as [D, K, G, H]
        queries = (heads[:, None] * head_dim + np.arange(head_dim)).reshape(-1)
        normed = {
            f"mixer/query_norm/{name}": (0, queries)
            for name in ("scale", "bias")
            if theirs.qk_norm is QkNorm.ALL_HEADS
        }
        projections = {
            "mixer/query/weight": (1, queries),
            "mixer/query/bias": (0, queries),
            "mixer/output/weight": (0, queries),
        }
        gates = heads if theirs.output_gate is OutputGate.PER_HEAD else queries
        gating = {"mixer/output_gate/weight": (1, gates), "mixer/output_gate/bias": (0, gates)}
        return projections | normed | gating | {"mixer/sinks": (0, heads)}
    if isinstance(theirs, LatentAttentionConfig) and isinstance(ours, LatentAttentionConfig):
        # The latent, then the one rotated key.
        columns = np.concatenate(
            [
                np.arange(min(ours.latent_dim, theirs.latent_dim)),
                theirs.latent_dim + np.arange(theirs.rope_dim),
            ]
        )
        return {"mixer/latent_down/weight": (1, columns), "mixer/latent_down/bias": (0, columns)}
    return {}
