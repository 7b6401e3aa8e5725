"""Experiments that can be trained in one program, and whether that is faster than one after another.

    if share_a_program(a, b):
        pace = population_pays([a, b])              # a few steps of both ways on this device
        print(pace.text())

A GPU or TPU that one small model does not fill computes several at once in little more time. A CPU with few
cores does not: a program for all members then only needs more memory.
"""

import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from slmjax import config as config_io
from slmjax.data.batch import Batch
from slmjax.data.preparation import prepare
from slmjax.distill.teachers import Teachers, split_devices
from slmjax.parallel.batches import place_batch, place_batches
from slmjax.parallel.mesh import ARM, make_mesh, population_mesh
from slmjax.planning.memory import compiled_memory, first_line, is_out_of_memory, size_text
from slmjax.runner.population_loop import stacked_outputs
from slmjax.runner.step_time import random_batch
from slmjax.training.experiment import Experiment
from slmjax.training.optim import OptimConfig
from slmjax.training.population import population_programs
from slmjax.training.programs import Programs, make_programs, resolved_phases, teacher_plans
from slmjax.training.state import TrainState


# Experiments that share a program ---------------------------------------------------------------------------
def share_a_program(a: Experiment, b: Experiment) -> bool:
    """Return whether two experiments may be trained as members of one population.

    They may differ in names, directories, seeds of parameters and data, and in numbers of the step: learning
    rates and their schedule, weight decay, decay of moments and averages, eps, clipping, z-loss. What a
    number turns off altogether, such as `optim.grad_clip=None`, must be off in both.
    """
    return _program_of(a) == _program_of(b) and resolved_phases(a) == resolved_phases(b)


def _program_of(experiment: Experiment) -> Experiment:
    """Return the experiment with the same values for all that members of a population may differ in."""
    optim = experiment.optim
    same = OptimConfig()
    free = ("lr", "min_lr_ratio", "schedule", "warmup_steps", "decay_fraction", "betas", "eps")
    free += ("weight_decay", "muon_lr", "muon_momentum")
    values = {name: getattr(same, name) for name in free}
    # Without one of these, the program has neither its state nor its arithmetic.
    values |= {
        name: None if getattr(optim, name) is None else 0.5 for name in ("grad_clip", "scale_lr", "ema_decay")
    }
    return dataclasses.replace(
        experiment,
        optim=dataclasses.replace(optim, **values),
        objective=dataclasses.replace(experiment.objective, z_loss=0.0),
        data=dataclasses.replace(experiment.data, seed=0),
        run=dataclasses.replace(experiment.run, seed=0, name="run", directory="runs"),
    )


def differences(a: Experiment, b: Experiment) -> str:
    """Name the settings that keep two experiments from sharing a program."""
    pairs = config_io.differences(config_io.to_json(_program_of(a)), config_io.to_json(_program_of(b)))
    return ", ".join(path for path, _ in pairs) or "the steps at which phases of quantization begin"


# Measurement ------------------------------------------------------------------------------------------------
# Below this ratio the difference is that of the measurement, and members in turn need less memory.
LEAST_GAIN = 1.05
MEASURED_SECONDS = 0.3  # of each of the blocks
MOST_STEPS = 100
BLOCKS = 3

# By program, number of members and device: a study asks again for each of its seeds.
_paces: dict[tuple[Any, ...], "Pace"] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pace:
    """Measured pace of members that are trained in turn, and of all of them together."""

    num_members: int
    seconds_in_turn: float  # one step of each member, one after another
    seconds_together: float = math.inf  # one step of all of them in one program; infinite if there is none
    note: str = ""  # why the members cannot be trained together, if so

    @property
    def ratio(self) -> float:
        """Tokens per second together, over those in turn."""
        return self.seconds_in_turn / self.seconds_together

    @property
    def pays(self) -> bool:
        """Return whether the members are to be trained together."""
        return self.ratio >= LEAST_GAIN

    def text(self) -> str:
        """Return the measurement and the choice that follows from it in one sentence."""
        choice = "together" if self.pays else "in turn"
        if self.note:
            return f"{self.num_members} members are trained {choice}: {self.note}"
        return (
            f"{self.num_members} members are trained {choice}: one program for all of them has "
            f"{self.ratio:.2f} times the tokens per second of one after another"
        )


def population_pays(experiments: Sequence[Experiment]) -> Pace:
    """Measure a few steps of a population against as many of its members in turn, on random tokens.

    Both programs are compiled. Before that of the population runs, its memory is estimated as that of its
    members and compared with what the device has.

    Raises:
      ValueError: the settings do not fit each other, the data or the mesh.
    """
    first = experiments[0]
    if len(experiments) < 2 or jax.process_count() > 1:
        note = "there is only one" if len(experiments) < 2 else "several processes train each of them"
        return Pace(num_members=len(experiments), seconds_in_turn=1.0, note=note)
    key = (config_io.fingerprint(_program_of(first)), len(experiments), jax.devices()[0].device_kind)
    if key not in _paces:
        _paces[key] = _measure(experiments)
    return _paces[key]


