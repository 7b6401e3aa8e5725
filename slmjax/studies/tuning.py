"""Each arm at its own best learning rate, chosen by a sweep with seeds that never judge.

    study, tuned = tune(study, "studies/width")     # sweeps in studies/width/tuning; resumes as a study does
    tuned[0].rate, tuned[0].is_resolved             # of each trained arm

An arm that is compared at another arm's rate may lose because of its rate alone. The best rate is the minimum
of a quadratic in log2 of the rate, through the best rate of the grid and its neighbours. A best rate at the
edge of the grid may not be the best: the grid is to be widened, and until then no verdict on the arm counts.

The sensitivity to the rate is that of Wortsman et al., "Small-scale proxies for large-scale Transformer
training instabilities" (arXiv:2309.14322): the mean over the grid of the metric's excess over its best value,
where a metric counts as no worse than that of the model before training.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from slmjax.studies.arms import Arm, Derived
from slmjax.studies.costs import known_vocab_size
from slmjax.studies.planned import planned_experiment
from slmjax.studies.running import run_study
from slmjax.studies.study import DIVERGED, FAILED, FINISHED, Member, Study
from slmjax.training.experiment import Experiment

TUNING = "tuning"  # the directory of the sweeps, in that of the study


class TuningUnfinished(RuntimeError):
    """Some runs of the sweeps have not ended: other workers train them, or they were not asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TriedRate:
    """One learning rate of a sweep."""

    rate: float  # of `optim.lr`
    value: float | None  # mean of the metric over the tuning seeds; None unless all of them finished
    status: str  # "finished", or that of the first run that did not


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimum:
    """The best learning rate of a sweep."""

    rate: float
    # of the metric: the minimum of the fit, or the value at the rate of the grid; None if no rate finished
    value: float | None
    is_fitted: bool  # by a quadratic; otherwise it is the best rate of the grid
    is_resolved: bool
    reason: str  # why it is not resolved or not fitted; empty if it is both


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuned:
    """The learning rate of an arm, and how it was chosen."""

    arm: str
    metric: str
    seeds: tuple[int, ...]  # that chose, and do not judge
    tried: tuple[TriedRate, ...]  # in rising order
    own_rate: float  # of the arm's experiment
    rate: float  # that it is trained at
    value: float | None  # of the metric at this rate, with the tuning seeds; None if no rate finished
    is_fitted: bool
    is_resolved: bool  # otherwise the arm may be at a disadvantage, and no verdict on it counts
    reason: str
    # mean excess of the metric over the grid (Wortsman et al. 2023), above 0 also for a metric that should
    # be high; None if no rate finished
    sensitivity: float | None
    # what a run that diverged, or is worse than no training, counts as: the metric before training, or the
    # worst of the sweep where that is not known; None if neither is
    ceiling: float | None

    def notes(self) -> Iterator[str]:
        """Yield what a report should say about the choice."""
        values = ", ".join(
            f"{tried.rate:.3g} ({tried.status if tried.value is None else f'{tried.value:.4f}'})"
            for tried in self.tried
        )
        seeds = f"seed{'' if len(self.seeds) == 1 else 's'} {', '.join(map(str, self.seeds))}"
        if self.value is None or self.sensitivity is None:
            yield (
                f"no learning rate finished, with {seeds} of {values}; it is trained at {self.rate:.3g}. "
                f"{self.reason}. Its verdicts are not resolved."
            )
            return
        how = "by a quadratic in its logarithm" if self.is_fitted else "of the grid"
        yield (
            f"learning rate {self.rate:.3g}, the best {how}, {self.metric} with {seeds} of {values}; "
            f"sensitivity {self.sensitivity:.2g}."
        )
        if not self.is_resolved:
            yield f"its best learning rate is not resolved: {self.reason}. Its verdicts are not resolved."
        elif self.reason:
            yield f"its best learning rate is that of the grid: {self.reason}."


# The sweep --------------------------------------------------------------------------------------------------
def tune(
    study: Study,
    directory: str | Path,
    *,
    run: Callable[..., tuple[Member, ...]] = run_study,
    only: Sequence[str] | None = None,
) -> tuple[Study, tuple[Tuned, ...]]:
    """Sweep the learning rate of every trained arm, and return the study with each arm at its best one.

    Sweeps that have ended are not run again. A study without `tune` is returned as it is.

    Args:
      directory: of the study; the sweeps are in its directory `tuning`.
      run: a replacement for `run_study`, such as one with a console.
      only: names of the arms whose rates are swept now (none: all). Others have their rates if these were
        swept before.

    Raises:
      ValueError: a tuning seed is a seed of the study.
      TuningUnfinished: some runs have not ended.
    """
    if study.tune is None:
        return study, ()
    sweep = tuning_study(study)
    names = () if only is None else tuple(name for arm in only for name in _names(study, arm))
    members = run(sweep, Path(directory) / TUNING, **({} if only is None else {"only": names}))
    tuned = choose_rates(study, members, only=only)
    return at_rates(study, tuned), tuned


