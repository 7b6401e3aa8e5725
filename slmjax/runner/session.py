"""`open_session`: everything that a session of a run works with, opened before its first step.

    with StopSignals() as signals, open_session(experiment, resume=None, signals=signals) as session:
        loop = Loop(session, signals)

A run has one session, and one more each time it is resumed.
"""

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from slmjax import startup
from slmjax.checkpoints.run_checkpoints import Checkpointer
from slmjax.data.pipeline import BatchSource, ReadAhead
from slmjax.distill.teachers import split_devices
from slmjax.models.zoo import describe
from slmjax.parallel import hosts
from slmjax.parallel.agreement import in_all_processes
from slmjax.parallel.batches import local_sequences
from slmjax.parallel.mesh import make_mesh
from slmjax.planning import device_peaks
from slmjax.runner.changed_schedules import warn_of_changed_schedules
from slmjax.runner.initial_state import fresh_state, restored_state
from slmjax.runner.launch import (
    CompilationCache,
    new_run,
    open_trackers,
    print_banner,
    record_session,
    require_same_start,
)
from slmjax.runner.out_of_memory import explaining_out_of_memory
from slmjax.runner.resume import is_complete, run_to_resume, tokenizer_of, warn_of_other_data
from slmjax.runner.setup import Setup, set_up, with_teachers
from slmjax.runner.token_count import TokenCount
from slmjax.stop_signals import StopSignals
from slmjax.telemetry.messages import MessageHandler
from slmjax.telemetry.meter import Meter
from slmjax.telemetry.profiling import Profile
from slmjax.telemetry.progress import Progress
from slmjax.telemetry.run_directory import Category, Ledger, RunDirectory, RunLog
from slmjax.telemetry.trackers import Trackers
from slmjax.training.experiment import Experiment, with_absolute_paths
from slmjax.training.state import TrainState

log = logging.getLogger(__name__)

NOTHING_LOST = "before the first step of this session, so nothing is lost"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Telemetry:
    """The log, the trackers and the meters of a session."""

    run: RunDirectory
    log: RunLog
    trackers: Trackers
    progress: Progress
    ledger: Ledger
    meter: Meter
    profile: Profile
    cache: CompilationCache

    def record(self, kind: str, *, step: int, **values: Any) -> None:
        """Write a record to the log and to the trackers."""
        self.log.write(kind, step=step, **values)
        self.trackers.write(kind, step=step, **values)


@dataclasses.dataclass(kw_only=True)
class Session:
    """One session of a run, ready for its first step."""

    setup: Setup
    state: TrainState | None  # the first one, until it is taken
    trained: TokenCount  # targets of earlier sessions
    batches: ReadAhead
    checkpointer: Checkpointer
    telemetry: Telemetry
    is_resumed: bool

    def take_state(self) -> TrainState:
        """Return the first state and drop the session's reference to it."""
        # The step donates the state: a second reference would keep its memory, then be to deleted arrays.
        state = self.state
        assert state is not None, "the first state was taken already"
        self.state = None
        return state


@contextmanager
def open_session(
    experiment: Experiment,
    *,
    resume: str | Path | None = None,
    code: str | Path | None = None,
    profile: int | None = None,
    console: Console | None = None,
    restart: bool = False,
    signals: StopSignals,
    shared: Setup | None = None,
) -> Iterator[Session]:
    """Open a session of a new run, or of the run `resume`.

    The arguments are those of `trainer.train`, the signals that may end it, and for a member of a population
    the setup of another one, with which it shares data, programs and teachers.
    """
    signals.note = NOTHING_LOST
    # The ledger counts wall time from here on.
    ledger = Ledger()
    if jax.default_backend() == "cpu":
        startup.keep_memory()
    experiment, run = _begin(experiment, resume, code, restart=restart)
    mesh = make_mesh(experiment.mesh, split_devices(experiment.objective.distill, jax.devices())[0])
    # Outside the mesh: what is measured on a CPU runs on one device.
    with ledger.timed(Category.INIT):
        peak_flops = _peak_flops(experiment, mesh)
    # One stack, so that whatever was opened is closed in reverse order, also where a later step raises.
    with ExitStack() as stack:
        progress = _progress(experiment, console)
        # Warnings of the setup come before there is a log: the handler keeps them until `write_to`.
        records = stack.enter_context(MessageHandler(progress.print))
        cache = stack.enter_context(CompilationCache())
        stack.enter_context(jax.set_mesh(mesh))
        _log_process()
        with ledger.timed(Category.INIT):
            setup = _set_up(experiment, run, mesh, progress, shared)
            experiment = setup.experiment
            source = _batch_source(setup)
            with explaining_out_of_memory(setup, activity=lambda: "making the first state"):
                first = None if run is not None else (fresh_state(setup), TokenCount(0))
                setup = with_teachers(setup, shared=shared)
            # A new run has a directory only once everything that can be refused has been accepted.
            run = run or new_run(setup, code)
            run_log = stack.enter_context(run.open_log())
            records.write_to(run_log)
            checkpointer = _open_checkpointer(stack, run, setup)
            state, trained = first or restored_state(setup, checkpointer, restart=restart)
            # The tuple would keep the state alive next to the session, and with it the memory that is
            # donated.
            first = None
            first_step = int(state.step)
            _check_resumption(run, setup, first_step)
            so_far = {"step": first_step, "seconds": ledger.total()}
            record_session(setup, run, run_log, **so_far, code=code, is_resumed=resume is not None)
            signals.note = f"{NOTHING_LOST}. Resume with: {resume_command(run.path, setup.experiment)}"
            trackers = stack.enter_context(open_trackers(run, experiment))
        print_banner(setup, run, source, progress, first_step)
        stack.enter_context(progress)
        # Reading ahead begins last, with the first step known: its thread must not run while setup may fail.
        batches = stack.enter_context(source.iterate(first_step))
        telemetry = Telemetry(
            run=run,
            log=run_log,
            trackers=trackers,
            progress=progress,
            ledger=ledger,
            meter=_meter(setup, peak_flops),
            profile=_profile(run, setup, first_step=first_step, num_steps=profile),
            cache=cache,
        )
        session = Session(
            setup=setup,
            state=state,
            trained=trained,
            batches=batches,
            checkpointer=checkpointer,
            telemetry=telemetry,
            is_resumed=resume is not None,
        )
        del state  # the session alone holds it, until the loop takes it
        yield session


