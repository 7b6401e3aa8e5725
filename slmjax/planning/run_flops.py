"""FLOPs of a whole training, counted from the train step of the experiment.

    training_flops(experiment, vocab_size=4096)    # of all steps, teachers included

The step is traced with its real shapes, optimizer, formats and losses, and nothing is computed. It is traced
in its reference form: one device, no rematerialization, and none of the kernels that a platform has for
itself. So the count is a property of the training, the same on any machine, and differs from the work that a
device does: recomputation and the padding of blocks are left out.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from slmjax.checkpoints.run_checkpoints import CheckpointConfig
from slmjax.config import fingerprint
from slmjax.data.batch import empty_batch
from slmjax.data.config import DataConfig
from slmjax.data.tokenizers import ByteTokenizer
from slmjax.distill.teachers import TeacherPlan
from slmjax.models.architecture import Remat
from slmjax.parallel.batches import batch_shapes
from slmjax.parallel.mesh import MeshConfig, make_mesh
from slmjax.planning import flops
from slmjax.quantization.rules import phase_at
from slmjax.training.experiment import EvalConfig, Experiment, RunConfig, Scratch
from slmjax.training.programs import make_programs, resolved_phases, teacher_plans

REFERENCE = "reference"  # a platform without kernels of its own

# FLOPs of a step by `program_key`: the arms of a study share programs, and a search asks again and again.
_step_flops: dict[tuple[Any, ...], float] = {}


def training_flops(experiment: Experiment, *, vocab_size: int) -> float:
    """Return the FLOPs of all steps of a run: forward, backward, optimizer, and forward of teachers.

    Evaluations are left out. Products and convolutions count, with two operations for each pair of factors
    (`flops.count`).

    Raises:
      ValueError: the settings do not fit each other.
    """
    total = 0.0
    for stretch in stretches(experiment):
        step = step_flops(
            experiment, vocab_size=vocab_size, step=stretch.first, with_teachers=stretch.has_teachers
        )
        total += stretch.num_steps * step
    return total


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stretch:
    """Steps of a run that are one program."""

    first: int  # a step of them
    num_steps: int
    has_teachers: bool


def stretches(experiment: Experiment) -> Iterator[Stretch]:
    """Yield the programs of a run: one for each quantization phase, with and without teachers."""
    steps = experiment.run.steps
    begins = sorted({0, *(phase.step for phase in resolved_phases(experiment))})
    for begin, end in zip(begins, [*begins[1:], steps], strict=True):
        taught = _num_taught(experiment, begin, end)
        for has_teachers, num_steps in ((True, taught), (False, end - begin - taught)):
            if num_steps:
                yield Stretch(first=begin, num_steps=num_steps, has_teachers=has_teachers)


def _num_taught(experiment: Experiment, begin: int, end: int) -> int:
    """Return the steps of a range whose loss needs the teachers."""
    distill = experiment.objective.distill
    if distill is None or distill.weight.is_zero:
        return 0
    if distill.weight.is_constant:
        return end - begin
    steps = experiment.run.steps
    return sum(distill.uses_teachers(step, total_steps=steps) for step in range(begin, end))


def step_flops(experiment: Experiment, *, vocab_size: int, step: int, with_teachers: bool) -> float:
    """Return the FLOPs of the train step after `step` steps, and of its teachers' forward pass."""
    key = (*program_key(experiment, vocab_size=vocab_size, step=step), with_teachers)
    if key not in _step_flops:
        _step_flops[key] = _count_step(
            experiment, vocab_size=vocab_size, step=step, with_teachers=with_teachers
        )
    return _step_flops[key]


def program_key(experiment: Experiment, *, vocab_size: int, step: int) -> tuple[str, int, int | None]:
    """Return what the operations of a step depend on; equal keys are equal programs up to constants.

    Seeds, learning rates, the length of the run and the text do not change the operations of a step.
    """
    optim = experiment.optim
    quant = experiment.quant
    data = experiment.data
    plain = dataclasses.replace(
        experiment,
        init=Scratch(),
        data=DataConfig(sequence_length=data.sequence_length, batch_size=data.batch_size),
        tokenizer=ByteTokenizer(),
        eval=EvalConfig(overlap=0),
        checkpoint=CheckpointConfig(),
        run=RunConfig(),
        optim=dataclasses.replace(
            optim, lr=1.0, muon_lr=1.0, scale_lr=None if optim.scale_lr is None else 1.0, warmup_steps=0
        ),
        quant=None if quant is None else dataclasses.replace(quant, start_step=0),
    )
    phases = resolved_phases(experiment)
    phase = phase_at(phases, step)
    return fingerprint(plain), vocab_size, None if phase is None else phases.index(phase)


def _count_step(experiment: Experiment, *, vocab_size: int, step: int, with_teachers: bool) -> float:
    experiment = _on_one_device(experiment)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    data = experiment.data
    # The platform of the mesh that is set chooses the implementations while the step is traced.
    with jax.sharding.use_abstract_mesh(_reference_mesh(mesh)):
        programs = make_programs(experiment, vocab_size=vocab_size, mesh=mesh, step=step)
        batch = batch_shapes(empty_batch(data.batch_size, data.sequence_length), mesh)
        plans = teacher_plans(experiment, programs.definition.config, mesh=mesh) if with_teachers else ()
        outputs = tuple(plan.output_shapes(data.batch_size, data.sequence_length) for plan in plans)
        student = _count(programs.train_step, programs.shapes, batch, outputs)
        return student + sum(_teacher_flops(plan, batch) for plan in plans)


def _count(function: Callable[..., Any], *arguments: Any) -> float:
    # Shardings would be those of the device that is here, not of the reference.
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arguments)
    return flops.count(function, *shapes)


def _teacher_flops(plan: TeacherPlan, batch: Any) -> float:
    return _count(
        plan.hidden,
        plan.stored_shapes(),
        plan.definition.buffers,
        batch.tokens,
        batch.segment_ids,
        batch.positions,
    )


def _on_one_device(experiment: Experiment) -> Experiment:
    """Return the experiment without what only changes where and how its step is computed."""
    objective = experiment.objective
    if (distill := objective.distill) is not None:
        distill = dataclasses.replace(distill, mesh=None, devices=None)
        objective = dataclasses.replace(objective, distill=distill)
    return dataclasses.replace(
        experiment,
        # What is computed again in the backward pass is no part of the training itself.
        model=dataclasses.replace(experiment.model, remat=Remat.NONE),
        mesh=MeshConfig(),
        objective=objective,
    )


def _reference_mesh(mesh: Mesh) -> AbstractMesh:
    """Return the mesh with a platform that has no kernels of its own."""
    device: Any = mesh.abstract_mesh.abstract_device
    return AbstractMesh(
        tuple(mesh.shape.values()),
        mesh.axis_names,
        axis_types=mesh.axis_types,
        abstract_device=dataclasses.replace(device, platform=REFERENCE, device_kind=REFERENCE),
    )
