"""Teachers of a run: frozen models that read the student's batches and return hidden states and heads.

    plans = plan_teachers(distill, student, sequence_length=256, ...)   # reads settings, no arrays
    teachers = Teachers(plans, num_microbatches=1)                      # loads the arrays
    outputs = teachers(batch)                                           # a jitted call for each teacher

A teacher is in no optimizer, average or checkpoint, and has no gradient: it is not part of the train step,
which only receives its outputs. It has its own precision and, if set, its own mesh, over the same devices or
over others. On other devices it reads the next batch while the student still learns from the last one,
because calls are only queued.

Hidden states are passed and not logits: they are smaller by the factor of the vocabulary over the width, and
the loss computes logits in chunks.

Dims: B rows, T time, E a teacher's width, V rows of the student's table.
"""

import dataclasses
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from slmjax import losses
from slmjax.checkpoints.loading import (
    Loaded,
    inference_definition,
    read_config,
    read_parameters,
    read_quant_phases,
)
from slmjax.data.batch import Batch
from slmjax.data.provenance import overlap_with_own
from slmjax.data.tokenizers import Tokenizer
from slmjax.data.windows import default_overlap
from slmjax.distill.config import DistillConfig, ShortContext, TeacherConfig
from slmjax.distill.windows import num_windows, windowed
from slmjax.models.architecture import ModelConfig
from slmjax.models.definition import Definition
from slmjax.parallel import communication
from slmjax.parallel.mesh import MeshConfig, make_mesh, named_sharding
from slmjax.parallel.rules import parameter_shardings, partition_spec, shapes_with_shardings

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherPlan:
    """A teacher without its arrays."""

    settings: TeacherConfig
    definition: Definition  # with its number formats, if it has any: `stored` dequantizes
    mesh: Mesh  # where it computes
    student_mesh: Mesh  # where its outputs are used
    num_rows: int  # of the student's table
    vocab_size: int  # tokens that both have: rows after them are padding
    overlap: int  # of its windows, where sequences are longer than its context

    @property
    def dtype(self) -> Any:
        """Return the dtype of its computation."""
        return self.definition.config.layer_dims().dtype

    def stored(self, params: dict[str, Any]) -> dict[str, Any]:
        """Return its parameters for use in every step: matrices in the dtype of the computation.

        The computation casts them to this dtype anyway, except those of a router, which stays in float32.
        """

        # Rank within a layer: `segments/` stacks layers in a leading dim.
        def cast(path: str, leaf: Array) -> Array:
            dims = leaf.ndim - path.startswith("segments/")
            return leaf.astype(self.dtype) if dims > 1 and "/router/" not in path else leaf

        return {path: cast(path, leaf) for path, leaf in self.definition.transform(params).items()}

    def hidden(
        self,
        params: dict[str, Any],
        buffers: dict[str, Any],
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
    ) -> Float[Array, "B T E"]:
        """Return its final hidden states, in windows if its context is shorter than the rows."""
        model = self.definition.merge_transformed(params, buffers)

        def run(tokens: Array, segment_ids: Array, positions: Array) -> Array:
            return model(tokens, segment_ids=segment_ids, positions=positions).hidden

        # Identical to a plain call for rows that fit the context.
        length = self.definition.config.context_length
        return windowed(run, tokens, segment_ids, positions, context_length=length, overlap=self.overlap)

    def head(self, params: dict[str, Any], buffers: dict[str, Any]) -> losses.Head:
        """Return its head, with as many rows as the student's table has."""
        head = losses.fit_rows(self.definition.merge_transformed(params, buffers).make_head(), self.num_rows)
        return dataclasses.replace(head, vocab_size=self.vocab_size)

    def stored_shapes(self) -> dict[str, Any]:
        """Return shapes, dtypes and shardings of its stored parameters."""
        stored = jax.eval_shape(self.stored, self.definition.params)
        return shapes_with_shardings(stored, parameter_shardings(stored, self.mesh))

    def output_shapes(self, batch_size: int, length: int) -> losses.TeacherOutput:
        """Return shapes, dtypes and shardings of its output for a batch."""
        shape = (batch_size, length, self.definition.config.embed_dim)
        sharding = named_sharding(HIDDEN, shape, self.student_mesh)
        hidden = jax.ShapeDtypeStruct(shape, self.dtype, sharding=sharding)
        stored = jax.eval_shape(self.stored, self.definition.params)
        head = jax.eval_shape(self.head, stored, self.definition.buffers)
        head = shapes_with_shardings(head, _head_shardings(head, self.student_mesh))
        return losses.TeacherOutput(hidden=hidden, head=head)


HIDDEN = ("batch", "time", None)  # logical dims of hidden states


def _head_shardings(head: losses.Head, mesh: Mesh) -> losses.Head:
    return jax.tree.map(
        lambda leaf: NamedSharding(mesh, partition_spec("head/weight", leaf.shape, mesh)), head
    )


