"""`Population`: the loop over the steps of several runs that are trained in one program.

    population = Population(sessions, signals=signals, progress=progress)
    results = population.run()

Each member has the session and the `Loop` of an ordinary run: its own batches, log, checkpoints and
evaluations. Only the train step is one for all. A member that ends, because it has done its steps or has
diverged, stays in the program, and its part of the state is no longer read.
"""

import collections
import dataclasses
import logging
import operator
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slmjax import faults
from slmjax.data.batch import Batch
from slmjax.losses import TeacherOutput
from slmjax.ownership import require_ownership
from slmjax.parallel.batches import place_batch, place_batches
from slmjax.parallel.mesh import population_mesh
from slmjax.runner import quant_phases
from slmjax.runner.result import Result
from slmjax.runner.session import Session
from slmjax.runner.trainer import STEPS_UNDER_WAY, Loop, finish
from slmjax.stop_signals import StopSignals
from slmjax.telemetry.meter import Meter
from slmjax.telemetry.progress import Progress
from slmjax.telemetry.run_directory import Category
from slmjax.training.population import PopulationPrograms, population_programs
from slmjax.training.state import TrainState

log = logging.getLogger(__name__)


class Population:
    """The members of a population in training, from their sessions to their results.

    Attributes:
      step: of the member that is furthest, for messages.
    """

    def __init__(self, sessions: Sequence[Session], *, signals: StopSignals, progress: Progress) -> None:
        self.loops = [Loop(session, signals) for session in sessions]
        self.results: list[Result | None] = [None] * len(sessions)
        self._signals = signals
        self._progress = progress
        self._mesh = population_mesh(self.loops[0].setup.mesh, num_members=len(sessions))
        self._states: list[TrainState] | None = [session.take_state() for session in sessions]
        self._programs: PopulationPrograms | None = None
        self._batches: list[Batch | None] = [None] * len(sessions)
        # Trained targets of each step, by member, that are not counted yet.
        self._targets: list[jax.Array] = []
        self._under_way: collections.deque[jax.Array] = collections.deque()
        # Tokens of all members, for the pace that is shown.
        self._fed = [0] * len(sessions)
        self._meter = Meter(flops_per_token=0.0, peak_flops=None, tokens=0, waiting=0.0)
        self._busy: int | None = None  # the member that messages are of
        self._parent = os.path.commonpath([loop.telemetry.run.path.parent for loop in self.loops])
        for number, loop in enumerate(self.loops):
            loop.population = len(sessions)
            loop.telemetry.log.write("population", step=loop.step, members=len(sessions), member=number)

    def run(self) -> list[Result]:
        """Train until every member has ended, or a signal comes. Return the results of all."""
        state: TrainState | None = None
        while self.active:
            state, metrics = self._step(state)
            self._after_step(state, metrics)
            require_ownership()
            if self.active and (signal := self._signals.requested()) is not None:
                self._progress.print(f"{signal.name} received after step {self.step}: saving")
                for number in self.active:
                    self._end(number, state, "interrupted")
        return [result for result in self.results if result is not None]

    @property
    def active(self) -> list[int]:
        """Numbers of the members that have not ended."""
        return [number for number, result in enumerate(self.results) if result is None]

    @property
    def step(self) -> int:
        """Steps of the member that is furthest."""
        return max(loop.step for loop in self.loops)

    # Messages -----------------------------------------------------------------------------------------------
    def show(self, text: str) -> None:
        """Print a message, with the member that it is of."""
        self._progress.print(text if self._busy is None else f"{self._name(self._busy)}: {text}")

    def write(self, kind: str, **values: Any) -> None:
        """Write a message to the log of the member that it is of, or to all logs."""
        for number in self.active if self._busy is None else [self._busy]:
            self.loops[number].telemetry.log.write(kind, **values)

    def _name(self, number: int) -> str:
        """Return the run directory of a member, from where those of all members part."""
        return os.path.relpath(self.loops[number].telemetry.run.path, self._parent)

    # A step -------------------------------------------------------------------------------------------------
    def _step(self, state: TrainState | None) -> tuple[TrainState, dict[str, Any]]:
        """Train all members on their next batches; the first step of a session or a phase compiles."""
        active = [self.loops[number] for number in self.active]
        compiles = state is None or any(quant_phases.starts_phase(loop.setup, loop.step) for loop in active)
        if compiles:
            self._progress.print(f"compiling the train step of {len(self.loops)} members")
        with self._timed(Category.DATA):
            batches = self._next_batches()
        with self._timed(Category.COMPILE if compiles else Category.STEP):
            if compiles:
                state = self._begin_phase(state, batches)
            assert state is not None and self._programs is not None
            placed = place_batches(batches, self._mesh)
            state, metrics = self._programs.step(state, placed, self._teacher_outputs(batches))
            self._targets.append(metrics.pop("trained_targets"))
            faults.at("step", self.step + 1)
            if compiles:
                jax.block_until_ready(metrics)
                self._restart_meters()
                # From now on there are steps to save.
                self._signals.defer()
            self._under_way.append(metrics["loss"])
            if len(self._under_way) > STEPS_UNDER_WAY:
                jax.block_until_ready(self._under_way.popleft())
        return state, metrics

    def _next_batches(self) -> list[Batch]:
        for number in self.active:
            batch = next(self.loops[number].batches)
            tokens = int(np.count_nonzero(batch.segment_ids))
            self.loops[number].count_fed(tokens)
            self._fed[number] += tokens
            self._batches[number] = batch
        # A member that has ended is given its last batch again.
        return [batch for batch in self._batches if batch is not None]

    def _begin_phase(self, state: TrainState | None, batches: Sequence[Batch]) -> TrainState:
        """Take the programs of the next step's quantization phase, and the state with which it begins."""
        states = self._states or [self._member(state, number) for number in range(len(self.loops))]
        self._states = None
        state = None
        first = self.loops[self.active[0]]
        for number in self.active:
            loop = self.loops[number]
            if loop is not first:
                programs = first.setup.programs.for_another_run()
                loop.setup = dataclasses.replace(loop.setup, programs=programs)
            placed = place_batch(batches[number], loop.setup.mesh)
            with self._of_member(number):
                states[number] = loop.begin_phase(states[number], placed)
        programs = first.setup.programs
        self._programs = population_programs(
            programs.step_settings,
            [loop.setup.experiment for loop in self.loops],
            shapes=programs.shapes,
            mesh=self._mesh,
        )
        return self._programs.stack(states)

    def _teacher_outputs(self, batches: Sequence[Batch]) -> tuple[TeacherOutput, ...]:
        """Return the outputs of the teachers for the batches of all members, which share the heads."""
        first = self.loops[self.active[0]]
        if first.setup.teachers is None:
            return ()
        outputs = [
            loop.setup.teacher_outputs(place_batch(batch, loop.setup.mesh), first.step)
            for loop, batch in zip(self.loops, batches, strict=True)
        ]
        return stacked_outputs(outputs)

    def _member(self, state: TrainState | None, number: int) -> TrainState:
        assert state is not None and self._programs is not None
        return self._programs.member(state, number)

    # After a step -------------------------------------------------------------------------------------------
    def _after_step(self, state: TrainState, metrics: dict[str, Any]) -> None:
        """Log, evaluate, save and end the members that are due."""
        for number in self.active:
            self.loops[number].step += 1
        self._progress.advance(self.step)
        due = [number for number in self.active if self.loops[number].is_due]
        if not due:
            return
        with self._timed(Category.STEP):
            on_host = jax.device_get(metrics)
            self._count_targets()
        self._show_pace(on_host)
        for number in due:
            loop = self.loops[number]
            own_metrics = jax.tree.map(operator.itemgetter(number), on_host)
            own_state = self._member(state, number) if loop.reads_state else None
            with self._of_member(number):
                status = loop.after_step(own_state, own_metrics)
            if status is None and loop.is_last:
                status = "finished"
            if status is not None:
                self._end(number, state, status)

    def _end(self, number: int, state: TrainState, status: str) -> None:
        """End a member: save, evaluate and write its result."""
        self._count_targets()
        own_state = self._member(state, number)
        with self._of_member(number):
            result = finish(self.loops[number], own_state, status)
        self.results[number] = result
        self._progress.print(
            f"{self._name(number)} {result.status}: {result.bits_per_byte:.4f} bits per byte"
        )

    def _count_targets(self) -> None:
        """Add the targets of the steps so far to the counts of the members, which waits for the steps."""
        for of_members in jax.device_get(self._targets):
            for number in self.active:
                self.loops[number].trained.add(int(of_members[number]))
        self._targets.clear()

    def _show_pace(self, metrics: dict[str, Any]) -> None:
        """Show the mean loss and the pace of all members."""
        active = self.active
        throughput = self._meter.measure(
            tokens=sum(self._fed),
            waiting=sum(loop.batches.waiting_seconds for loop in self.loops),
            nll=float(np.sum(metrics["nll"][active])),
            num_bytes=float(np.sum(metrics["bytes"][active])),
        )
        self._progress.update(
            self.step, metrics=throughput, loss=float(np.mean(metrics["loss"][active], dtype=np.float64))
        )

    # Time ---------------------------------------------------------------------------------------------------
    @contextmanager
    def _timed(self, category: Category) -> Iterator[None]:
        """Count the time of the block for a category of every member."""
        with ExitStack() as stack:
            for number in self.active:
                stack.enter_context(self.loops[number].telemetry.ledger.timed(category))
            yield

    @contextmanager
    def _of_member(self, number: int) -> Iterator[None]:
        """Do what is of one member: messages are its own, and the pace of the others leaves the time out."""
        started = time.perf_counter()
        self._busy = number
        try:
            yield
        finally:
            self._busy = None
            seconds = time.perf_counter() - started
            self._meter.leave_out(seconds)
            for other in self.active:
                if other != number:
                    self.loops[other].telemetry.meter.leave_out(seconds)

    def _restart_meters(self) -> None:
        """Begin to measure the pace, which is one without compilation."""
        for number in self.active:
            self.loops[number].restart_meter()
        waiting = sum(loop.batches.waiting_seconds for loop in self.loops)
        self._meter.restart(tokens=sum(self._fed), waiting=waiting)
        self.loops[self.active[0]].telemetry.cache.report()


def stacked_outputs(outputs: Sequence[tuple[TeacherOutput, ...]]) -> tuple[TeacherOutput, ...]:
    """Return the outputs of the teachers for the batches of all members; the members share the heads."""
    return tuple(
        TeacherOutput(hidden=_stacked([output.hidden for output in of_teacher]), head=of_teacher[0].head)
        for of_teacher in zip(*outputs, strict=True)
    )


@jax.jit
def _stacked(arrays: Sequence[jax.Array]) -> jax.Array:
    return jnp.stack(arrays)
