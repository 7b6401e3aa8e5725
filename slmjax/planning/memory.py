"""Memory that a train step needs on each device, and options that need less, for a run that had too little.

    needed = step_memory(experiment, vocab_size=4096, mesh=mesh)       # StepMemory, in bytes per device
    advice = advise(experiment, vocab_size=4096, mesh=mesh)            # Advice: options, with what each saves
    print(advice.text())

The step is compiled for shapes and never run, so nothing is allocated. The mesh's devices need not be
attached.
"""

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from slmjax.data.batch import empty_batch
from slmjax.distill.teachers import TeacherPlan
from slmjax.models.architecture import Precision, Remat
from slmjax.parallel.batches import batch_shapes
from slmjax.parallel.mesh import batch_divisor, make_mesh
from slmjax.training.experiment import Experiment
from slmjax.training.programs import make_programs, teacher_plans

log = logging.getLogger(__name__)

ADVICE_SECONDS = 120.0  # after which no further change is tried
MAX_MICROBATCHES = 16  # that each microbatch is split into; more of them help little more
MIN_SAVING = 0.01  # of what the step needs: a change that saves less is of no help


class OutOfMemory(RuntimeError):
    """Raised where memory runs out; the message has the size that was needed and options that need less."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is about memory that ran out, on a device or on the host."""
    # XLA has no exception type of its own for this: the text of the error is all there is.
    is_about_memory = any(part in str(error) for part in ("RESOURCE_EXHAUSTED", "Out of memory"))
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and is_about_memory)


# What a step needs ------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes on each device while a step runs."""

    parameters: int  # and buffers
    optimizer: int
    average: int  # of the parameters, where one is kept
    teachers: int = 0  # parameters of teachers, where they share the devices
    temporary: int  # the rest: mostly activations, gradients and logits, and the batch

    @property
    def total(self) -> int:
        """The sum of all of them."""
        return self.parameters + self.optimizer + self.average + self.teachers + self.temporary

    def text(self) -> str:
        """Return the sizes as text."""
        parts = {
            "parameters": self.parameters,
            "optimizer": self.optimizer,
            "averaged parameters": self.average,
            "teachers": self.teachers,
        }
        named = [f"{name} {size_text(size)}" for name, size in parts.items() if size]
        named.append(f"activations, gradients and the rest {size_text(self.temporary)}")
        return f"{size_text(self.total)} ({', '.join(named)})"


def step_memory(experiment: Experiment, *, vocab_size: int, mesh: Mesh) -> StepMemory:
    """Return the memory of the train step, as the compiler reports it.

    Raises:
      ValueError: the settings do not fit each other or the mesh.
      jax.errors.JaxRuntimeError: the compiler itself finds that the devices have too little.
    """
    programs = make_programs(experiment, vocab_size=vocab_size, mesh=mesh)
    batch_size = experiment.data.batch_size
    plans = teacher_plans(experiment, programs.definition.config, mesh=mesh)
    batch = _batch_shapes(experiment, batch_size, mesh)
    # Teachers run before the step and their outputs wait for it, so they are arguments of it.
    arguments = (programs.shapes, batch, *_teacher_output_shapes(plans, experiment, batch_size))
    compiled = _compiled_bytes(programs.train_step, arguments, mesh)
    return _by_purpose(compiled, programs.shapes, plans, resident=())


def evaluation_memory(experiment: Experiment, *, vocab_size: int, mesh: Mesh) -> StepMemory:
    """Return the memory of an evaluation step with the training state in memory. Raises as `step_memory`."""
    programs = make_programs(experiment, vocab_size=vocab_size, mesh=mesh)
    shapes = programs.shapes
    batch_size = experiment.eval.batch_size or experiment.data.batch_size
    plans = teacher_plans(experiment, programs.definition.config, mesh=mesh)
    batch = _batch_shapes(experiment, batch_size, mesh)
    teacher_outputs = _teacher_output_shapes(plans, experiment, batch_size)
    arguments = (shapes.eval_params, shapes.buffers, batch, *teacher_outputs)
    compiled = _compiled_bytes(programs.eval_step, arguments, mesh)
    # Where the averages are evaluated, the parameters are no argument of the step.
    unused_params = () if shapes.ema is None else shapes.params
    return _by_purpose(compiled, shapes, plans, resident=(shapes.optimizer, unused_params))