def _begin(
    experiment: Experiment, resume: str | Path | None, code: str | Path | None, *, restart: bool
) -> tuple[Experiment, RunDirectory | None]:
    """Return the experiment with absolute paths, and the run to resume: the same in all processes."""
    # A resumed run has absolute paths already, in its config.json.
    if resume is None:
        experiment = with_absolute_paths(experiment)
    require_same_start(experiment, resume=resume, restart=restart, code=code)
    if resume is None:
        return experiment, None
    path = Path(resume)
    return experiment, in_all_processes(lambda: run_to_resume(path, experiment), activity="resuming")


def _set_up(
    experiment: Experiment, run: RunDirectory | None, mesh: Mesh, progress: Progress, shared: Setup | None
) -> Setup:
    """Return the setup of a new run or of a resumed one, whose experiment has its length in steps."""
    tokenizer = experiment.tokenizer if run is None else tokenizer_of(run, experiment)
    setup = set_up(experiment, tokenizer=tokenizer, mesh=mesh, shared=shared)
    if setup.experiment.run.steps != experiment.run.steps:
        progress.set_length(setup.experiment.run.steps)
        if run is not None:
            run_to_resume(run.path, setup.experiment)  # in a longer run, quantization may begin later
    return setup


def resume_command(run: Path, experiment: Experiment) -> str:
    """Return the command that resumes a run."""
    code = run / "experiment.py"
    # The file is needed only to read a config that names classes of its own.
    needs_code = code.exists() and any(not is_of_package(cls) for cls in config_classes(experiment))
    return f"slmjax train --resume {run}{f' --code {code}' if needs_code else ''}"


def config_classes(tree: Any) -> Iterator[type]:
    """Return the classes of a config, at any depth."""
    if dataclasses.is_dataclass(tree):
        yield type(tree)
        for field in dataclasses.fields(tree):
            yield from config_classes(getattr(tree, field.name))
    elif isinstance(tree, dict | tuple | list):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from config_classes(item)


def is_of_package(cls: type) -> bool:
    """Return whether slmjax defines the class."""
    return cls.__module__.partition(".")[0] == "slmjax"


def _progress(experiment: Experiment, console: Console | None) -> Progress:
    return Progress(num_steps=experiment.run.steps, process_index=jax.process_index(), console=console)


def _log_process() -> None:
    """Log which of several processes this is."""
    if jax.process_count() > 1:
        how = hosts.joined or "joined by the calling program"
        log.info("process %d of %d, %s", jax.process_index(), jax.process_count(), how)


def _peak_flops(experiment: Experiment, mesh: Mesh) -> float | None:
    """Return FLOP/s that the mesh reaches at best in the dtype of the model."""
    dtype = experiment.model.layer_dims().dtype
    return device_peaks.peak_flops(jax.devices()[0], dtype, num_devices=mesh.size)


def _batch_source(setup: Setup) -> BatchSource:
    """Return the batches of this process: its own sequences of each."""
    data = setup.experiment.data
    prepared = setup.prepared
    # Each process reads only the sequences of its own devices; the global batch is put together on the mesh.
    rows = local_sequences(setup.mesh, data.batch_size)
    return BatchSource(prepared.train, data, token_bytes=prepared.tokenizer.token_bytes, rows=rows)


def _open_checkpointer(stack: ExitStack, run: RunDirectory, setup: Setup) -> Checkpointer:
    checkpointer = Checkpointer(
        run.checkpoints, model=setup.programs.definition.config, config=setup.experiment.checkpoint
    )
    stack.callback(checkpointer.close)
    return checkpointer


def _check_resumption(run: RunDirectory, setup: Setup, step: int) -> None:
    """Refuse a run that is complete, and warn of what is different from before.

    Raises:
      ValueError: the run has done all of its steps.
    """
    experiment = setup.experiment
    # A run that has done its steps but was killed before its result is finished, not refused.
    if step >= experiment.run.steps and is_complete(run, step):
        raise ValueError(
            f"{run.path} is at step {step} of {experiment.run.steps} already: increase --run.steps"
        )
    warn_of_other_data(run, experiment, setup.prepared)
    warn_of_changed_schedules(run, experiment, step=step)


def _meter(setup: Setup, peak_flops: float | None) -> Meter:
    """Return the meter of throughput."""
    # FLOPs of attention grow with the length, so they are those of the length that is trained, not the
    # longest.
    sequence_length = setup.experiment.data.sequence_length
    config = dataclasses.replace(setup.programs.definition.config, context_length=sequence_length)
    flops_per_token = describe(config).training_flops_per_token
    return Meter(flops_per_token=flops_per_token, peak_flops=peak_flops, tokens=0, waiting=0.0)


def _profile(run: RunDirectory, setup: Setup, *, first_step: int, num_steps: int | None) -> Profile:
    """Return the profiler trace of this process, in a directory of its own."""
    # Traces of several processes in one directory would overwrite each other.
    index = jax.process_index()
    return Profile(
        run.path / ("profile" if index == 0 else f"profile-{index}"),
        first_step=first_step,
        last_step=setup.experiment.run.steps,
        num_steps=num_steps,
    )
