"""`train_population`: several runs that differ in numbers alone, trained in one program.

    if share_a_program(a, b) and population_pays([a, b]).pays:
        results = train_population([a, b])          # two run directories, as of two calls of `train`

Members of a population may differ in seeds, names and numbers of the optimizer, such as learning rates.
"""

import dataclasses
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import jax
from rich.console import Console

from slmjax import config as config_io
from slmjax.planning.memory import OutOfMemory, first_line, is_out_of_memory
from slmjax.runner.population_loop import Population
from slmjax.runner.result import Result
from slmjax.runner.session import NOTHING_LOST, Session, open_session
from slmjax.runner.trainer import train
from slmjax.stop_signals import StopSignals
from slmjax.telemetry.messages import MessageHandler
from slmjax.telemetry.progress import Progress
from slmjax.training.experiment import Experiment
from slmjax.training.optim import OptimConfig
from slmjax.training.programs import resolved_phases

log = logging.getLogger(__name__)


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


# Whether it pays --------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class Pace:
    """Measured pace of members that are trained in turn, and of all of them together."""

    num_members: int
    seconds_in_turn: float  # one step of each member, one after another
    seconds_together: float  # one step of all of them in one program; infinite if that was not possible
    note: str = ""  # why the members cannot be trained together, if so

    @property
    def ratio(self) -> float:
        """Tokens per second together, over those in turn."""
        return self.seconds_in_turn / self.seconds_together

    @property
    def pays(self) -> bool:
        """Return whether the members are to be trained together."""
        return self.ratio > 1.0

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
    """Measure a few steps of a population against as many of its members in turn.

    Raises:
      ValueError: the experiments do not share a program, or one of them does not fit its data or mesh.
    """
    return Pace(
        num_members=len(experiments), seconds_in_turn=1.0, seconds_together=1.0, note="nothing is measured"
    )


# Training ---------------------------------------------------------------------------------------------------
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
                f"{_differences(experiments[0], experiment)}: train them one after another"
            )


def _differences(a: Experiment, b: Experiment) -> str:
    """Name the settings that keep two experiments from sharing a program."""
    pairs = config_io.differences(config_io.to_json(_program_of(a)), config_io.to_json(_program_of(b)))
    return ", ".join(path for path, _ in pairs) or "the steps at which phases of quantization begin"


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