def _batch_shapes(experiment: Experiment, batch_size: int, mesh: Mesh) -> Any:
    return batch_shapes(empty_batch(batch_size, experiment.data.sequence_length), mesh)


def _teacher_output_shapes(
    plans: Sequence[TeacherPlan], experiment: Experiment, batch_size: int
) -> tuple[Any, ...]:
    """Shapes of the teachers' outputs, where there are teachers; their forward pass is another program."""
    shapes = tuple(plan.output_shapes(batch_size, experiment.data.sequence_length) for plan in plans)
    return (shapes,) if shapes else ()


def compiled_memory(compiled: Any, shapes: Any, plans: Sequence[TeacherPlan]) -> StepMemory:
    """Return the memory of a compiled train step, of a state of these shapes and with these teachers."""
    return _by_purpose(_num_bytes(compiled), shapes, plans, resident=())


def _compiled_bytes(step: Any, arguments: tuple[Any, ...], mesh: Mesh) -> int:
    with jax.set_mesh(mesh):
        return _num_bytes(step.lower(*arguments).compile())


def _num_bytes(compiled: Any) -> int:
    memory = compiled.memory_analysis()
    # Outputs that reuse a donated argument's buffer count once.
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def _by_purpose(compiled: int, shapes: Any, plans: Sequence[TeacherPlan], *, resident: Any) -> StepMemory:
    """Return the bytes of a compiled step, and of resident arrays that are no argument of it, by purpose."""
    state = {
        "parameters": _bytes_on_a_device((shapes.params, shapes.buffers)),
        "optimizer": _bytes_on_a_device(shapes.optimizer),
        "average": _bytes_on_a_device(shapes.ema),
    }
    # Teachers with devices of their own take no memory of the student's.
    shared = [
        plan.stored_shapes()
        for plan in plans
        if set(plan.mesh.devices.flat) & set(plan.student_mesh.devices.flat)
    ]
    # The compiler counts all bytes; what has no name of its own is the rest.
    temporary = compiled + _bytes_on_a_device(resident) - sum(state.values())
    return StepMemory(**state, temporary=temporary, teachers=_bytes_on_a_device(shared))


def _bytes_on_a_device(shapes: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(shapes)
    )


def size_text(size: float) -> str:
    """Return a size as text, in powers of ten: 870 MB, 5.13 GB."""
    unit, factor = next(
        ((unit, factor) for unit, factor in (("GB", 1e9), ("MB", 1e6)) if abs(size) >= factor), ("kB", 1e3)
    )
    value = size / factor
    return f"{value:,.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2}f} {unit}"


# What would need less ---------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """Settings that may need less memory than those of an experiment."""

    settings: Mapping[str, Any]  # by path: {"optim.accumulation_steps": 4}
    price: str = ""  # what differs in the training; empty where results stay the same up to rounding

    @property
    def options(self) -> str:
        """Settings in the form of the command line."""
        shown = {
            path: value.value if isinstance(value, Precision | Remat) else value
            for path, value in self.settings.items()
        }
        return " ".join(f"--{path.replace('_', '-')} {value}" for path, value in shown.items())

    def applied(self, experiment: Experiment) -> Experiment:
        """Return the experiment with these settings. Raises ValueError where they do not fit."""
        groups: dict[str, dict[str, Any]] = {}
        for path, value in self.settings.items():
            group, _, name = path.partition(".")
            groups.setdefault(group, {})[name] = value
        changed = {
            group: dataclasses.replace(getattr(experiment, group), **values)
            for group, values in groups.items()
        }
        return dataclasses.replace(experiment, **changed)


