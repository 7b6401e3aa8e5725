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
from collections.abc import Sequence
from pathlib import Path

from scipy import stats

from slmjax.atomic_files import write_text
from slmjax.config import dumps, read_file
from slmjax.stored_json import check_object, parse_json
from slmjax.studies.caveats import budget_notes, data_notes, lost_text_notes, member_notes, noise_notes
from slmjax.studies.heldout_text import TextUncertainty, little_text_notes, text_uncertainty
from slmjax.studies.questions import Outcomes, Pair, Question
from slmjax.studies.statistics.power import smallest_resolved
from slmjax.studies.statistics.proportions import exact_interval
from slmjax.studies.statistics.results_table import Rules
from slmjax.studies.statistics.samples import (
    Interval,
    PairedDifference,
    Summary,
    paired_difference,
    summarize,
)
from slmjax.studies.statistics.verdicts import Judged, Judgement, Noise, Verdict, judge
from slmjax.studies.study import DIVERGED, FINISHED, Member, Study, member_fingerprint

FINDINGS = "findings.json"


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """One arm minus another."""

    arm: str
    against: str
    judgement: Judgement | None  # None with fewer than two seeds in common
    differences: tuple[float | None, ...]  # as measured, for each seed of the findings
    further_metrics: dict[str, PairedDifference | None]  # without a verdict

    @property
    def verdict(self) -> Verdict:
        """The verdict on `arm`."""
        return Verdict.NOT_RESOLVED if self.judgement is None else self.judgement.verdict


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
        _comparison(outcomes, pair, judgement)
        for pair, judgement in zip(question.pairs, judged.comparisons, strict=True)
    )
    # Caveats of a report are collected here, so that no layout can leave them out.
    is_matched, of_budget = budget_notes(outcomes)
    notes = (
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
        smallest_resolved=_smallest_resolved(question, judged),
        level=judged.level,
        look=judged.look,
        text=text_uncertainty(question, members),
        budget=None if question.budget is None else question.budget.metric,
        is_matched=is_matched,
        notes=notes,
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
    return read_file(Findings, path / FINDINGS if path.is_dir() else path)


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


def _comparison(outcomes: Outcomes, pair: Pair, judgement: Judgement | None) -> Comparison:
    question = outcomes.question
    # The interval is still shown for arms that do not compare, but no verdict is drawn from it.
    if judgement is not None and not outcomes.is_comparable(pair):
        judgement = dataclasses.replace(judgement, verdict=Verdict.NOT_RESOLVED)
    by_seed = [[outcomes.value(arm, seed, question.metric) for arm in pair] for seed in question.seeds]
    return Comparison(
        arm=pair[0],
        against=pair[1],
        judgement=judgement,
        differences=tuple(
            None if first is None or second is None else first - second for first, second in by_seed
        ),
        # Without a verdict: further tests would have to join the family of Holm's correction.
        further_metrics={name: _difference(outcomes, pair, name) for name in question.further_metrics},
    )


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


def _smallest_resolved(question: Question, judged: Judged) -> float | None:
    """Return the difference that these seeds resolve 4 times in 5; None if the noise is not known."""
    seeds = [len(judgement.seeds) for judgement in judged.comparisons if judgement is not None]
    if not seeds or not judged.noise.deviation:
        return None
    return smallest_resolved(
        # Of a pair: that of two runs.
        math.sqrt(2) * judged.noise.deviation,
        max(seeds),
        comparisons=len(question.pairs),
        degrees_of_freedom=judged.noise.degrees_of_freedom,
        level=judged.level,
        variance=question.rules.variance,
    )
