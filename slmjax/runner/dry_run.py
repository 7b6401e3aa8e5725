"""`plan_run`: what a run would be, from its settings, its data and a few steps that leave nothing behind.

    plan = plan_run(experiment)      # Plan: parameters, memory, length, FLOPs, time, place
    print(plan.text())

The data is prepared into its cache, as training would. The step is compiled and run on real batches, from the
state that the run would begin with; the state is thrown away, and no run directory is made.
"""

import dataclasses
import math
import shutil
import textwrap
import time
from pathlib import Path
from typing import Any

import jax

from slmjax import config as config_io
from slmjax.data.pipeline import BatchSource
from slmjax.distill.teachers import split_devices
from slmjax.models.zoo import describe
from slmjax.parallel.batches import local_sequences, place_batch
from slmjax.parallel.mesh import make_mesh
from slmjax.planning import device_peaks
from slmjax.planning.memory import StepMemory, compiled_memory, size_text
from slmjax.runner.initial_state import fresh_state
from slmjax.runner.launch import num_parameters
from slmjax.runner.out_of_memory import explaining_out_of_memory
from slmjax.runner.quant_phases import begin_phase, setup_of_phase
from slmjax.runner.setup import Setup, set_up, with_teachers
from slmjax.telemetry.progress import format_seconds
from slmjax.telemetry.run_directory import directory_name
from slmjax.training.experiment import Experiment, with_absolute_paths

MEASURED_STEPS = 2  # after the first, which may take longer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run of an experiment would be."""

    parameters: int  # trained ones
    devices: int
    device_kind: str
    memory: StepMemory  # bytes on each device during a step
    device_memory: int | None  # bytes of each device; None where the backend does not tell
    rows: int  # of the training text
    sequence_length: int
    steps: int
    batch_size: int
    epochs: float
    tokens: int  # of all steps, padding left out
    flops: float  # of all steps, forward and backward, without those of teachers
    step_seconds: tuple[float, ...]  # of the measured steps
    seconds: float  # of all steps, without evaluations and checkpoints
    mfu: float | None  # of the measured steps; None where the peak of the device is not known
    evaluations: int  # on the way, each of a part of the held-out text; one more ends the run
    checkpoints: int
    checkpoint_bytes: int  # of each
    directory: str  # of the run, with the time of its beginning left open
    cache: str  # where the prepared data is

    def text(self) -> str:
        """Return the plan as lines for people."""
        fits = "" if self.device_memory is None else f" of {size_text(self.device_memory)}"
        measured = ", ".join(f"{seconds:.3g} s" for seconds in self.step_seconds)
        mfu = "" if self.mfu is None else f", {self.mfu:.0%} of the peak FLOP/s"
        lines = {
            "parameters": f"{self.parameters:,}",
            "devices": f"{self.devices} ({self.device_kind})",
            "memory": f"on each device {self.memory.text()}{fits}",
            "length": f"{_count(self.steps, 'step')} of {_count(self.batch_size, 'row')} of "
            f"{_count(self.sequence_length, 'token')}: {_count(self.tokens, 'token')}, {self.epochs:.2f} "
            f"epochs of {_count(self.rows, 'row')}",
            "compute": f"{self.flops:.3g} FLOPs",
            "time": f"about {format_seconds(self.seconds)}, at {self.seconds / self.steps:.3g} s a step "
            f"(measured: {measured}{mfu}), and the time of {_count(self.evaluations, 'evaluation')} on the "
            f"way, the last one, and {_count(self.checkpoints, 'checkpoint')} of "
            f"{size_text(self.checkpoint_bytes)}",
            "writes to": self.directory,
            "data": f"prepared in {self.cache}",
        }
        width = max(shutil.get_terminal_size().columns, 40)
        wrapped = (
            # Paths stay in one piece, so that they can be copied.
            textwrap.wrap(text, width - 13, break_long_words=False, break_on_hyphens=False)
            for text in lines.values()
        )
        indented = ("\n".ljust(14).join(parts) for parts in wrapped)
        return "\n".join(f"{name:<13}{text}" for name, text in zip(lines, indented, strict=True))


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def plan_run(experiment: Experiment) -> Plan:
    """Return what a run of an experiment would be.

    Raises:
      ValueError: settings or data that do not fit, as `train` would say.
      memory.OutOfMemory: there is too little, with options that need less.
    """
    experiment = with_absolute_paths(experiment)
    mesh = make_mesh(experiment.mesh, split_devices(experiment.objective.distill, jax.devices())[0])
    dtype = experiment.model.layer_dims().dtype
    peak = device_peaks.peak_flops(jax.devices()[0], dtype, num_devices=mesh.size)
    with jax.set_mesh(mesh):
        setup = set_up(experiment, tokenizer=experiment.tokenizer, mesh=mesh)
        data = setup.experiment.data
        rows = local_sequences(mesh, data.batch_size)
        token_bytes = setup.prepared.tokenizer.token_bytes
        source = BatchSource(setup.prepared.train, data, token_bytes=token_bytes, rows=rows)
        with explaining_out_of_memory(setup, activity=lambda: "training"):
            memory, seconds = _measure(with_teachers(setup), source)
    return _plan(setup, source, memory=memory, step_seconds=seconds, peak=peak)


