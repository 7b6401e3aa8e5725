"""Teachers beside a run: frozen models that read the student's batches and hand over hidden states and heads,
not logits.

    plans = plan_teachers(distill, student, sequence_length=256, mesh=mesh, tokenizer=tokenizer)   # reads
    settings alone teachers = Teachers(plans, num_parts=1)
    # loads the arrays outputs = teachers(batch)
    # jitted calls of their own

A teacher is in no optimizer, average or checkpoint, and has no gradient: it is no part of the train step,
which is only given what it says. It has its own precision and, where asked for, a mesh of its own, over the
same devices or over others; on others it reads the next batch while the student still learns from the last,
because calls are only queued.

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
from slmjax.checkpoints.loading import Loaded, inference_definition, read_config, read_parameters
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
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherPlan:
    """All of a teacher but its arrays."""

    settings: TeacherConfig
    definition: Definition  # with its own formats, where it has any: `kept` decodes
    mesh: Mesh  # where it computes
    student_mesh: Mesh  # where what it says is wanted
    num_rows: int  # of the student's table
    vocab_size: int  # tokens that both have: rows behind them are padding
    overlap: int  # of its windows, where rows are longer than its context

    @property
    def dtype(self) -> Any:
        """In what it computes."""
        return self.definition.config.layer_shape().dtype

    def kept(self, params: Params) -> Params:
        """Its parameters as they are kept: matrices in the dtype of the computation, which rounds them
        anyway.
        """

        def cast(path: str, leaf: Array) -> Array:
            dims = leaf.ndim - path.startswith("segments/")
            return leaf.astype(self.dtype) if dims > 1 and "/router/" not in path else leaf

        return {path: cast(path, leaf) for path, leaf in self.definition.effective(params).items()}

    def hidden(
        self,
        params: Params,
        buffers: Params,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
    ) -> Float[Array, "B T E"]:
        """Its final hidden states of some rows."""
        model = self.definition.merge_effective(params, buffers)

        def run(tokens: Array, segment_ids: Array, positions: Array) -> Array:
            return model(tokens, segment_ids=segment_ids, positions=positions).hidden

        length = self.definition.config.context_length
        return windowed(run, tokens, segment_ids, positions, context_length=length, overlap=self.overlap)

    def head(self, params: Params, buffers: Params) -> losses.Head:
        """Its head, with as many rows as the student's table has."""
        head = losses.fit_rows(self.definition.merge_effective(params, buffers).make_head(), self.num_rows)
        return dataclasses.replace(head, vocab_size=self.vocab_size)

    def kept_shapes(self) -> Params:
        """Shapes, dtypes and shardings of its parameters as they are kept."""
        kept = jax.eval_shape(self.kept, self.definition.params)
        return shapes_with_shardings(kept, parameter_shardings(kept, self.mesh))

    def output_shapes(self, batch_size: int, length: int) -> losses.TeacherOutput:
        """What it hands over for a batch: shapes, dtypes and shardings."""
        shape = (batch_size, length, self.definition.config.embed_dim)
        place = named_sharding(HIDDEN, shape, self.student_mesh)
        head = jax.eval_shape(
            self.head, jax.eval_shape(self.kept, self.definition.params), self.definition.buffers
        )
        head = shapes_with_shardings(head, _head_places(head, self.student_mesh))
        return losses.TeacherOutput(hidden=jax.ShapeDtypeStruct(shape, self.dtype, sharding=place), head=head)


HIDDEN = ("batch", "time", None)


def _head_places(head: losses.Head, mesh: Mesh) -> losses.Head:
    return jax.tree.map(
        lambda leaf: NamedSharding(mesh, partition_spec("head/weight", leaf.shape, mesh)), head
    )