def training_changes(experiment: Experiment, mesh: Mesh, *, is_resumed: bool = False) -> list[Change]:
    """Return changes that may help the train step, likeliest first.

    A resumed run keeps its model, and it keeps averages if it had them.
    """
    data = experiment.data
    optim = experiment.optim
    model = experiment.model
    # Sequences that a device computes at once: the largest part of activations grows with them.
    rows = data.batch_size // optim.accumulation_steps // batch_divisor(mesh)
    most = max((size for size in range(1, MAX_MICROBATCHES + 1) if rows % size == 0), default=1)
    factors = [size for size in dict.fromkeys((2, 4, most)) if 1 < size <= most and rows % size == 0]
    parts = {size: {"optim.accumulation_steps": optim.accumulation_steps * size} for size in factors}
    fewer = {Remat.NONE: (Remat.FULL, Remat.DOTS), Remat.DOTS: (Remat.FULL,), Remat.FULL: ()}[model.remat]
    # Accumulation and remat come first: results stay the same up to rounding, and they cost only time.
    changes = [Change(settings=parts[size]) for size in factors[:1]]
    if not is_resumed and fewer:
        changes += [Change(settings={"model.remat": fewer[0]})]
        changes += [Change(settings={**parts[most], "model.remat": fewer[0]})] if most > 1 else []
    changes += [Change(settings=parts[size]) for size in factors[1:]]
    changes += _mesh_changes(mesh)
    # From here on the training itself may differ, as the price describes.
    changes.append(Change(settings={"data.batch_size": data.batch_size // 2}, price="a smaller batch"))
    if not is_resumed and model.precision is Precision.FLOAT32:
        changes.append(Change(settings={"model.precision": Precision.BFLOAT16}, price="coarser rounding"))
    changes.append(
        Change(settings={"data.sequence_length": data.sequence_length // 2}, price="shorter context")
    )
    if not is_resumed:
        changes += [Change(settings={"model.remat": remat}) for remat in fewer[1:]]
        changes += (
            [Change(settings={"optim.ema_decay": None}, price="no averages")]
            if optim.ema_decay is not None
            else []
        )
    if experiment.objective.chunk_size is None or experiment.objective.chunk_size > 128:
        smaller = 256 if experiment.objective.chunk_size is None else experiment.objective.chunk_size // 2
        changes.append(Change(settings={"objective.chunk_size": smaller}))
    return changes


def evaluation_changes(experiment: Experiment, mesh: Mesh, *, is_resumed: bool = False) -> list[Change]:
    """Return changes that may help an evaluation step, likeliest first."""
    rows = experiment.eval.batch_size or experiment.data.batch_size
    # Below one sequence a device, shapes would be uneven.
    smallest = batch_divisor(mesh)
    sizes = dict.fromkeys(size for size in (rows // 2, smallest) if smallest <= size < rows)
    return [Change(settings={"eval.batch_size": size}) for size in sizes] + _mesh_changes(mesh)


def _mesh_changes(mesh: Mesh) -> list[Change]:
    """Return meshes of the same devices that shard the parameters over more of them."""
    sizes = dict(mesh.shape)
    changes = []
    # Replicas of the parameters are what a data axis costs; under fsdp each device holds its shard alone.
    if sizes["data"] > 1:
        changes.append({"data": 1, "fsdp": sizes["fsdp"] * sizes["data"]})
    # Half of an axis of sequences becomes tensor parallelism, which shards activations too.
    for axis in ("data", "fsdp"):
        if sizes[axis] % 2 == 0:
            changes.append({axis: sizes[axis] // 2, "tensor": sizes["tensor"] * 2})
            break
    return [
        Change(
            settings={
                f"mesh.{axis}": size for axis, size in (sizes | change).items() if size > 1 or axis in change
            }
        )
        for change in changes
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Advice:
    """Options for an experiment whose memory ran out, by what compiling each has shown."""

    needed: StepMemory | str  # or the compiler's error
    helping: tuple[tuple[Change, StepMemory], ...]  # the most saving first
    useless: tuple[Change, ...]  # compiled, and no smaller
    too_large: tuple[tuple[Change, str], ...]  # the compiler failed for these too, with its error
    untried: tuple[Change, ...]  # for lack of time

    def saved(self, memory: StepMemory) -> int | None:
        """Return bytes less than the experiment needs as it is; None where that is not known."""
        return self.needed.total - memory.total if isinstance(self.needed, StepMemory) else None

    def text(self, *, available: int | None = None) -> str:
        """Return a table of options, and what else was learnt; `available` is the memory of a device."""
        what = (
            self.needed.text()
            if isinstance(self.needed, StepMemory)
            else f"more than there is: {self.needed}"
        )
        lines = [
            f"Each device needs {what}" + ("" if available is None else f", and has {size_text(available)}")
        ]
        if self.helping:
            lines += [
                "Options to add, compiled one by one:",
                *_table(self._rows(available)),
            ]
        for name, changes in (
            ("Compiled, of no help", self.useless),
            ("Not tried, for lack of time", self.untried),
        ):
            if changes:
                lines.append(f"{name}: {'; '.join(change.options for change in changes)}")
        lines += [f"Too large as well: {change.options} ({error})" for change, error in self.too_large]
        return "\n".join(lines)

    def _rows(self, available: int | None) -> Iterator[tuple[str, ...]]:
        for change, memory in self.helping:
            saved = self.saved(memory)
            fits = "" if available is None else "fits" if memory.total <= available else "too large"
            yield (
                change.options,
                f"needs {size_text(memory.total)}",
                "" if saved is None else f"{size_text(saved)} less",
                fits,
                change.price,
            )

    def record(self) -> dict[str, Any]:
        """Return the values of a record for the log."""
        needed = (
            self.needed
            if isinstance(self.needed, str)
            else dataclasses.asdict(self.needed) | {"total": self.needed.total}
        )
        changes = [
            {"options": change.options, "total": memory.total, "saved": self.saved(memory)}
            for change, memory in self.helping
        ]
        return {"needed": needed, "changes": changes}


def _table(rows: Iterator[tuple[str, ...]]) -> list[str]:
    lines = list(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  "
        + "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True) if width).rstrip()
        for row in lines
    ]


Measure = Callable[..., StepMemory]


def advise(
    experiment: Experiment,
    *,
    vocab_size: int,
    mesh: Mesh,
    measure: Measure = step_memory,
    changes: Sequence[Change] | None = None,
    seconds: float = ADVICE_SECONDS,
) -> Advice:
    """Compile the step as it is and with one change after the other, until `seconds` have passed."""
    # A program may compile for a minute, so there is a limit of time; the likeliest changes come first.
    started = time.monotonic()
    measured = functools.partial(_measured, measure, vocab_size=vocab_size, mesh=mesh)
    needed = measured(experiment)
    waiting = list(training_changes(experiment, mesh) if changes is None else changes)
    compiled: list[tuple[Change, StepMemory]] = []
    too_large: list[tuple[Change, str]] = []
    while waiting and time.monotonic() - started < seconds:
        change = waiting.pop(0)
        try:
            memory = measured(change.applied(experiment))
        # Settings that do not fit, or that no kernel is written for. The run failed for another reason.
        except Exception as error:
            log.debug("%s: %s", change.options, error)
            continue
        if isinstance(memory, StepMemory):
            compiled.append((change, memory))
        else:
            too_large.append((change, memory))
    helping = []
    useless = []
    for change, memory in compiled:
        # Without the compiler's count for the experiment itself, all that compiles may help.
        if isinstance(needed, str) or needed.total - memory.total > MIN_SAVING * needed.total:
            helping.append((change, memory))
        else:
            useless.append(change)
    return Advice(
        needed=needed,
        helping=tuple(sorted(helping, key=lambda option: option[1].total)),
        too_large=tuple(too_large),
        untried=tuple(waiting),
        useless=tuple(useless),
    )


def _measured(measure: Measure, experiment: Experiment, *, vocab_size: int, mesh: Mesh) -> StepMemory | str:
    """Return what a step needs, or the first line of the compiler's error where that is too much."""
    mesh = make_mesh(experiment.mesh, devices=list(mesh.devices.flat))
    try:
        return measure(experiment, vocab_size=vocab_size, mesh=mesh)
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return first_line(error)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, cut to 300 characters."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