def _names(study: Study, arm: str) -> Iterator[str]:
    """Yield the arms of the sweep that choose the rate of an arm; a derived arm has none."""
    if isinstance(study.arm(arm), Arm):
        yield from (_name(arm, rate) for rate in rates_of(study, arm))


def tuning_study(study: Study) -> Study:
    """Return the study whose members choose: each trained arm at each rate, with the tuning seeds.

    Raises:
      ValueError: a tuning seed is a seed of the study, or the study is not tuned.
    """
    if study.tune is None:
        raise ValueError(f"the study {study.name!r} is not tuned: set its tune to LearningRates(...)")
    # With the seed that chose it, an arm would have the best of several draws of the noise.
    if common := sorted({*study.tune.seeds} & {*study.seeds}):
        raise ValueError(
            f"seeds {common} choose the learning rates and are seeds of the study: give tune other seeds"
        )
    sources = _Sources(study)
    # Each rate is an arm of an ordinary study, which can be interrupted, resumed and shared by workers.
    arms = tuple(
        dataclasses.replace(_at_rate(arm, rate, name=_name(arm.name, rate)), after=sources.of(study, arm))
        for arm in study.arms
        if isinstance(arm, Arm)
        for rate in rates_of(study, arm.name)
    )
    return Study(
        name=f"{study.name}, learning rates",
        base=study.base,
        arms=(*sources.arms, *arms),
        seeds=study.tune.seeds,
        # A study needs a baseline; no verdicts are drawn from a sweep.
        baseline=arms[0].name,
        metric=study.metric,
        lower_is_better=study.lower_is_better,
        earlier=tuple(sources.earlier.values()),
    )


