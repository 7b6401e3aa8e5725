"""`train_population`: several runs that differ in numbers alone, trained in one program.

    if share_a_program(a, b) and population_pays([a, b]).pays:
        results = train_population([a, b])          # two run directories, as of two calls of `train`

Members of a population may differ in seeds, names and numbers of the optimizer, such as learning rates.
"""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from slmjax.runner.trainer import Result, train
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

    Each member has a run directory of its own in its `run.directory`, as `train` makes it.

    Args:
      experiments: of the members, which share a program (`share_a_program`).
      resume: a run directory to resume, or None for a new run, for each member; None: all of them are new.
      code: the experiment file, copied into the run directories.
      console: where progress is shown (none: standard output).

    Raises:
      ValueError: the experiments do not share a program, or what `train` raises it for.
    """
    runs = [None] * len(experiments) if resume is None else list(resume)
    return [
        train(experiment, resume=run, code=code, console=console)
        for experiment, run in zip(experiments, runs, strict=True)
    ]
