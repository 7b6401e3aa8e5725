"""Time and memory of a training on this device, from a few steps of each of its programs.

    time_training(experiment, vocab_size=4096)     # TrainingTime

The real step is compiled, and runs on random tokens from fresh parameters: neither text nor run directory is
needed. Loading of data, evaluations and checkpoints are left out.
"""

import dataclasses
import statistics
import time
from typing import Any

import jax
import numpy as np

from slmjax.data.batch import Batch, empty_batch
from slmjax.distill.teachers import Teachers, split_devices
from slmjax.parallel.batches import local_sequences, place_batch
from slmjax.parallel.mesh import make_mesh
from slmjax.planning.memory import StepMemory, compiled_memory
from slmjax.planning.run_flops import Stretch, program_key, stretches
from slmjax.training.experiment import Experiment
from slmjax.training.programs import make_programs, teacher_plans
from slmjax.training.state import init_state

MEASURED_STEPS = 5  # after the first, which may take longer

# Times by program: runs that differ in seed or learning rate share it.
_times: dict[tuple[Any, ...], "ProgramTime"] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramTime:
    """One compiled step."""

    step_seconds: float  # median of the measured steps, teachers included
    compile_seconds: float
    memory: StepMemory  # on each device


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingTime:
    """A whole training, as expected from its programs."""

    seconds: float  # of all steps
    compile_seconds: float  # of all programs
    memory: StepMemory  # of the program that needs most

    def per_step(self, steps: int) -> float:
        """Return the mean over the steps of the run."""
        return self.seconds / steps


def time_training(
    experiment: Experiment, *, vocab_size: int, measured_steps: int = MEASURED_STEPS
) -> TrainingTime:
    """Compile the programs of a run, time a few steps of each, and add up the steps of the run.

    Raises:
      ValueError: the settings do not fit each other or the devices here, or a teacher does not exist.
    """
    parts = [
        (stretch, _program_time(experiment, stretch, vocab_size=vocab_size, measured_steps=measured_steps))
        for stretch in stretches(experiment)
    ]
    return TrainingTime(
        seconds=sum(stretch.num_steps * program.step_seconds for stretch, program in parts),
        compile_seconds=sum(program.compile_seconds for _, program in parts),
        memory=max((program.memory for _, program in parts), key=lambda memory: memory.total),
    )


def _program_time(
    experiment: Experiment, stretch: Stretch, *, vocab_size: int, measured_steps: int
) -> ProgramTime:
    key = (
        *program_key(experiment, vocab_size=vocab_size, step=stretch.first),
        stretch.has_teachers,
        measured_steps,
    )
    if key not in _times:
        _times[key] = _measure(experiment, stretch, vocab_size=vocab_size, measured_steps=measured_steps)
    return _times[key]


def _measure(
    experiment: Experiment, stretch: Stretch, *, vocab_size: int, measured_steps: int
) -> ProgramTime:
    mesh = make_mesh(experiment.mesh, split_devices(experiment.objective.distill, jax.devices())[0])
    data = experiment.data
    with jax.set_mesh(mesh):
        programs = make_programs(experiment, vocab_size=vocab_size, mesh=mesh, step=stretch.first)
        config = programs.definition.config
        plans = teacher_plans(experiment, config, mesh=mesh) if stretch.has_teachers else ()
        microbatches = experiment.optim.accumulation_steps
        teachers = Teachers(plans, num_microbatches=microbatches) if plans else None
        state = init_state(
            programs.definition,
            programs.optimizer,
            shapes=programs.shapes,
            seed=experiment.run.seed,
            objective=experiment.objective,
        )
        rows = local_sequences(mesh, data.batch_size)
        local = random_batch(len(rows), data.sequence_length, vocab_size=config.known_vocab_size)
        batch = place_batch(local, mesh, batch_size=data.batch_size)
        outputs = () if teachers is None else teachers(batch)
        jitted: Any = programs.train_step
        started = time.perf_counter()
        step = jitted.lower(state, batch, outputs).compile()
        compile_seconds = time.perf_counter() - started
        seconds = []
        for _ in range(measured_steps + 1):
            started = time.perf_counter()
            outputs = () if teachers is None else teachers(batch)
            state, metrics = step(state, batch, outputs)
            jax.block_until_ready((state.step, metrics))
            seconds.append(time.perf_counter() - started)
        return ProgramTime(
            # The median, since another process may disturb a step.
            step_seconds=statistics.median(seconds[1:]),
            compile_seconds=compile_seconds,
            memory=compiled_memory(step, programs.shapes, plans),
        )


def random_batch(num_rows: int, sequence_length: int, *, vocab_size: int) -> Batch:
    """Return rows of random tokens, each full of one document; also spread over the experts of a mixture."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, vocab_size, (num_rows, sequence_length + 1), dtype=np.int32)
    empty = empty_batch(num_rows, sequence_length)
    return dataclasses.replace(
        empty,
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        loss_mask=np.ones_like(empty.loss_mask),
        segment_ids=np.ones_like(empty.segment_ids),
        positions=np.broadcast_to(np.arange(sequence_length, dtype=np.int32), empty.positions.shape),
        row_ids=np.arange(num_rows, dtype=np.int32),
        num_bytes=np.full_like(empty.num_bytes, sequence_length),
    )
