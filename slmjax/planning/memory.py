"""What a train step needs of each device's memory, and what would need less: for a run that had too little.

    memory = step_memory(experiment, vocab_size=4096, mesh=mesh)   # StepMemory, in bytes per device
    advice = advise(experiment, vocab_size=4096, mesh=mesh)        # options to add, with what each saves
    print(advice.text())

The step is compiled for shapes and never run, so that nothing is allocated; the mesh's devices need not even
be here.
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
MOST_PARTS = 16  # that a batch is cut into, beyond what it is already: more of them help little more
WORTH_SAYING = 0.01  # of what the step needs: a change that saves less does not help


class OutOfMemory(RuntimeError):
    """A run needed more memory than there was; the message says how much, and what needs less."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: a device's, or the machine's."""
    said = str(error)
    is_about_memory = any(part in said for part in ("RESOURCE_EXHAUSTED", "Out of memory"))
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and is_about_memory)


# What a step needs ------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes on each device while a step runs."""

    parameters: int  # and buffers
    optimizer: int
    average: int  # of the parameters, where one is kept
    teachers: int = 0  # parameters of models that are learned from, where they share the devices
    temporary: int  # the rest: activations, gradients and logits above all, and the batch

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.optimizer + self.average + self.teachers + self.temporary

    def text(self) -> str:
        """In words."""
        parts = {
            "parameters": self.parameters,
            "optimizer": self.optimizer,
            "averaged parameters": self.average,
            "teachers": self.teachers,
        }
        named = [f"{name} {size_text(size)}" for name, size in parts.items() if size]
        return f"{size_text(self.total)} ({', '.join(named)}, activations, gradients and the rest {size_text(self.temporary)})"


def step_memory(experiment: Experiment, *, vocab_size: int, mesh: Mesh) -> StepMemory:
    """Of the train step, by the compiler's own account.

    Raises:
      ValueError: the settings do not fit each other or the mesh.
      jax.errors.JaxRuntimeError: the compiler itself says that the devices have too little.
    """
    programs = make_programs(experiment, vocab_size=vocab_size, mesh=mesh)
    rows = experiment.data.batch_size
    plans = teacher_plans(experiment, programs.definition.config, mesh=mesh)
    given = (programs.shapes, _batch_shapes(experiment, rows, mesh), *_said_shapes(plans, experiment, rows))
    return _state_and(_compiled_bytes(programs.train_step, given, mesh), programs.shapes, plans, held=())


def evaluation_memory(experiment: Experiment, *, vocab_size: int, mesh: Mesh) -> StepMemory:
    """Of an evaluation step, while the whole state of training is kept beside it. Raises what `step_memory`
    does.
    """
    programs = make_programs(experiment, vocab_size=vocab_size, mesh=mesh)
    shapes = programs.shapes
    rows = experiment.eval.batch_size or experiment.data.batch_size
    plans = teacher_plans(experiment, programs.definition.config, mesh=mesh)
    given = (_batch_shapes(experiment, rows, mesh), *_said_shapes(plans, experiment, rows))
    evaluated, held = (shapes.params, ()) if shapes.ema is None else (shapes.ema, shapes.params)
    compiled = _compiled_bytes(programs.eval_step, (evaluated, shapes.buffers, *given), mesh)
    return _state_and(compiled, shapes, plans, held=(shapes.optimizer, held))


def _batch_shapes(experiment: Experiment, rows: int, mesh: Mesh) -> Any:
    return batch_shapes(empty_batch(rows, experiment.data.sequence_length), mesh)


def _said_shapes(plans: Sequence[TeacherPlan], experiment: Experiment, rows: int) -> tuple[Any, ...]:
    """What teachers say of a batch, where there are any; their own forward pass is another program."""
    said = tuple(plan.output_shapes(rows, experiment.data.sequence_length) for plan in plans)
    return (said,) if said else ()


def _compiled_bytes(step: Any, arguments: tuple[Any, ...], mesh: Mesh) -> int:
    with jax.set_mesh(mesh):
        found = step.lower(*arguments).compile().memory_analysis()
    return (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
        + found.temp_size_in_bytes
    )


def _state_and(compiled: int, shapes: Any, plans: Sequence[TeacherPlan], *, held: Any) -> StepMemory:
    """The bytes of a compiled step and of what is held beside it, by what they are for."""
    state = {
        "parameters": _bytes_on_a_device((shapes.params, shapes.buffers)),
        "optimizer": _bytes_on_a_device(shapes.optimizer),
        "average": _bytes_on_a_device(shapes.ema),
    }
    shared = [
        plan.stored_shapes()
        for plan in plans
        if set(plan.mesh.devices.flat) & set(plan.student_mesh.devices.flat)
    ]
    temporary = compiled + _bytes_on_a_device(held) - sum(state.values())
    return StepMemory(**state, temporary=temporary, teachers=_bytes_on_a_device(shared))


def _bytes_on_a_device(shapes: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(shapes)
    )


