"""What a study will take and what it can find, before anything is trained: `slmjax ablate STUDY.py --plan`.

    plan = plan_study(study, measure=True)     # StudyPlan: costs, time and memory of each arm, and the power
    print(plan.text)                           # at most 80 columns

Time and memory are those of a few steps on this device; programs that arms share are compiled once. The power
needs the noise between seeds: that of the ledger (`noise.py`), or an assumption, which is stated.
"""

import dataclasses
import logging
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from slmjax.planning.memory import StepMemory, size_text
from slmjax.runner.step_time import TrainingTime, time_training
from slmjax.studies.arms import Arm, Derived
from slmjax.studies.costs import ArmCost, arm_cost, vocab_size_of
from slmjax.studies.matching import Matched
from slmjax.studies.noise import expected_deviation
from slmjax.studies.planned import planned_experiment
from slmjax.studies.questions import Question
from slmjax.studies.statistics.power_of_rules import (
    power_for,
    seeds_that_count,
    seeds_that_resolve,
    smallest_difference,
)
from slmjax.studies.study import Study
from slmjax.studies.tuning import rates_of, tuning_study
from slmjax.telemetry.progress import format_seconds
from slmjax.training.experiment import Experiment

log = logging.getLogger(__name__)

COLUMNS = 80
LONGEST_NAME = 22  # of an arm in the table

# Standard deviation between seeds over the final value, by parameters: models of 0.6M parameters of this
# project, and models of about 100M of the nanoGPT speed runs. Between them a power law, outside the nearest.
ASSUMED_NOISE = ((0.6e6, 0.002), (124e6, 0.0005))
# Values of metrics that turn relative noise into differences: those of small models after a short training.
ASSUMED_VALUES = {"bits_per_byte": 2.0, "loss": 4.0}

UNITS = {"bits_per_byte": "bits per byte", "loss": "nats per token"}

TimeOf = Callable[[Experiment], TrainingTime]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedArm:
    """The runs of an arm."""

    arm: str
    derived_from: str | None  # an arm that is not trained
    seeds: tuple[int, ...]
    tuning_runs: int  # that choose its learning rate
    cost: ArmCost | None  # of one run; None for a derived arm
    seconds: float | None  # of one run, without evaluations and checkpoints; None where not measured
    compile_seconds: float | None
    memory: StepMemory | None  # on each device; None where not measured
    note: str = ""  # why it was not measured

    @property
    def num_runs(self) -> int:
        """Runs in all, those that choose the learning rate included."""
        return 0 if self.cost is None else len(self.seeds) + self.tuning_runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Power:
    """What the seeds of a study can resolve."""

    seeds: int  # of fixed looks, those of the latest look that they reach
    comparisons: int
    degrees_of_freedom: int  # of the pooled noise
    level: float  # probability of any false verdict
    deviation: float  # standard deviation of a run between seeds, in the unit of the metric
    is_assumed: bool
    source: str  # of the deviation, a sentence, with the ledger that was read
    smallest: float  # difference that is resolved 4 times in 5
    smallest_effect: float | None  # that is worth having, as the study says
    power: float | None  # probability that it is resolved
    seeds_needed: int | None  # to resolve it 4 times in 5; None without one, or if over 1,000


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """A study before its first run."""

    study: str
    question: str
    metric: str
    arms: tuple[PlannedArm, ...]
    matched: tuple[str, ...]  # what was made equal, a line each
    power: Power | None  # None with fewer than two seeds, or without noise to go by
    device: str
    num_runs: int
    flops: float  # of all runs
    seconds: float | None  # of all measured runs, one after another; None if none was measured
    memory: int | None  # bytes of the run that needs most, on each device

    @property
    def text(self) -> str:
        """The plan for people, at most 80 columns wide."""
        return "\n".join(_lines(self))


