"""Findings of a study: each arm over its seeds, comparisons with verdicts, noise, and caveats.

    findings = analyze(study, members)
    findings.comparisons[0].verdict                  # Verdict.BETTER
    write_findings(findings, directory)              # findings.json
    findings = read_findings(directory)

Every arm is compared with the baseline, in addition to further pairs. All comparisons are one family, judged
by `statistics.verdicts.judge`. `layout.py` formats findings as tables.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from slmjax.atomic_files import write_text
from slmjax.config import added_field, dumps, read_file
from slmjax.stored_json import check_object, parse_json
from slmjax.studies.caveats import (
    budget_notes,
    counted,
    data_notes,
    lost_text_notes,
    member_notes,
    noise_notes,
)
from slmjax.studies.heldout_text import TextUncertainty, little_text_notes, text_uncertainty
from slmjax.studies.questions import Outcomes, Pair, Question
from slmjax.studies.statistics.ladders import LadderFindings, SizeResults, judge_ladder
from slmjax.studies.statistics.power_of_rules import power_for, seeds_that_resolve, smallest_difference
from slmjax.studies.statistics.proportions import exact_interval
from slmjax.studies.statistics.results_table import Correction, Rules
from slmjax.studies.statistics.samples import (
    Interval,
    PairedDifference,
    Summary,
    paired_difference,
    summarize,
)
from slmjax.studies.statistics.verdicts import Judged, Judgement, Noise, Verdict, judge
from slmjax.studies.study import DIVERGED, FINISHED, STOPPED, Member, Study, member_fingerprint

FINDINGS = "findings.json"
COULD_NOT_ANSWER = "This study could not have answered its question"  # begins the note on it
MEMORY = "memory_bytes"  # metric of the most memory that a run used


@dataclasses.dataclass(frozen=True, kw_only=True)
class Divergence:
    """How many runs of an arm diverged, of those that finished or diverged."""

    num_runs: int
    num_diverged: int
    interval: Interval  # exact (Clopper and Pearson), of the probability of divergence


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmSummary:
    """One arm over its seeds."""

    arm: str
    seeds: tuple[int, ...]  # that finished with a finite metric
    values: tuple[float | None, ...]  # of the metric, for each seed of the findings
    metric: Summary | None  # None while no seed has finished
    interval: Interval | None  # t interval of the mean; None with fewer than two seeds
    further_metrics: dict[str, Summary | None]
    budget: Summary | None  # of the metric that should be equal for all arms
    diverged: tuple[int, ...]  # seeds
    divergence: Divergence | None  # None while no run has ended
    # hash of the experiment without its seed; None if it is not known, or another one for each seed
    experiment: str | None = None
    # training FLOPs of a run, as counted from its step; of a derived arm those of its source. None: not known
    flops: float | None = added_field(None, before=None)
    # mean over runs of the most memory on a device, on a CPU of the process; None if it is not known
    peak_memory_bytes: float | None = added_field(None, before=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """One arm minus another."""

    arm: str
    against: str
    judgement: Judgement | None  # None with fewer than two seeds in common
    differences: tuple[float | None, ...]  # as measured, for each seed of the findings
    further_metrics: dict[str, PairedDifference | None]  # without a verdict
    reason: str = added_field("", before="")  # why it is not resolved, a clause; empty if it is

    @property
    def verdict(self) -> Verdict:
        """The verdict on `arm`."""
        return Verdict.NOT_RESOLVED if self.judgement is None else self.judgement.verdict


@dataclasses.dataclass(frozen=True, kw_only=True)
class AchievedPower:
    """What the seeds of a study can resolve, at the noise that was found and by its rules."""

    seeds: int
    smallest_resolved: float  # true difference that is resolved 4 times in 5
    smallest_effect: float | None  # that is worth having, as the study says
    power: float | None  # probability that the smallest effect is resolved
    # that resolve it 4 times in 5; None without one, if over 1,000, or if no look that is left does
    seeds_needed: int | None
    could_answer: bool | None  # whether the smallest effect is resolved 4 times in 5; None without one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Findings:
    """All results of a study: the content of findings.json."""

    study: str  # its name
    question: str  # in words; empty if none was asked
    metric: str
    rules: Rules
    baseline: str
    seeds: tuple[int, ...]
    arms: tuple[ArmSummary, ...]
    comparisons: tuple[Comparison, ...]  # those with the baseline, then the further ones
    noise: Noise
    level: float  # significance level of the verdicts
    look: int | None  # number of seeds of the look that counts; None without fixed looks
    budget: str | None  # the metric that should be equal; None: none
    is_matched: bool | None  # whether it is; None if no two arms have finished a seed
    smallest_resolved: float | None = None  # difference that these seeds resolve 4 times in 5
    text: tuple[TextUncertainty, ...] = ()  # of comparisons whose runs keep the loss of each document
    tuning_seeds: tuple[int, ...] = ()  # that chose the learning rates of arms
    began: float | None = None  # when the first run began, in seconds since 1970; None if not known
    changes: tuple[str, ...] = ()  # of the study since its first run
    notes: tuple[str, ...] = ()  # caveats: what was left out, or does not compare
    # of p values for the number of comparisons
    correction: Correction = added_field(Correction.HOLM, before=Correction.HOLM)
    # None if the noise is not known, and before the first look
    power: AchievedPower | None = added_field(None, before=None)
    # the same question at other sizes; None without a ladder, or with results of one size alone
    ladder: LadderFindings | None = added_field(None, before=None)
    version: int = 1  # of this file

    def arm(self, name: str) -> ArmSummary:
        """Return the summary of an arm."""
        return next(arm for arm in self.arms if arm.arm == name)


def analyze(
    study: Study,
    members: Sequence[Member],
    *,
    further: Sequence[Pair] = (),
    changes: Sequence[str] = (),
) -> Findings:
    """Analyze a study, which need not be complete.

    Args:
      study: arms, seeds and metric.
      members: as returned by `run_study` and `read_members`.
      further: pairs (arm, the arm it is compared with) in addition to those of the study.
      changes: changes of the study since its first run, for the report.

    Raises:
      ValueError: a pair names no arms or is given twice, or no run has a metric of a requested name.
    """
    question = Question.of(study, further=further)
    findings = analyze_members(question, members)
    return dataclasses.replace(
        findings,
        notes=(*findings.notes, *data_notes(study, members)),
        arms=tuple(
            dataclasses.replace(arm, experiment=_experiment_of(study, arm.arm)) for arm in findings.arms
        ),
        tuning_seeds=() if study.tune is None else study.tune.seeds,
        began=_began(members),
        changes=tuple(changes),
    )


def _experiment_of(study: Study, name: str) -> str | None:
    """Return a hash of what an arm is, for any seed."""
    arm = study.trained(name)
    # A function of the seed may need a file for each, and is another experiment for each.
    if callable(arm.experiment) and arm.after is None:
        return None
    return member_fingerprint(study, name, 0)


def _began(members: Sequence[Member]) -> float | None:
    """Return the time of the earliest record in the logs of the runs."""
    times = []
    for member in members:
        log = Path(str(member.result.get("run_dir", ""))) / "log.jsonl"
        # Derived members have no log, and runs may have been deleted since.
        if log.is_file():
            with log.open("rb") as stream:
                first = parse_json(stream.readline(), name=f"line 1 of {log}", remedy="remove the line")
            times.append(
                check_object(first, {"time": float}, name=str(log), remedy="remove the line")["time"]
            )
    return min(times, default=None)


def analyze_members(question: Question, members: Sequence[Member]) -> Findings:
    """Analyze members without their experiments, such as runs that slmjax did not train."""
    outcomes = Outcomes.of(question, members)
    judged = _judge(outcomes)
    comparisons = tuple(
        _comparison(outcomes, pair, judgement, look=judged.look)
        for pair, judgement in zip(question.pairs, judged.comparisons, strict=True)
    )
    # Caveats of a report are collected here, so that no layout can leave them out.
    is_matched, of_budget = budget_notes(outcomes)
    power = _power(question, judged)
    notes = (
        *_power_notes(power, comparisons, question.metric),
        *member_notes(outcomes),
        *of_budget,
        *lost_text_notes(outcomes),
        *little_text_notes(members),
        *noise_notes(outcomes, judged),
    )
    return Findings(
        study=question.name,
        question=question.text,
        metric=question.metric,
        rules=question.rules,
        baseline=question.baseline,
        seeds=question.seeds,
        arms=tuple(_arm_summary(outcomes, arm) for arm in question.arms),
        comparisons=comparisons,
        noise=judged.noise,
        smallest_resolved=None if power is None else power.smallest_resolved,
        correction=question.rules.correction,
        power=power,
        level=judged.level,
        look=judged.look,
        text=text_uncertainty(question, members),
        budget=None if question.budget is None else question.budget.metric,
        is_matched=is_matched,
        notes=notes,
    )


# Ladders ----------------------------------------------------------------------------------------------------
def with_flops(findings: Findings, study: Study, flops: Mapping[str, float]) -> Findings:
    """Return findings whose arms have the training FLOPs of a run, given by trained arm."""
    arms = tuple(
        dataclasses.replace(arm, flops=flops.get(study.trained(arm.arm).name)) for arm in findings.arms
    )
    return dataclasses.replace(findings, arms=arms)


def ladder_of(name: str, sizes: Mapping[str, Findings], *, asymptote: float = 0.0) -> LadderFindings:
    """Return what the findings of several sizes, by their names, show together (`judge_ladder`)."""
    first = next(iter(sizes.values()))
    return judge_ladder(
        name,
        [_size_results(size, findings) for size, findings in sizes.items()],
        lower_is_better=first.rules.lower_is_better,
        confidence=first.rules.confidence,
        asymptote=asymptote,
    )


def _size_results(size: str, findings: Findings) -> SizeResults:
    return SizeResults(
        size=size,
        study=findings.study,
        baseline=findings.baseline,
        compute={arm.arm: arm.flops for arm in findings.arms if arm.flops},
        losses={arm.arm: tuple(each for each in arm.values if each is not None) for arm in findings.arms},
        comparisons=tuple(
            (item.arm, item.against, item.verdict, item.judgement) for item in findings.comparisons
        ),
    )


# The file ---------------------------------------------------------------------------------------------------
def write_findings(findings: Findings, directory: str | Path) -> Path:
    """Write findings.json to a directory; returns its path."""
    return write_text(Path(directory) / FINDINGS, dumps(findings))


def read_findings(path: str | Path) -> Findings:
    """Read findings.json, by its path or that of its directory.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged, or of another version.
    """
    path = Path(path)
    findings = read_file(Findings, path / FINDINGS if path.is_dir() else path)
    # It follows from the rules, and files of earlier versions lack it.
    return dataclasses.replace(findings, correction=findings.rules.correction)


# Arms and comparisons ---------------------------------------------------------------------------------------
def _arm_summary(outcomes: Outcomes, arm: str) -> ArmSummary:
    question = outcomes.question

    def summary(name: str) -> Summary | None:
        values = outcomes.values(arm, name)
        return summarize(values) if values else None

    values = tuple(outcomes.value(arm, seed, question.metric) for seed in question.seeds)
    metric = summary(question.metric)
    diverged = outcomes.seeds_with(arm, DIVERGED)
    return ArmSummary(
        arm=arm,
        # The seeds of the arm alone: more than those of its pairs, if the other arm lacks some.
        seeds=tuple(seed for seed, value in zip(question.seeds, values, strict=True) if value is not None),
        values=values,
        metric=metric,
        interval=None if metric is None else _interval(metric, question.rules.confidence),
        further_metrics={name: summary(name) for name in question.further_metrics},
        budget=None if question.budget is None else summary(question.budget.metric),
        diverged=diverged,
        divergence=_divergence(
            num_runs=len(outcomes.seeds_with(arm, FINISHED)) + len(diverged),
            num_diverged=len(diverged),
            confidence=question.rules.confidence,
        ),
        peak_memory_bytes=statistics.fmean(memory) if (memory := outcomes.values(arm, MEMORY)) else None,
    )


def _interval(summary: Summary, confidence: float) -> Interval | None:
    if summary.standard_error is None:
        return None
    half_width = float(stats.t.ppf((1 + confidence) / 2, summary.num_values - 1)) * summary.standard_error
    return summary.mean - half_width, summary.mean + half_width


def _divergence(*, num_runs: int, num_diverged: int, confidence: float) -> Divergence | None:
    if num_runs == 0:
        return None
    interval = exact_interval(num_diverged, num_runs, confidence=confidence)
    return Divergence(num_runs=num_runs, num_diverged=num_diverged, interval=interval)


def _comparison(
    outcomes: Outcomes, pair: Pair, judgement: Judgement | None, *, look: int | None
) -> Comparison:
    question = outcomes.question
    by_seed = [[outcomes.value(arm, seed, question.metric) for arm in pair] for seed in question.seeds]
    comparison = Comparison(
        arm=pair[0],
        against=pair[1],
        judgement=judgement,
        differences=tuple(
            None if first is None or second is None else first - second for first, second in by_seed
        ),
        # Without a verdict: further tests would have to join the family of Holm's correction.
        further_metrics={name: _difference(outcomes, pair, name) for name in question.further_metrics},
    )
    is_comparable = outcomes.is_comparable(pair)
    if is_comparable and comparison.verdict is not Verdict.NOT_RESOLVED:
        return comparison
    reason = _reason(outcomes, pair, judgement, look=look)
    # The interval is still shown for arms that do not compare, but no verdict is drawn from it.
    return dataclasses.replace(comparison, reason=reason) if is_comparable else unresolved(comparison, reason)


def _difference(outcomes: Outcomes, pair: Pair, metric: str) -> PairedDifference | None:
    # Seeds that only one arm has are left out: unpaired values would add the noise between seeds.
    seeds = outcomes.paired_seeds(pair, metric)
    # A single difference has no noise to compare it with.
    if len(seeds) < 2:
        return None
    first, second = (outcomes.values(arm, metric, seeds=seeds) for arm in pair)
    return paired_difference(first, second, confidence=outcomes.question.rules.confidence)


def _judge(outcomes: Outcomes) -> Judged:
    question = outcomes.question
    if question.pairs:
        return judge(outcomes.table(), question.pairs, question.rules)
    noise = Noise(deviation=None, degrees_of_freedom=0, own={}, noisy=(), equality_p=None)
    return Judged(noise=noise, comparisons=(), level=1 - question.rules.confidence, look=None)


def _power(question: Question, judged: Judged) -> AchievedPower | None:
    """Return what the seeds resolve; None if the noise is not known, and before the first look."""
    seeds = [len(judgement.seeds) for judgement in judged.comparisons if judgement is not None]
    rules = question.rules
    if not seeds or not judged.noise.deviation or judged.look == 0:
        return None
    # Of a pair: that of two runs.
    deviation = math.sqrt(2) * judged.noise.deviation
    # At a look, pairs that both diverged may leave fewer seeds than it has.
    num = judged.look or max(seeds)
    degrees = judged.noise.degrees_of_freedom
    comparisons = len(question.pairs)
    by_rules: dict[str, Any] = {"comparisons": comparisons, "degrees_of_freedom": degrees}
    effect = rules.smallest_effect
    smallest = smallest_difference(deviation, num, rules, **by_rules)
    return AchievedPower(
        seeds=num,
        smallest_resolved=smallest,
        could_answer=None if effect is None else smallest <= effect,
        smallest_effect=effect,
        power=None if effect is None else power_for(effect, deviation, num, rules, **by_rules),
        seeds_needed=None
        if effect is None
        else seeds_that_resolve(
            effect,
            deviation,
            rules,
            comparisons=comparisons,
            arms=max(2, len(judged.noise.own) - len(judged.noise.apart)),
        ),
    )


def _power_notes(power: AchievedPower | None, comparisons: Sequence[Comparison], metric: str) -> list[str]:
    """Return a note on a study that could not have answered its question, unless it did."""
    if power is None or power.could_answer is not False:
        return []
    if all(comparison.verdict is not Verdict.NOT_RESOLVED for comparison in comparisons):
        return []
    needed = (
        "No number of seeds up to 1,000, or of the looks that are left, does."
        if power.seeds_needed is None
        else f"About {power.seeds_needed:,} seeds would."
    )
    metric_name = metric.replace("_", " ")
    return [
        f"{COULD_NOT_ANSWER}: with the noise there is, {power.seeds} seeds "
        f"resolve a difference of {power.smallest_resolved:.2g} {metric_name} 4 times in 5, and the smallest "
        f"effect worth having is {power.smallest_effect:.2g}, which they find {100 * (power.power or 0):.0f} "
        f"times in 100. {needed}"
    ]


# Reasons ----------------------------------------------------------------------------------------------------
def _reason(outcomes: Outcomes, pair: Pair, judgement: Judgement | None, *, look: int | None) -> str:
    """Return why a comparison is not resolved, or cannot be."""
    rules = outcomes.question.rules
    stopped = [arm for arm in pair if outcomes.seeds_with(arm, STOPPED)]
    if stopped:
        return f"{' and '.join(stopped)} {'was' if len(stopped) == 1 else 'were'} stopped early"
    if judgement is None:
        num = len(outcomes.paired_seeds(pair, outcomes.question.metric))
        return f"{counted(num, 'seed')} in common, and a comparison needs 2"
    if not outcomes.is_comparable(pair):
        return "the tokenizers of the arms lose different parts of the text"
    if look == 0:
        return f"no look yet: the first is at {rules.looks[0]} seeds of every arm"
    if judgement.standard_error == 0:
        return "the difference is the same with every seed, so that the noise is not known"
    resolved = judgement.smallest_resolved
    if resolved is None:
        return "the difference is not distinguished from noise"
    return f"the difference is not distinguished from noise: these seeds resolve {resolved:.2g} 4 times in 5"


def unresolved(comparison: Comparison, reason: str) -> Comparison:
    """Return a comparison without a verdict, for a reason that more seeds do not remove."""
    judgement = comparison.judgement
    if judgement is not None:
        judgement = dataclasses.replace(judgement, verdict=Verdict.NOT_RESOLVED, seeds_needed=None)
    return dataclasses.replace(comparison, judgement=judgement, reason=reason)