def _measure(setup: Setup, source: BatchSource) -> tuple[StepMemory, tuple[float, ...]]:
    """Return the memory of the first steps, and the seconds of each of those that are measured."""
    setup = setup_of_phase(setup, 0)
    batch_size = setup.experiment.data.batch_size
    batches = [
        place_batch(source.batch(step), setup.mesh, batch_size=batch_size)
        for step in range(MEASURED_STEPS + 1)
    ]
    state = begin_phase(setup, fresh_state(setup), batches[0])
    teacher_outputs = setup.teacher_outputs(batches[0], 0)
    # Compiled once, for its memory and for its time.
    jitted: Any = setup.programs.train_step
    step = jitted.lower(state, batches[0], teacher_outputs).compile()
    memory = compiled_memory(step, setup.programs.shapes, setup.plans)
    seconds = []
    for index, batch in enumerate(batches):
        started = time.perf_counter()
        state, metrics = step(state, batch, setup.teacher_outputs(batch, index))
        jax.block_until_ready((state.step, metrics))
        seconds.append(time.perf_counter() - started)
    return memory, tuple(seconds[1:])


def _plan(
    setup: Setup,
    source: BatchSource,
    *,
    memory: StepMemory,
    step_seconds: tuple[float, ...],
    peak: float | None,
) -> Plan:
    experiment = setup.experiment
    run = experiment.run
    data = experiment.data
    definition = setup.programs.definition
    positions = data.batch_size * data.sequence_length
    # FLOPs of attention grow with the length, so they are those of the length that is trained.
    config = dataclasses.replace(definition.config, context_length=data.sequence_length)
    step_flops = describe(config).training_flops_per_token * positions
    mean = sum(step_seconds) / len(step_seconds)
    name = directory_name(run.name, config_io.fingerprint(experiment), when="DATE-TIME")
    return Plan(
        parameters=num_parameters(definition),
        devices=setup.mesh.size,
        device_kind=jax.devices()[0].device_kind,
        memory=memory,
        device_memory=(setup.mesh.local_devices[0].memory_stats() or {}).get("bytes_limit"),
        rows=source.num_rows,
        sequence_length=data.sequence_length,
        steps=run.steps,
        batch_size=data.batch_size,
        epochs=run.steps * data.batch_size / source.num_rows,
        tokens=round(run.steps * positions * source.packing_efficiency),
        flops=step_flops * run.steps,
        step_seconds=step_seconds,
        seconds=mean * run.steps,
        mfu=None if peak is None else step_flops / mean / peak,
        evaluations=(run.steps - 1) // experiment.eval.every,
        checkpoints=(run.steps - 1) // experiment.checkpoint.every + 1,
        checkpoint_bytes=_num_bytes(setup.programs.shapes),
        directory=str(Path(run.directory) / name),
        cache=str(data.cache_path),
    )


def _num_bytes(shapes: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