# The plan ---------------------------------------------------------------------------------------------------
def plan_study(
    study: Study,
    *,
    measure: bool = False,
    matched: Sequence[Matched] = (),
    ledger: str | Path | None = None,
    deviation: float | None = None,
    time_of: TimeOf | None = None,
) -> StudyPlan:
    """Plan a study whose arms are as they will be trained, except for their learning rates.

    Args:
      measure: compile each program and time a few steps on this device.
      matched: what `match_arms` chose, to show.
      ledger: of noise (`noise.ledger_of`), for the power; none: an assumption.
      deviation: standard deviation of the metric between seeds, instead of that of the ledger.
      time_of: a replacement for the measurement.

    Raises:
      ValueError: an arm's experiment is invalid.
    """
    if time_of is None and measure:
        time_of = _time_of
    arms = tuple(_planned_arm(study, arm, time_of) for arm in study.arms)
    trained = [arm for arm in arms if arm.cost is not None]
    baseline = next(arm for arm in trained if arm.arm == study.trained(study.baseline).name)
    assert baseline.cost is not None
    times = [arm.num_runs * arm.seconds for arm in trained if arm.seconds is not None]
    compiled = [arm.num_runs * arm.compile_seconds for arm in trained if arm.compile_seconds is not None]
    memory = [arm.memory.total for arm in trained if arm.memory is not None]
    return StudyPlan(
        study=study.name,
        question=study.question,
        metric=study.metric,
        arms=arms,
        matched=tuple(choice.text for choice in matched),
        power=_power(study, baseline.cost, ledger=ledger, deviation=deviation),
        device=f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
        num_runs=sum(arm.num_runs for arm in arms),
        flops=sum(arm.num_runs * arm.cost.flops for arm in trained if arm.cost is not None),
        seconds=sum(times) + sum(compiled) if times else None,
        memory=max(memory, default=None),
    )


def _time_of(experiment: Experiment) -> TrainingTime:
    return time_training(experiment, vocab_size=vocab_size_of(experiment))


def _planned_arm(study: Study, arm: Arm | Derived, time_of: TimeOf | None) -> PlannedArm:
    if isinstance(arm, Derived):
        return PlannedArm(
            arm=arm.name,
            derived_from=arm.source,
            seeds=study.seeds,
            tuning_runs=0,
            cost=None,
            seconds=None,
            compile_seconds=None,
            memory=None,
        )
    with planned_experiment(study, arm.name, study.seeds[0]) as experiment:
        cost = arm_cost(experiment)
        distill = experiment.objective.distill
        has_teachers = distill is not None and not distill.weight.is_zero
        note = ""
        measured = None
        # Only a teacher's parameters are needed for its time, and they do not exist yet.
        if arm.after is not None and has_teachers and time_of is not None:
            note = f"{arm.name} is not timed: its teacher, a run of {arm.after}, does not exist yet"
        elif time_of is not None:
            measured = time_of(experiment)
    return PlannedArm(
        arm=arm.name,
        derived_from=None,
        seeds=study.seeds,
        tuning_runs=_tuning_runs(study, arm.name),
        cost=cost,
        seconds=None if measured is None else measured.seconds,
        compile_seconds=None if measured is None else measured.compile_seconds,
        memory=None if measured is None else measured.memory,
        note=note,
    )


def _tuning_runs(study: Study, arm: str) -> int:
    """Return the runs that choose an arm's learning rate, its own rate for arms that build on it included."""
    if study.tune is None:
        return 0
    # An arm that others build on is trained at its own rate, too.
    is_source = any(each.name == arm for each in tuning_study(study).arms)
    return (len(rates_of(study, arm)) + is_source) * len(study.tune.seeds)


# Power ------------------------------------------------------------------------------------------------------
def _power(
    study: Study, cost: ArmCost, *, ledger: str | Path | None, deviation: float | None
) -> Power | None:
    num_seeds = seeds_that_count(study.rules, len(study.seeds))
    comparisons = len(Question.of(study).pairs)
    known = _noise(study.metric, cost, ledger=ledger, deviation=deviation)
    if num_seeds < 2 or comparisons < 1 or known is None:
        return None
    sd, source, is_assumed = known
    # Of two arms of equal and independent noise.
    of_pair = math.sqrt(2) * sd
    degrees = (len(study.arms) - 1) * (num_seeds - 1)
    by_rules: dict[str, Any] = {"comparisons": comparisons, "degrees_of_freedom": degrees}
    effect = study.smallest_effect
    return Power(
        seeds=num_seeds,
        comparisons=comparisons,
        degrees_of_freedom=degrees,
        level=1 - study.confidence,
        deviation=sd,
        is_assumed=is_assumed,
        source=source,
        smallest=smallest_difference(of_pair, num_seeds, study.rules, **by_rules),
        smallest_effect=effect,
        power=None if effect is None else power_for(effect, of_pair, num_seeds, study.rules, **by_rules),
        seeds_needed=None
        if effect is None
        else seeds_that_resolve(effect, of_pair, study.rules, comparisons=comparisons, arms=len(study.arms)),
    )