class _Sources:
    """Arms whose runs others build on, at their own rates with the tuning seeds, as arms of the sweep."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self.arms: list[Arm | Derived] = []
        self.earlier: dict[str, Study] = {}

    def of(self, study: Study, arm: Arm) -> str | tuple[str, str] | None:
        """Return what an arm of the sweep is after, once that is part of the sweep."""
        if arm.after is None or isinstance(arm.after, str):
            return None if arm.after is None else self._add(study, arm.after)
        name, source = arm.after
        earlier = next(each for each in study.earlier if each.name == name)
        # A single run for all seeds, such as a teacher, is for the tuning seeds, too.
        if len(earlier.seeds) == 1:
            self.earlier[name] = earlier
            return name, source
        return self._add(earlier, source)

    def _add(self, study: Study, name: str) -> str:
        arm = study.arm(name)
        label = name if study is self._study else f"{study.name}: {name}"
        if any(added.name == label for added in self.arms):
            return label
        added = (
            dataclasses.replace(arm, name=label, source=self._add(study, arm.source))
            if isinstance(arm, Derived)
            else dataclasses.replace(
                arm,
                name=label,
                experiment=study.base if arm.experiment is None else arm.experiment,
                after=self.of(study, arm),
            )
        )
        self.arms.append(added)
        return label


def choose_rates(
    study: Study, members: Sequence[Member], *, only: Sequence[str] | None = None
) -> tuple[Tuned, ...]:
    """Return the best rate of each trained arm, from the members of `tuning_study`.

    An arm that finished at no rate has an outcome, too, and does not stop the others (`best_rate`).

    Args:
      study: whose arms are tuned.
      members: of its sweep.
      only: names of the arms that need a rate (none: all); another one is left out if its sweep has not
        ended.

    Raises:
      TuningUnfinished: some members are missing.
    """
    assert study.tune is not None
    by_key = {(member.arm, member.seed): member for member in members}
    tuned = []
    missing = []
    for arm in study.arms:
        if not isinstance(arm, Arm):
            continue
        runs = {
            rate: [by_key.get((_name(arm.name, rate), seed)) for seed in study.tune.seeds]
            for rate in rates_of(study, arm.name)
        }
        if any(member is None for of_rate in runs.values() for member in of_rate):
            missing += [arm.name] if only is None or arm.name in only else []
            continue
        tuned.append(_choose(study, arm.name, runs))
    if missing:
        raise TuningUnfinished(
            f"learning rates of {', '.join(missing)} are still being tried: run the study again when the "
            "other workers have ended"
        )
    return tuple(tuned)


def at_rates(study: Study, tuned: Sequence[Tuned]) -> Study:
    """Return the study with each arm that has a chosen rate trained at it."""
    rates = {choice.arm: choice.rate for choice in tuned}
    arms = tuple(
        _at_rate(arm, rates[arm.name], name=arm.name) if isinstance(arm, Arm) and arm.name in rates else arm
        for arm in study.arms
    )
    return dataclasses.replace(study, arms=arms)


def check_tuned(study: Study, tuned: Sequence[Tuned]) -> None:
    """Raise ValueError if an arm is not trained at its chosen rate, or a seed of the study chose it."""
    for choice in tuned:
        if common := sorted({*choice.seeds} & {*study.seeds}):
            raise ValueError(
                f"seeds {common} chose the learning rate of {choice.arm!r} and are seeds of the study: tune "
                "with other seeds"
            )
        rate = study.experiment(choice.arm, study.seeds[0]).optim.lr
        if rate != choice.rate:
            raise ValueError(
                f"{choice.arm!r} is trained at optim.lr={rate:g}, but {choice.rate:g} was chosen for it: use "
                "the study that tune or at_rates returned"
            )


def unresolved_arms(study: Study, tuned: Sequence[Tuned]) -> tuple[str, ...]:
    """Return the arms whose verdicts do not count: tuned without a resolved rate, or derived from such."""
    unresolved = {choice.arm for choice in tuned if not choice.is_resolved}
    return tuple(arm.name for arm in study.arms if study.trained(arm.name).name in unresolved)


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


def _at_rate(arm: Arm, rate: float, *, name: str) -> Arm:
    moved = arm.then(lambda experiment: with_rate(experiment, rate))
    return dataclasses.replace(moved, name=name)


def _name(arm: str, rate: float) -> str:
    return f"{arm} at {rate:.6g}"


def rates_of(study: Study, arm: str) -> tuple[float, ...]:
    """Return the rates that an arm of a tuned study is tried at, in rising order."""
    assert study.tune is not None
    return study.tune.grid(study.experiment(arm, study.tune.seeds[0]).optim.lr)


# The choice -------------------------------------------------------------------------------------------------
def _choose(study: Study, arm: str, runs: Mapping[float, Sequence[Any]]) -> Tuned:
    assert study.tune is not None
    tried = tuple(_tried(rate, of_rate, study.metric) for rate, of_rate in sorted(runs.items()))
    optimum = best_rate(tried, lower_is_better=study.lower_is_better)
    experiment = study.experiment(arm, study.tune.seeds[0])
    members = [member for of_rate in runs.values() for member in of_rate]
    # Of an arm that builds on another run, the vocabulary is that run's.
    with planned_experiment(study, arm, study.tune.seeds[0]) as planned:
        ceiling = _untrained(planned, members, study.metric)
    finished = [each.value for each in tried if each.value is not None]
    if ceiling is None and finished:
        ceiling = max(finished) if study.lower_is_better else min(finished)
    return Tuned(
        arm=arm,
        metric=study.metric,
        seeds=study.tune.seeds,
        tried=tried,
        own_rate=experiment.optim.lr,
        rate=optimum.rate,
        value=optimum.value,
        is_fitted=optimum.is_fitted,
        is_resolved=optimum.is_resolved,
        reason=optimum.reason,
        sensitivity=sensitivity(tried, ceiling=ceiling, lower_is_better=study.lower_is_better)
        if finished and ceiling is not None
        else None,
        ceiling=ceiling,
    )


def _tried(rate: float, members: Sequence[Member], metric: str) -> TriedRate:
    values = [member.metric_value(metric) for member in members]
    # A finished run whose metric is not finite has diverged, too.
    statuses = [
        DIVERGED if member.status == FINISHED and value is None else member.status
        for member, value in zip(members, values, strict=True)
    ]
    status = next((status for status in statuses if status != FINISHED), FINISHED)
    # A rate at which some seeds diverge is no choice, however good the others are.
    finished = [value for value in values if value is not None] if status == FINISHED else []
    return TriedRate(rate=rate, value=sum(finished) / len(finished) if finished else None, status=status)


def best_rate(tried: Sequence[TriedRate], *, lower_is_better: bool = True) -> Optimum:
    """Return the minimum of a quadratic in log2 of the rate, through the best rate and its neighbours.

    It is not resolved at the edge of the grid, nor next to a run that failed. Next to a rate that diverged
    the optimum is enclosed, but no quadratic can be fitted: it is the rate of the grid. If no rate has
    finished, it is the lowest one, at which training is the least likely to diverge, and not resolved.

    Args:
      tried: in rising order of the rates.
      lower_is_better: whether the metric should be low.
    """
    sign = 1.0 if lower_is_better else -1.0
    losses = [None if each.value is None else sign * each.value for each in tried]
    # Of equal values the one nearest to the middle of the grid: an edge would leave the optimum open.
    middle = (len(tried) - 1) / 2
    finished = [(loss, abs(index - middle), index) for index, loss in enumerate(losses) if loss is not None]
    if not finished:
        return _no_optimum(tried)
    loss, _, index = min(finished)

    def optimum(reason: str = "", *, is_resolved: bool = True) -> Optimum:
        return Optimum(
            rate=tried[index].rate,
            value=sign * loss,
            is_fitted=False,
            is_resolved=is_resolved,
            reason=reason,
        )

    edges = ((0, "lowest", "lower"), (len(tried) - 1, "highest", "higher"))
    for edge, name, side in edges:
        if index == edge:
            reason = f"{tried[index].rate:.3g} is the {name} that was tried: widen the grid to {side} rates"
            return optimum(reason, is_resolved=False)
    neighbours = (tried[index - 1], tried[index + 1])
    for neighbour in neighbours:
        if neighbour.status == FAILED:
            return optimum(f"the run at {neighbour.rate:.3g} failed", is_resolved=False)
    if diverged := [neighbour for neighbour in neighbours if neighbour.value is None]:
        return optimum(f"training diverges at {diverged[0].rate:.3g}")
    fit = _parabola(
        [math.log2(each.rate) for each in tried[index - 1 : index + 2]],
        [loss for loss in losses[index - 1 : index + 2] if loss is not None],
    )
    if fit is None:
        return optimum(f"the metric is the same at {neighbours[0].rate:.3g} and {neighbours[1].rate:.3g}")
    log_rate, minimum = fit
    # Further digits are noise, and would be in every command that repeats a run.
    rate = float(f"{2.0**log_rate:.4g}")
    return Optimum(rate=rate, value=sign * minimum, is_fitted=True, is_resolved=True, reason="")


def _no_optimum(tried: Sequence[TriedRate]) -> Optimum:
    """Return the lowest rate of a sweep of which no run finished."""
    is_diverged = all(each.status == DIVERGED for each in tried)
    reason = (
        "Training diverges at every rate that was tried: widen the grid to lower rates"
        if is_diverged
        else "Runs failed at rates that were tried, and none finished: see their errors"
    )
    return Optimum(rate=tried[0].rate, value=None, is_fitted=False, is_resolved=False, reason=reason)


def _parabola(x: Sequence[float], y: Sequence[float]) -> tuple[float, float] | None:
    """Return the minimum of the parabola through three points; None if it is not convex."""
    first = (y[1] - y[0]) / (x[1] - x[0])
    second = (y[2] - y[1]) / (x[2] - x[1])
    curvature = (second - first) / (x[2] - x[0])
    if not curvature > 0:
        return None
    # Newton's form: y[0] + first (x - x[0]) + curvature (x - x[0]) (x - x[1]).
    lowest = (x[0] + x[1]) / 2 - first / (2 * curvature)
    return lowest, y[0] + first * (lowest - x[0]) + curvature * (lowest - x[0]) * (lowest - x[1])


def sensitivity(tried: Sequence[TriedRate], *, ceiling: float, lower_is_better: bool = True) -> float:
    """Return the mean over the grid of the excess of the metric over its best value, in the metric's unit.

    `E[min(l, ceiling) - min l]` over the rates of the grid (Wortsman et al. 2023). Runs that diverged have
    the ceiling, and runs that failed are left out.
    """
    sign = 1.0 if lower_is_better else -1.0
    counted = [each for each in tried if each.value is not None or each.status == DIVERGED]
    losses = [
        sign * ceiling if each.value is None else min(sign * each.value, sign * ceiling) for each in counted
    ]
    return sum(losses) / len(losses) - min(losses)


def _untrained(experiment: Experiment, members: Sequence[Member], metric: str) -> float | None:
    """Return the metric of a model that finds all tokens equally likely; None where that is not known.

    In bits per byte, this is log2 of the vocabulary over the bytes of a token, which any finished run has:
    the ratio of its bits per byte and its loss in nats per token.
    """
    vocab_size = experiment.model.vocab_size or known_vocab_size(experiment)
    if vocab_size is None or metric not in ("loss", "bits_per_byte"):
        return None
    for member in members:
        loss = member.metric_value("loss")
        value = member.metric_value(metric)
        if loss and value:
            return math.log(vocab_size) * value / loss
    return None
