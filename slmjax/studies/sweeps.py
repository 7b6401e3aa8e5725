"""Arms of a study at their own best learning rates, each chosen by a sweep with one seed.

    sweep = RateSweep(name="rates", arms=arms, rates=(5e-4, 1e-3, 2e-3), seed=1000)
    rates = best_rates(sweep, run_study(sweep.study(), "studies/rates"))   # a ChosenRate for each arm
    study = Study(arms=at_rates(arms, rates), seeds=(0, 1, 2), ...)        # seeds other than the sweep's

An arm that is compared at another arm's rate may lose because of its rate only. The seed of the sweep is not
one of the study's, so that the choice favours no arm in what is then measured.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from slmjax.studies.arms import Arm, Derived
from slmjax.studies.changes import with_changes
from slmjax.studies.study import Member, Study
from slmjax.training.experiment import Experiment


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChosenRate:
    """The learning rate of an arm, and how it was chosen."""

    rate: float  # optim.lr
    seed: int  # with which it was chosen
    # each rate with its metric; None if the run did not finish
    tried: tuple[tuple[float, float | None], ...]

    @property
    def is_lowest(self) -> bool:
        """Whether no lower rate was tried."""
        return self.rate == min(rate for rate, _ in self.tried)

    @property
    def is_highest(self) -> bool:
        """Whether no higher rate was tried."""
        return self.rate == max(rate for rate, _ in self.tried)

    def notes(self, metric: str) -> Iterator[str]:
        """Yield the notes of a report on the choice."""
        values = ", ".join(
            f"{rate:g} ({'did not finish' if value is None else f'{value:.4f}'})"
            for rate, value in self.tried
        )
        yield f"learning rate {self.rate:g}, the best {metric} with seed {self.seed} of {values}."
        # A best rate at the edge of the sweep may not be the best: the arm could be at a disadvantage.
        for is_edge, end, way in (
            (self.is_lowest, "lowest", "lower"),
            (self.is_highest, "highest", "higher"),
        ):
            if is_edge:
                yield (
                    f"its best learning rate, {self.rate:g}, is the {end} that was tried: a {way} one may be "
                    "better still."
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RateSweep:
    """Arms that are each trained at several learning rates."""

    name: str
    # their rates are replaced; `optim.muon_lr` and `optim.scale_lr` keep their ratio to `optim.lr`
    arms: tuple[Arm, ...]
    rates: tuple[float, ...]  # of `optim.lr`
    seed: int  # that chooses
    metric: str = "bits_per_byte"
    lower_is_better: bool = True

    def __post_init__(self) -> None:
        if not self.rates or len(set(self.rates)) < len(self.rates) or min(self.rates) <= 0:
            raise ValueError(f"the rates of a sweep are {self.rates}: give some above 0, each once")

    def study(self) -> Study:
        """Return the study whose members choose: each arm at each rate, with one seed."""
        arms = tuple(
            # Each rate is an arm of an ordinary study, which can be interrupted and resumed.
            _at_rate(arm, rate, name=_name(arm.name, rate))
            for arm in self.arms
            for rate in self.rates
        )
        return Study(
            name=self.name,
            arms=arms,
            seeds=(self.seed,),
            # A study needs a baseline; a sweep draws no verdicts from it.
            baseline=arms[0].name,
            metric=self.metric,
            lower_is_better=self.lower_is_better,
        )


def best_rates(sweep: RateSweep, members: Sequence[Member]) -> dict[str, ChosenRate]:
    """Return each arm's best rate, by the metric of the sweep's members.

    Raises:
      ValueError: an arm has no member that finished.
    """
    # Other seeds may have been trained in the same directory.
    values = {
        member.arm: member.metric_value(sweep.metric) for member in members if member.seed == sweep.seed
    }
    chosen = {}
    for arm in sweep.arms:
        # A rate whose run diverged is recorded as tried, but cannot be chosen.
        tried = tuple((rate, values.get(_name(arm.name, rate))) for rate in sorted(sweep.rates))
        finished = [(value, rate) for rate, value in tried if value is not None]
        if not finished:
            raise ValueError(
                f"{arm.name}: no run finished at any of the rates "
                f"{', '.join(f'{rate:g}' for rate in sweep.rates)}"
            )
        _, rate = min(finished) if sweep.lower_is_better else max(finished)
        chosen[arm.name] = ChosenRate(rate=rate, seed=sweep.seed, tried=tried)
    return chosen


def at_rates(arms: Sequence[Arm | Derived], rates: Mapping[str, ChosenRate]) -> tuple[Arm | Derived, ...]:
    """Return the arms, those that have a chosen rate at it."""
    return tuple(
        _at_rate(arm, rates[arm.name].rate, name=arm.name)
        if isinstance(arm, Arm) and arm.name in rates
        else arm
        for arm in arms
    )


def with_rate(experiment: Experiment, rate: float) -> Experiment:
    """Return the experiment at a learning rate; `optim.muon_lr` and `optim.scale_lr` scale with it."""
    optim = experiment.optim
    # The rates of other optimizers keep their ratio: the sweep has one dimension.
    factor = rate / optim.lr
    scale_lr = None if optim.scale_lr is None else factor * optim.scale_lr
    return dataclasses.replace(
        experiment,
        optim=dataclasses.replace(optim, lr=rate, muon_lr=factor * optim.muon_lr, scale_lr=scale_lr),
    )


def check_chosen(study: Study, arm: str, chosen: ChosenRate) -> None:
    """Raise ValueError if an arm is not trained at its chosen rate, or the study has the seed that chose."""
    # With the seed that chose it, an arm would have the best of several draws of the noise.
    if chosen.seed in study.seeds:
        raise ValueError(
            f"seed {chosen.seed} chose the learning rate of {arm!r} and is one of the study's: sweep with "
            "another seed"
        )
    # Catches a study whose arms were not passed through `at_rates`.
    rate = study.experiment(arm, study.seeds[0]).optim.lr
    if rate != chosen.rate:
        raise ValueError(
            f"{arm!r} is trained at optim.lr={rate:g}, but {chosen.rate:g} was chosen for it: give the study "
            "at_rates(arms, rates)"
        )


def _name(arm: str, rate: float) -> str:
    return f"{arm} at {rate:g}"


def _at_rate(arm: Arm, rate: float, *, name: str) -> Arm:
    changes = arm.changes

    def at_rate(experiment: Experiment) -> Experiment:
        changed = changes(experiment) if callable(changes) else with_changes(experiment, changes)
        return with_rate(changed, rate)

    return dataclasses.replace(arm, name=name, changes=at_rate)