def size_text(size: float) -> str:
    """Bytes for people, in powers of ten: 870 MB, 5.13 GB."""
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
    price: str = ""  # what is another training then; nothing where the numbers stay the same up to rounding

    @property
    def options(self) -> str:
        """As the command line takes them."""
        shown = {
            path: value.value if isinstance(value, Precision | Remat) else value
            for path, value in self.settings.items()
        }
        return " ".join(f"--{path.replace('_', '-')} {value}" for path, value in shown.items())

    def applied(self, experiment: Experiment) -> Experiment:
        """The experiment with these settings. Raises ValueError where they do not fit."""
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
    """What may help the train step, likeliest first. A run that goes on keeps its model, and whether it keeps
    averages.
    """
    data = experiment.data
    optim = experiment.optim
    model = experiment.model
    rows = data.batch_size // optim.accumulation_steps // batch_divisor(mesh)  # a device's, at once
    most = max((size for size in range(1, MOST_PARTS + 1) if rows % size == 0), default=1)
    factors = [size for size in dict.fromkeys((2, 4, most)) if 1 < size <= most and rows % size == 0]
    parts = {size: {"optim.accumulation_steps": optim.accumulation_steps * size} for size in factors}
    fewer = {Remat.NONE: (Remat.FULL, Remat.DOTS), Remat.DOTS: (Remat.FULL,), Remat.FULL: ()}[model.remat]
    found = [Change(settings=parts[size]) for size in factors[:1]]
    if not is_resumed and fewer:
        found += [Change(settings={"model.remat": fewer[0]})]
        found += [Change(settings={**parts[most], "model.remat": fewer[0]})] if most > 1 else []
    found += [Change(settings=parts[size]) for size in factors[1:]]
    found += _mesh_changes(mesh)
    found.append(Change(settings={"data.batch_size": data.batch_size // 2}, price="a smaller batch"))
    if not is_resumed and model.precision is Precision.FLOAT32:
        found.append(Change(settings={"model.precision": Precision.BFLOAT16}, price="coarser rounding"))
    found.append(
        Change(settings={"data.sequence_length": data.sequence_length // 2}, price="shorter context")
    )
    if not is_resumed:
        found += [Change(settings={"model.remat": remat}) for remat in fewer[1:]]
        found += (
            [Change(settings={"optim.ema_decay": None}, price="no averages")]
            if optim.ema_decay is not None
            else []
        )
    if experiment.objective.chunk_size is None or experiment.objective.chunk_size > 128:
        smaller = 256 if experiment.objective.chunk_size is None else experiment.objective.chunk_size // 2
        found.append(Change(settings={"objective.chunk_size": smaller}))
    return found


def evaluation_changes(experiment: Experiment, mesh: Mesh, *, is_resumed: bool = False) -> list[Change]:
    """What may help an evaluation step, likeliest first."""
    rows = experiment.eval.batch_size or experiment.data.batch_size
    smallest = batch_divisor(mesh)
    sizes = dict.fromkeys(size for size in (rows // 2, smallest) if smallest <= size < rows)
    return [Change(settings={"eval.batch_size": size}) for size in sizes] + _mesh_changes(mesh)


def _mesh_changes(mesh: Mesh) -> list[Change]:
    """The same devices, with more of them holding parts of the parameters."""
    sizes = dict(mesh.shape)
    found = []
    if sizes["data"] > 1:
        found.append({"data": 1, "fsdp": sizes["fsdp"] * sizes["data"]})
    for axis in ("data", "fsdp"):
        if sizes[axis] % 2 == 0:
            found.append({axis: sizes[axis] // 2, "tensor": sizes["tensor"] * 2})
            break
    return [
        Change(
            settings={
                f"mesh.{axis}": size for axis, size in (sizes | change).items() if size > 1 or axis in change
            }
        )
        for change in found
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Advice:
    """What was found for an experiment whose memory ran out."""

    needed: StepMemory | str  # or what the compiler said of it
    helping: tuple[tuple[Change, StepMemory], ...]  # the most saving first
    useless: tuple[Change, ...]  # compiled, and no smaller
    too_large: tuple[tuple[Change, str], ...]  # the compiler said that these do not fit either
    untried: tuple[Change, ...]  # for lack of time

    def saved(self, memory: StepMemory) -> int | None:
        """Bytes less than the experiment needs as it is; None where that is not known."""
        return self.needed.total - memory.total if isinstance(self.needed, StepMemory) else None

    def text(self, *, available: int | None = None) -> str:
        """A table of options, and what else was learnt; `available` is what a device has."""
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
                "Options to add, with what was found by compiling each:",
                *_table(self._rows(available)),
            ]
        for name, changes in (
            ("Compiled, of no help", self.useless),
            ("Not tried, for lack of time", self.untried),
        ):
            if changes:
                lines.append(f"{name}: {'; '.join(change.options for change in changes)}")
        lines += [f"Too large as well: {change.options} ({said})" for change, said in self.too_large]
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
        """For the log."""
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
    found = list(rows)
    widths = [max(map(len, column)) for column in zip(*found, strict=True)]
    return [
        "  "
        + "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True) if width).rstrip()
        for row in found
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
    """Compiles the step as it is and with one change after the other, until `seconds` are over."""
    began = time.monotonic()
    measured = functools.partial(_measured, measure, vocab_size=vocab_size, mesh=mesh)
    needed = measured(experiment)
    waiting = list(training_changes(experiment, mesh) if changes is None else changes)
    found: list[tuple[Change, StepMemory]] = []
    too_large: list[tuple[Change, str]] = []
    while waiting and time.monotonic() - began < seconds:
        change = waiting.pop(0)
        try:
            memory = measured(change.applied(experiment))
        # settings that do not fit, or that no kernel is written for: the reason we are here is another
        except Exception as error:
            log.debug("%s: %s", change.options, error)
            continue
        found.append((change, memory)) if isinstance(memory, StepMemory) else too_large.append(
            (change, memory)
        )
    helps = [
        one
        for one in found
        if isinstance(needed, str) or needed.total - one[1].total > WORTH_SAYING * needed.total
    ]
    return Advice(
        needed=needed,
        helping=tuple(sorted(helps, key=lambda one: one[1].total)),
        too_large=tuple(too_large),
        untried=tuple(waiting),
        useless=tuple(one[0] for one in found if one not in helps),
    )


def _measured(measure: Measure, experiment: Experiment, *, vocab_size: int, mesh: Mesh) -> StepMemory | str:
    """What a step needs, or the compiler's words where it says that this is too much."""
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