def _noise(
    metric: str, cost: ArmCost, *, ledger: str | Path | None, deviation: float | None
) -> tuple[float, str, bool] | None:
    """Return the deviation of a run, where it comes from, and whether it is assumed; None if not known."""
    if deviation is not None:
        return deviation, f"standard deviation {deviation:.3g} of a run, as it was given", False
    if ledger is not None:
        expected = expected_deviation(ledger, metric=metric, parameters=cost.parameters, tokens=cost.tokens)
        if expected is not None and expected.deviation > 0:
            return expected.deviation, f"{expected.text}, by {_shown(ledger)}", False
    if metric not in ASSUMED_VALUES:
        return None
    relative = assumed_noise(cost.parameters)
    value = ASSUMED_VALUES[metric]
    source = (
        f"an assumption: runs of {cost.parameters / 1e6:.2g}M parameters differ by {100 * relative:.2g} % "
        f"(standard deviation between seeds) of about {value:g} {UNITS[metric]}"
    )
    if ledger is not None:
        source += (
            f". There are no such runs in {_shown(ledger)} yet, where finished studies of the same directory "
            "record what they measured"
        )
    return relative * value, source, True


def _shown(ledger: str | Path) -> str:
    """Return the path of a ledger as people type it, from the current directory where it is below that."""
    path = Path(ledger).absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def assumed_noise(parameters: float) -> float:
    """Return the assumed standard deviation between seeds over the final value, by the size of the model.

    A power law through `ASSUMED_NOISE`, and its ends outside of it.
    """
    (small, of_small), (large, of_large) = ASSUMED_NOISE
    position = math.log(min(max(parameters, small), large) / small) / math.log(large / small)
    return of_small * (of_large / of_small) ** position


# Text -------------------------------------------------------------------------------------------------------
def _lines(plan: StudyPlan) -> Iterator[str]:
    yield from _wrapped(f"{plan.study}: {plan.question}" if plan.question else plan.study)
    yield ""
    yield from _table(plan)
    for note in (arm.note for arm in plan.arms if arm.note):
        yield from _wrapped(note)
    for line in plan.matched:
        yield from _wrapped(f"matched {line}")
    yield ""
    unit = UNITS.get(plan.metric, plan.metric)
    if (power := plan.power) is None:
        yield from _wrapped("Power: not known. Verdicts need 2 seeds or more, and the noise of the metric.")
        return
    yield from _wrapped(
        f"Power: {_count(power.seeds, 'seed')}, {_count(power.comparisons, 'comparison')}: finds "
        f"{power.smallest:.2g} {unit} 4 times in 5."
    )
    if power.smallest_effect is not None and power.power is not None:
        none = "more than 1,000 seeds, or than the looks have"
        needed = none if power.seeds_needed is None else _count(power.seeds_needed, "seed")
        yield from _wrapped(
            f"The smallest effect worth having, {power.smallest_effect:.2g} {unit}, is found "
            f"{100 * power.power:.0f} times in 100; 4 times in 5 takes {needed}."
        )
    yield from _wrapped(f"Noise: {power.source}.")


def _table(plan: StudyPlan) -> Iterator[str]:
    head = ("arm", "parameters", "FLOPs", "tokens", "memory", "a run", "runs")
    rows = []
    for arm in plan.arms:
        name = textwrap.shorten(arm.arm, LONGEST_NAME, placeholder="…") or arm.arm[:LONGEST_NAME]
        if arm.cost is None:
            rows.append((name, "derived", "", "", "", "", ""))
            continue
        runs = str(len(arm.seeds)) + (f" + {arm.tuning_runs}" if arm.tuning_runs else "")
        rows.append(
            (
                name,
                f"{arm.cost.parameters:,}",
                f"{arm.cost.flops:.2e}",
                f"{arm.cost.tokens:.2e}",
                "" if arm.memory is None else size_text(arm.memory.total),
                "" if arm.seconds is None else format_seconds(arm.seconds),
                runs,
            )
        )
    memory = "" if plan.memory is None else size_text(plan.memory)
    seconds = "" if plan.seconds is None else format_seconds(plan.seconds)
    rows.append(("in all", "", f"{plan.flops:.2e}", "", memory, seconds, str(plan.num_runs)))
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        yield "  ".join((row[0].ljust(widths[0]), *cells)).rstrip()
    tuned = ", + those that choose its learning rate" if any(arm.tuning_runs for arm in plan.arms) else ""
    timed = (
        f"Time on {plan.device}, without evaluations and checkpoints; in all with compilation."
        if plan.seconds is not None
        else "Time and memory were not measured."
    )
    yield from _wrapped(f"Runs: one for each seed{tuned}. {timed}")


def _wrapped(text: str) -> list[str]:
    # Paths are not to be torn apart.
    return textwrap.wrap(text, COLUMNS, subsequent_indent="  ", break_on_hyphens=False)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