# Before anything is loaded ----------------------------------------------------------------------------------
def divided_devices(distill: DistillConfig | None, devices: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The student's devices and the teachers': all of them for both, or those that the teachers have for
    themselves.

    Raises:
      ValueError: the teachers would leave the student none, or there are several hosts.
    """
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
    """The teachers of a student, from their settings and vocabularies alone.

    Args:
      student: its config, with a vocabulary size.
      sequence_length: tokens of a row.
      mesh: the student's.
      teacher_mesh: the teachers', which may be the same.
      tokenizer: the student's; None: not compared, for plans without text.

    Raises:
      ValueError: a teacher's directory, context or vocabulary does not fit, with the way out.
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
        config = dataclasses.replace(config, precision=settings.precision or student.precision, dropout=0.0)
        length = config.context_length
        if length < sequence_length and distill.short_context is ShortContext.REFUSE:
            raise ValueError(
                f"the teacher {path} reads {length} tokens at most, and rows have "
                f"data.sequence_length={sequence_length}: shorten them, "
                "or have it read them in windows with "
                f"objective.distill.short-context={ShortContext.WINDOW.value}"
            )
        vocab_size = min(student.known_vocab_size, config.known_vocab_size)
        if tokenizer is not None:
            _check_vocabulary(tokenizer, path)
            vocab_size = min(vocab_size, tokenizer.vocab_size)
        overlap = default_overlap(length) if distill.overlap is None else distill.overlap
        if length < sequence_length:
            num_windows(
                sequence_length, context_length=length, overlap=overlap
            )  # or an error, before anything is read or written
        plans.append(
            TeacherPlan(
                settings=settings,
                definition=inference_definition(path, config, step=settings.step),
                mesh=teacher_mesh,
                student_mesh=mesh,
                num_rows=student.table_rows,
                vocab_size=vocab_size,
                overlap=overlap,
            )
        )
    return tuple(plans)


def _check_vocabulary(tokenizer: Tokenizer, path: Path) -> None:
    """Refuses a teacher that means other tokens by the same ids; how many rows of padding a model has is its
    own affair.
    """
    if not (path / "tokenizer").is_dir():
        raise ValueError(
            f"the teacher {path} has no tokenizer to compare with the student's: import it again with "
            "--tokenizer FILE"
        )
    other = Tokenizer.load(path / "tokenizer")
    if (id := tokenizer.differs_at(other)) is not None:
        raise ValueError(
            f"token {id} is {tokenizer.name_of(id)!r} to the student and {other.name_of(id)!r} to the "
            f"teacher {path}: they must have the "
            f"same tokens. Give the experiment the teacher's, FileTokenizer(path='{path / 'tokenizer'}'), as "
            "--teacher does"
        )


# The teachers -----------------------------------------------------------------------------------------------
class Teachers:
    """Loaded teachers: called with a batch, they give what they say of it."""

    def __init__(self, plans: Sequence[TeacherPlan], *, num_parts: int) -> None:
        """Loads their arrays. Batches are read in `num_parts` parts, one after the other, as the student
        does.
        """
        self.plans = tuple(plans)
        self._num_parts = num_parts
        loaded = [_load(plan) for plan in self.plans]
        self._arrays = [arrays for arrays, _ in loaded]
        self._heads = [head for _, head in loaded]
        self._calls = [
            jax.jit(functools.partial(_in_parts, plan), static_argnames="num_parts") for plan in self.plans
        ]

    def __call__(self, batch: Batch, *, in_parts: bool = True) -> tuple[losses.TeacherOutput, ...]:
        """Hidden states of a placed batch, placed like it, and heads.

        Args:
          in_parts: whether the batch is one of training, which is read in parts.
        """
        rows = (batch.tokens, batch.segment_ids, batch.positions)
        found = []
        for plan, arrays, head, call in zip(self.plans, self._arrays, self._heads, self._calls, strict=True):
            given = rows
            if plan.mesh is not plan.student_mesh:
                given = jax.device_put(rows, named_sharding(HIDDEN[:2], batch.tokens.shape, plan.mesh))
            with jax.set_mesh(plan.mesh):
                hidden = call(*arrays, *given, num_parts=self._num_parts if in_parts else 1)
            if plan.mesh is not plan.student_mesh:
                hidden = jax.device_put(hidden, named_sharding(HIDDEN, hidden.shape, plan.student_mesh))
            found.append(losses.TeacherOutput(hidden=hidden, head=head))
        return tuple(found)


def load_teacher(path: Path, student: Loaded) -> Teachers:
    """A teacher to compare a trained model with, on one device; in windows, if its context is the shorter.

    Warns where the teacher was trained on text that the student holds out. Raises what `plan_teachers` does.
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
    return Teachers(plans, num_parts=1)


def _load(plan: TeacherPlan) -> tuple[tuple[Params, Params], losses.Head]:
    """A teacher's arrays on its mesh, and its head on the student's."""
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
        # No shardings are asked for: what does not change is then not copied, and what does stays where it
        # is.
        params = jax.jit(plan.kept)(params)
        head = jax.jit(plan.head)(params, buffers)
        if mesh is plan.student_mesh:
            head = _placed_head(head, mesh)
    if mesh is not plan.student_mesh:
        return (params, buffers), jax.device_put(head, _head_places(head, plan.student_mesh))
    # Hidden states need no free head: it is not kept a second time.
    return (
        {path: head.weight if path == "head/weight" else leaf for path, leaf in params.items()},
        buffers,
    ), head


def _placed_head(head: losses.Head, mesh: Mesh) -> losses.Head:
    """A head whose table may have other rows than the teacher's, and so another place: moved once, here, and
    not in every step.

    From columns to rows it goes by way of both, which devices do by exchanging parts; straight on, each would
    hold the whole table.
    """
    places = _head_places(head, mesh)
    if head.weight.sharding.is_equivalent_to(places.weight, head.weight.ndim):
        return head
    move = jax.jit(
        lambda table: communication.constrain(table, ("vocab", "embed")), out_shardings=places.weight
    )
    return dataclasses.replace(head, weight=move(head.weight))


def _in_parts(
    plan: TeacherPlan, params: Params, buffers: Params, *rows: Array, num_parts: int
) -> Float[Array, "B T E"]:
    if num_parts == 1:
        return communication.constrain(plan.hidden(params, buffers, *rows), HIDDEN)
    parts = tuple(communication.split_microbatches(array, num_microbatches=num_parts) for array in rows)
    return communication.join_microbatches(
        jax.lax.map(lambda part: plan.hidden(params, buffers, *part), parts)
    )