# Before anything is loaded ----------------------------------------------------------------------------------
def split_devices(distill: DistillConfig | None, devices: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Return the student's and the teachers' devices: disjoint if `distill.devices` is set, else all.

    Raises:
      ValueError: no device would be left for the student, or there are several hosts.
    """
    # With a weight of 0 at every step no teacher is loaded, and no device set aside.
    count = None if distill is None or distill.weight.is_zero else distill.devices
    if count is None:
        return list(devices), list(devices)
    if jax.process_count() > 1:
        raise ValueError(
            f"objective.distill.devices={count}: teachers with devices of their own work on one host only, "
            "and there are several"
        )
    if count >= len(devices):
        raise ValueError(
            f"objective.distill.devices={count} leaves the student none of the {len(devices)} device(s): "
            "give it some"
        )
    return list(devices[:-count]), list(devices[-count:])


def plan_teachers(
    distill: DistillConfig,
    student: ModelConfig,
    *,
    sequence_length: int,
    mesh: Mesh,
    teacher_mesh: Mesh,
    tokenizer: Tokenizer | None,
) -> tuple[TeacherPlan, ...]:
    """Return plans for the teachers of a student, from their settings and vocabularies, without arrays.

    Args:
      distill: the teachers and how they are used.
      student: config of the student, with a vocabulary size.
      sequence_length: tokens of a row.
      mesh: mesh of the student.
      teacher_mesh: mesh of the teachers, which may be the same.
      tokenizer: tokenizer of the student; None: vocabularies are not compared, for plans without text.

    Raises:
      ValueError: a teacher's directory, context or vocabulary does not fit; the message says what to change.
    """
    if mesh is not teacher_mesh and jax.process_count() > 1:
        raise ValueError(
            "objective.distill.mesh: teachers with a mesh of their own work on one host only, and there are "
            "several"
        )
    plans = []
    for settings in distill.teachers:
        path = Path(settings.path)
        config = read_config(path)
        # A teacher is evaluated, so it has no dropout.
        config = dataclasses.replace(config, precision=settings.precision or student.precision, dropout=0.0)
        length = config.context_length
        if length < sequence_length and distill.short_context is ShortContext.REFUSE:
            raise ValueError(
                f"the teacher {path} reads {length} tokens at most, and rows have "
                f"data.sequence_length={sequence_length}: reduce it, or let the teacher read rows in windows "
                f"with objective.distill.short-context={ShortContext.WINDOW.value}"
            )
        # A model may have more rows than tokens: rows without a token are padding on both sides.
        vocab_size = min(student.known_vocab_size, config.known_vocab_size)
        if tokenizer is not None:
            _check_vocabulary(tokenizer, path)
            vocab_size = min(vocab_size, tokenizer.vocab_size)
        overlap = default_overlap(length) if distill.overlap is None else distill.overlap
        if length < sequence_length:
            # Raises for an overlap that does not fit, before anything is read or written.
            num_windows(sequence_length, context_length=length, overlap=overlap)
        plans.append(
            TeacherPlan(
                settings=settings,
                definition=inference_definition(path, config, read_quant_phases(path), step=settings.step),
                mesh=teacher_mesh,
                student_mesh=mesh,
                num_rows=student.table_rows,
                vocab_size=vocab_size,
                overlap=overlap,
            )
        )
    return tuple(plans)


def _check_vocabulary(tokenizer: Tokenizer, path: Path) -> None:
    """Raise ValueError for a teacher whose ids stand for other tokens; rows of padding may differ."""
    if not (path / "tokenizer").is_dir():
        raise ValueError(
            f"the teacher {path} has no tokenizer to compare with the student's: import it again with "
            "--tokenizer FILE"
        )
    other = Tokenizer.load(path / "tokenizer")
    if (id := tokenizer.differs_at(other)) is not None:
        raise ValueError(
            f"token {id} is {tokenizer.name_of(id)!r} to the student and {other.name_of(id)!r} to the "
            f"teacher {path}: they must have the same tokens. Set the experiment's tokenizer to the "
            f"teacher's, FileTokenizer(path='{path / 'tokenizer'}'), as --teacher does"
        )


# The teachers -----------------------------------------------------------------------------------------------
class Teachers:
    """Loaded teachers: called with a batch, they return their outputs for it."""

    def __init__(self, plans: Sequence[TeacherPlan], *, num_microbatches: int) -> None:
        """Load the arrays. Training batches are read in as many microbatches as the student's."""
        self.plans = tuple(plans)
        self._num_microbatches = num_microbatches
        loaded = [_load(plan) for plan in self.plans]
        self._arrays = [arrays for arrays, _ in loaded]
        self._heads = [head for _, head in loaded]
        # A jitted call for each teacher, apart from the train step: teachers may run on another mesh.
        self._calls = [
            jax.jit(functools.partial(_in_microbatches, plan), static_argnames="num_microbatches")
            for plan in self.plans
        ]

    def __call__(self, batch: Batch, *, in_microbatches: bool = True) -> tuple[losses.TeacherOutput, ...]:
        """Return hidden states, sharded as the batch is, and heads.

        Args:
          batch: a batch on the student's mesh.
          in_microbatches: read the batch in microbatches, as training does; an evaluation reads it at once.
        """
        num_microbatches = self._num_microbatches if in_microbatches else 1
        outputs = []
        for plan, arrays, head, call in zip(self.plans, self._arrays, self._heads, self._calls, strict=True):
            inputs = (batch.tokens, batch.segment_ids, batch.positions)
            if plan.mesh is not plan.student_mesh:
                inputs = jax.device_put(inputs, named_sharding(HIDDEN[:2], batch.tokens.shape, plan.mesh))
            # Only queued: the host does not wait for the teacher.
            with jax.set_mesh(plan.mesh):
                hidden = call(*arrays, *inputs, num_microbatches=num_microbatches)
            if plan.mesh is not plan.student_mesh:
                hidden = jax.device_put(hidden, named_sharding(HIDDEN, hidden.shape, plan.student_mesh))
            outputs.append(losses.TeacherOutput(hidden=hidden, head=head))
        return tuple(outputs)


def load_teacher(path: Path, student: Loaded) -> Teachers:
    """Return a teacher to compare a trained model with, on one device; in windows, if its context is shorter.

    Logs a warning if the teacher was trained on text that the student holds out.

    Args:
      path: run directory, or directory of an imported model.
      student: the trained model.

    Raises:
      ValueError: the teacher does not fit the student (`plan_teachers`).
    """
    for sentence in overlap_with_own(path, student.path):
        log.warning(sentence)
    teacher = TeacherConfig(path=str(path), precision=read_config(path).precision)
    distill = DistillConfig(teachers=(teacher,), short_context=ShortContext.WINDOW)
    mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
    length = student.config.context_length
    plans = plan_teachers(
        distill,
        student.config,
        sequence_length=length,
        mesh=mesh,
        teacher_mesh=mesh,
        tokenizer=student.tokenizer,
    )
    return Teachers(plans, num_microbatches=1)


def _load(plan: TeacherPlan) -> tuple[tuple[dict[str, Any], dict[str, Any]], losses.Head]:
    """Return a teacher's parameters and buffers on its mesh, and its head on the student's mesh."""
    definition = plan.definition
    mesh = plan.mesh
    like = [
        shapes_with_shardings(tree, parameter_shardings(tree, mesh))
        for tree in (definition.params, definition.buffers)
    ]
    with jax.set_mesh(mesh):
        _, params, buffers = read_parameters(
            Path(plan.settings.path), definition.config, *like, step=plan.settings.step
        )
        # Without out_shardings, arrays that do not change are not copied, and the others stay where they are.
        params = jax.jit(plan.stored)(params)
        head = jax.jit(plan.head)(params, buffers)
        if mesh is plan.student_mesh:
            head = _resharded_head(head, mesh)
    if mesh is not plan.student_mesh:
        return (params, buffers), jax.device_put(head, _head_shardings(head, plan.student_mesh))
    # Hidden states do not need an untied head: the one that the loss uses stands in for it, so that its
    # memory is not taken twice.
    params = {path: head.weight if path == "head/weight" else leaf for path, leaf in params.items()}
    return (params, buffers), head


def _resharded_head(head: losses.Head, mesh: Mesh) -> losses.Head:
    """Return the head with the sharding that the loss needs, so that no step has to move it.

    Its table may have other rows than the teacher's, and so another sharding.
    """
    shardings = _head_shardings(head, mesh)
    if head.weight.sharding.is_equivalent_to(shardings.weight, head.weight.ndim):
        return head
    # From sharded columns to sharded rows by way of both: devices then exchange parts, while the direct way
    # would replicate the table on each of them.
    reshard = jax.jit(
        lambda table: communication.constrain(table, ("vocab", "embed")), out_shardings=shardings.weight
    )
    return dataclasses.replace(head, weight=reshard(head.weight))


def _in_microbatches(
    plan: TeacherPlan, params: dict[str, Any], buffers: dict[str, Any], *rows: Array, num_microbatches: int
) -> Float[Array, "B T E"]:
    if num_microbatches == 1:
        return communication.constrain(plan.hidden(params, buffers, *rows), HIDDEN)
    parts = tuple(
        communication.split_microbatches(array, num_microbatches=num_microbatches) for array in rows
    )
    return communication.join_microbatches(
        jax.lax.map(lambda part: plan.hidden(params, buffers, *part), parts)
    )
