"""`train_population`: several runs that differ in numbers alone, trained in one program.

    if share_a_program(a, b) and population_pays([a, b]).pays:
        results = train_population([a, b])          # two run directories, as of two calls of `train`

Members of a population may differ in seeds, names and numbers of the optimizer, such as learning rates.
"""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import jax
from rich.console import Console

from slmjax.planning.memory import OutOfMemory, first_line, is_out_of_memory
from slmjax.runner.population_loop import Population
from slmjax.runner.population_pace import Pace, differences, population_pays, share_a_program
from slmjax.runner.result import Result
from slmjax.runner.session import NOTHING_LOST, Session, open_session
from slmjax.runner.trainer import train
from slmjax.stop_signals import StopSignals
from slmjax.telemetry.messages import MessageHandler
from slmjax.telemetry.progress import Progress
from slmjax.training.experiment import Experiment
from slmjax.training.programs import resolved_phases

__all__ = ["Pace", "population_pays", "share_a_program", "train_population"]

log = logging.getLogger(__name__)


def train_population(
    experiments: Sequence[Experiment],
    *,
    resume: Sequence[str | Path | None] | None = None,
    code: str | Path | None = None,
    console: Console | None = None,
) -> list[Result]:
    """Train the members of a population in one program and return their results, in their order.

    Each member has a run directory of its own in its `run.directory`, as `train` makes it, and can be
    resumed, evaluated and exported alone. Its batches are those that it has alone; losses and parameters are
    equal up to the order of sums in float32. Times and rates in its log and result are measured while all
    members train (`Result.population`).

    After Ctrl-C or SIGTERM all members stop after the step and are saved. Members that resume may be at
    different steps, except in a run whose quantization has phases: then they are trained one after another.

    Args:
      experiments: of the members, which share a program (`share_a_program`).
      resume: a run directory to resume, or None for a new run, for each member; None: all of them are new.
      code: the experiment file, copied into the run directories.
      console: where progress is shown (none: standard output).

    Raises:
      ValueError: the experiments do not share a program, there are several processes, or what `train` raises
        it for.
      memory.OutOfMemory: there was too little for all members at once; checkpoints stay.
    """
    runs = [None] * len(experiments) if resume is None else list(resume)
    check_population(experiments, runs)
    console = console or Console()
    if len(experiments) > 1:
        with StopSignals() as signals, signals.training(), ExitStack() as stack:
            sessions = _open_sessions(stack, experiments, runs, code=code, console=console, signals=signals)
            runs = [session.telemetry.run.path for session in sessions]
            if _are_in_step(sessions):
                return _train(stack, sessions, signals=signals, console=console)
        log.warning("the members are at different steps of a run with phases: trained one after another")
    return [
        train(experiment, resume=run, code=code, console=console)
        for experiment, run in zip(experiments, runs, strict=True)
    ]


def check_population(experiments: Sequence[Experiment], runs: Sequence[str | Path | None]) -> None:
    """Raise ValueError if the experiments cannot be trained in one program."""
    if not experiments or len(runs) != len(experiments):
        raise ValueError(
            f"{len(experiments)} experiments and {len(runs)} runs to resume: give at least one experiment, "
            "and a run or None for each"
        )
    if jax.process_count() > 1:
        raise ValueError("a population is trained by one process: use one host, or train its members alone")
    for number, experiment in enumerate(experiments):
        if not share_a_program(experiments[0], experiment):
            raise ValueError(
                f"members 0 and {number} of the population do not share a program, they differ in "
                f"{differences(experiments[0], experiment)}: train them one after another"
            )


def _open_sessions(
    stack: ExitStack,
    experiments: Sequence[Experiment],
    runs: Sequence[str | Path | None],
    *,
    code: str | Path | None,
    console: Console,
    signals: StopSignals,
) -> list[Session]:
    """Return the sessions of the members; all share the data, programs and teachers of the first."""
    sessions: list[Session] = []
    for experiment, run in zip(experiments, runs, strict=True):
        # The first one describes model and data for all. Only the population has a bar.
        is_quiet = console.quiet or bool(sessions)
        lines = Console(file=console.file, width=console.width, force_terminal=False, quiet=is_quiet)
        session = stack.enter_context(
            open_session(
                experiment,
                resume=run,
                code=code,
                console=lines,
                signals=signals,
                shared=sessions[0].setup if sessions else None,
            )
        )
        if sessions:
            log.info("run directory %s", session.telemetry.run.path)
        lines.quiet = True
        sessions.append(session)
    return sessions


def _are_in_step(sessions: Sequence[Session]) -> bool:
    """Return whether one program can train the members: phases of quantization begin at the same time."""
    steps = {0 if session.state is None else int(session.state.step) for session in sessions}
    return len(steps) == 1 or not resolved_phases(sessions[0].setup.experiment)


def _train(
    stack: ExitStack, sessions: Sequence[Session], *, signals: StopSignals, console: Console
) -> list[Result]:
    num_steps = sessions[0].setup.experiment.run.steps
    progress = stack.enter_context(Progress(num_steps=num_steps, console=console))
    population = Population(sessions, signals=signals, progress=progress)
    messages = stack.enter_context(MessageHandler(population.show))
    messages.write_to(population)
    signals.note = f"{NOTHING_LOST}. Resume the members with --resume"
    try:
        return population.run()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"out of memory with {len(sessions)} members in one program, after step {population.step} "
            f"({first_line(error)}): train fewer of them together, or one after another"
        ) from error