# Any state, to the one after a step that is not waited for.
Step = Callable[[Any], Any]


def _measure(experiments: Sequence[Experiment]) -> Pace:
    first = experiments[0]
    mesh = make_mesh(first.mesh, split_devices(first.objective.distill, jax.devices())[0])
    vocab_size = prepare(first.data, first.tokenizer).tokenizer.vocab_size
    batch = random_batch(first.data.batch_size, first.data.sequence_length, vocab_size=vocab_size)
    with jax.set_mesh(mesh):
        programs = make_programs(first, vocab_size=vocab_size, mesh=mesh)
        plans = teacher_plans(first, programs.definition.config, mesh=mesh)
        teachers = None
        if plans:
            teachers = Teachers(plans, num_microbatches=first.optim.accumulation_steps)
        alone, memory = _step_alone(programs, batch, teachers, mesh=mesh)
        num_members = len(experiments)
        seconds = _step_seconds([(alone, programs.init(first.run.seed))])[0]
        in_turn = Pace(num_members=num_members, seconds_in_turn=num_members * seconds)
        ours = population_mesh(mesh, num_members=num_members)
        needed = memory * num_members // ours.shape[ARM]
        available = _available_bytes()
        if available is not None and needed > available:
            return dataclasses.replace(
                in_turn,
                note=f"together they need about {size_text(needed)} of memory, and the device has "
                f"{size_text(available)}",
            )
        try:
            together, states = _step_together(experiments, programs, batch, teachers, mesh=ours)
            # In blocks of both, since the pace of a machine may change from one second to the next.
            state = programs.init(first.run.seed)
            seconds, together_seconds = _step_seconds([(alone, state), (together, states)])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return dataclasses.replace(in_turn, note=f"together they ran out of memory ({first_line(error)})")
    return Pace(
        num_members=num_members,
        seconds_in_turn=num_members * seconds,
        seconds_together=together_seconds,
    )


def _step_alone(
    programs: Programs, batch: Batch, teachers: Teachers | None, *, mesh: Mesh
) -> tuple[Step, int]:
    """Return the step of one member, and the memory that it needs on a device."""
    placed = place_batch(batch, mesh)
    outputs = () if teachers is None else teachers(placed)
    jitted: Any = programs.train_step
    compiled = jitted.lower(programs.shapes, placed, outputs).compile()
    plans = () if teachers is None else teachers.plans

    def step(state: TrainState) -> TrainState:
        placed = place_batch(batch, mesh)
        return compiled(state, placed, () if teachers is None else teachers(placed))[0]

    return step, compiled_memory(compiled, programs.shapes, plans).total


def _step_together(
    experiments: Sequence[Experiment],
    programs: Programs,
    batch: Batch,
    teachers: Teachers | None,
    *,
    mesh: Mesh,
) -> tuple[Step, TrainState]:
    """Return the step of all members, and their first state."""
    together = population_programs(programs.step_settings, experiments, shapes=programs.shapes, mesh=mesh)
    member_mesh = programs.shapes.step.sharding.mesh
    batches = [batch] * len(experiments)

    def step(state: TrainState) -> TrainState:
        outputs = ()
        if teachers is not None:
            outputs = stacked_outputs([teachers(place_batch(own, member_mesh)) for own in batches])
        return together.step(state, place_batches(batches, mesh), outputs)[0]

    return step, together.stack([programs.init(experiment.run.seed) for experiment in experiments])


def _step_seconds(steps: Sequence[tuple[Step, Any]]) -> list[float]:
    """Return the seconds of a step of each kind: the least mean of a few blocks of steps."""
    states = [jax.block_until_ready(state) for _, state in steps]
    best = [math.inf] * len(steps)
    counts = [1] * len(steps)
    for _ in range(BLOCKS + 1):
        for kind, (step, _) in enumerate(steps):
            started = time.perf_counter()
            for _ in range(counts[kind]):
                states[kind] = step(states[kind])
            jax.block_until_ready(states[kind])
            mean = (time.perf_counter() - started) / counts[kind]
            best[kind] = min(best[kind], mean)
            counts[kind] = min(max(int(MEASURED_SECONDS / mean), 1), MOST_STEPS)
    return best


def _available_bytes() -> int | None:
    """Return the memory of a device, or that which is free on the host of a CPU; None where it is unknown."""
    device = jax.local_devices()[0]
    if statistics := device.memory_stats():
        return statistics.get("bytes_limit")
    if device.platform != "cpu" or sys.platform != "linux":
        return None
    # Each device of a CPU has a part of the same memory.
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(jax.local_devices())
