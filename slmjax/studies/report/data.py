"""Everything that the report of a study shows, as report.json holds it.

    report = read_report("studies/width/report.json")
    write_report_data(report, "studies/width/report.json")

The file is enough to write all other files of the report again: it needs neither the run directories nor the
study file. Its classes hold numbers and texts alone, so that it can be read by versions whose studies and
findings have other fields. A field that is added to them needs `config.added_field`: files lack it.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slmjax.atomic_files import write_text
from slmjax.config import ConfigError, added_field, from_json, to_json
from slmjax.stored_json import read_object

REPORT = "report.json"
VERSION = 1

Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds."""

    num_values: int
    mean: float
    deviation: float | None = None  # standard deviation of one seed; None for a single one
    error: float | None = None  # standard error of the mean
    interval: Interval | None = None  # of the mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmReport:
    """One arm over its seeds."""

    name: str
    about: str = ""  # such as the arm that it is derived from
    seeds: tuple[int, ...] = ()  # that finished with a finite metric
    metric: Estimate | None = None
    further_metrics: dict[str, Estimate | None] = dataclasses.field(default_factory=dict)
    # by name (`tables.COSTS`): parameters, flops, tokens, seconds, deployed_bytes, ...; without unknown ones
    costs: dict[str, float] = dataclasses.field(default_factory=dict)
    # standard errors of the costs that vary between runs, such as seconds
    cost_errors: tuple[tuple[str, float], ...] = added_field((), before=())
    ended: int = 0  # runs that finished, diverged, failed, or were stopped early
    diverged: int = 0
    failed: int = 0
    stopped_early: int = 0  # since the arm was not among the best
    diverged_interval: Interval | None = None  # of the probability that a run diverges


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemberReport:
    """One run: an arm with a seed."""

    arm: str
    seed: int
    status: str  # finished, diverged, failed, stopped early
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)  # finite ones
    error: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonReport:
    """One arm minus another."""

    arm: str
    against: str
    verdict: str  # in words: "better", "worse", "equal", "not resolved"
    seeds: tuple[int, ...] = ()  # paired
    imputed: tuple[int, ...] = ()  # of these: one arm diverged, and the worst value stands for it
    differences: tuple[tuple[int, float], ...] = ()  # each seed with its difference, as measured
    difference: float | None = None  # their mean
    error: float | None = None  # standard error of the mean
    degrees_of_freedom: float | None = None
    variance: str | None = None  # the deviation that the error comes from: "own" or "pooled"
    interval: Interval | None = None  # of this comparison alone
    bootstrap_interval: Interval | None = None
    p_value: float | None = None
    adjusted_p: float | None = None  # for all comparisons of the study
    # of the two one-sided tests against the margin, for all comparisons of the study
    adjusted_equal_p: float | None = None
    seeds_needed: int | None = None  # to resolve what is not resolved
    further_metrics: dict[str, Estimate | None] = dataclasses.field(default_factory=dict)  # differences
    reason: str = added_field("", before="")  # why it is not resolved, as a clause; empty if it is


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseReport:
    """The noise that verdicts were drawn from."""

    deviation: float | None  # between seeds, of one run, pooled over arms
    degrees_of_freedom: int
    own: dict[str, float]  # of one run of each arm
    noisy: tuple[str, ...]  # arms that are noisier than the others
    equality_p: float | None  # of the test that all arms are equally noisy
    smallest_resolved: float | None = None  # difference found 4 times in 5 with these seeds
    notes: tuple[str, ...] = ()  # such as what a ledger of earlier studies has
    apart: tuple[str, ...] = ()  # noisy arms, and those that may be: judged by their own differences


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextNoise:
    """Uncertainty of one comparison by its seeds, and by its held-out text."""

    arm: str
    against: str
    seeds_error: float | None  # standard error of the difference by seeds
    text_error: float | None  # by documents of the held-out text
    documents: int | None = None
    advice: str = ""  # which of both would reduce the interval more


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatchReport:
    """One quantity of one arm that was made equal to the baseline's."""

    arm: str
    quantity: str
    target: float | None
    before: float | None
    after: float | None
    changed: str  # what was changed, with the values before and after
    is_met: bool
    text: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TunedReport:
    """The learning rate of one arm, and how it was chosen."""

    arm: str
    rate: float
    tried: tuple[tuple[float, float | None], ...]  # each rate with its metric, None if it did not finish
    seeds: tuple[int, ...] = ()  # that chose
    is_resolved: bool = True  # whether the optimum is inside the rates that were tried
    sensitivity: float | None = None  # of the metric to the rate
    text: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LadderRow:
    """One comparison at one size of a ladder."""

    arm: str
    against: str
    size: str
    flops: float | None  # training FLOPs of a run of the arm
    verdict: str
    difference: float | None
    error: float | None
    interval: Interval | None
    speedup: str = ""  # how much more compute the baseline needs, in words; empty if that is not known


@dataclasses.dataclass(frozen=True, kw_only=True)
class LadderReport:
    """The same question at several sizes."""

    name: str
    rows: tuple[LadderRow, ...]
    trends: tuple[str, ...]  # sentences on the trend of each comparison over the sizes
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """A learning curve of one arm: the mean over its finished runs, the lowest and the highest of them."""

    arm: str
    steps: tuple[int, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    num_runs: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class DivergedCurve:
    """The learning curve of a run that diverged."""

    arm: str
    seed: int
    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurveChart:
    """Learning curves of all arms in one chart."""

    name: str
    title: str
    about: str
    curves: tuple[Curve, ...]
    diverged: tuple[DivergedCurve, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SettingReport:
    """A setting that differs between arms."""

    path: str
    values: tuple[str, ...]  # by arm of `StudyReport.settings_of`


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyReport:
    """A study and its findings."""

    study: str
    metric: str
    lower_is_better: bool
    baseline: str
    arms: tuple[ArmReport, ...]
    comparisons: tuple[ComparisonReport, ...]
    date: str  # on which the newest result was recorded: YYYY-MM-DD
    question: str = ""
    confidence: float = 0.95
    seeds: tuple[int, ...] = ()
    expected_runs: int | None = None  # of the complete study; None where that is not known
    equal_within: float | None = None
    smallest_effect: float | None = None
    look: str = ""  # about fixed looks, if the study has them
    members: tuple[MemberReport, ...] = ()
    budget: str = ""  # a sentence on whether the arms had the same one
    noise: NoiseReport | None = None
    text: tuple[TextNoise, ...] = ()
    matched: tuple[MatchReport, ...] = ()
    tuned: tuple[TunedReport, ...] = ()
    curves: tuple[CurveChart, ...] = ()
    settings_of: tuple[str, ...] = ()
    settings: tuple[SettingReport, ...] = ()
    changes: tuple[str, ...] = ()  # of the study, since it was locked
    notes: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    commands: tuple[str, ...] = ()  # that reproduce the study
    correction: str = added_field("Holm", before="Holm")  # of p values for the number of comparisons
    # whether the smallest difference worth having would be found 4 times in 5; None if that is not known
    could_answer: bool | None = added_field(None, before=None)
    # probability that it is resolved with these seeds, and the seeds that resolve it 4 times in 5
    smallest_effect_power: float | None = added_field(None, before=None)
    smallest_effect_seeds: int | None = added_field(None, before=None)
    ladder: LadderReport | None = added_field(None, before=None)
    version: int = VERSION  # of report.json


# Halves of surrogate pairs and control characters, such as those of names from elsewhere.
_UNPRINTABLE = re.compile("[\\x00-\\x08\\x0b\\x0c\\x0e-\\x1f\\x7f-\\x9f\\ud800-\\udfff\\ufffe\\uffff]")


def printable(report: StudyReport, *, hidden: Mapping[str, str] | None = None) -> StudyReport:
    """Return a report whose texts every format can hold.

    Args:
      report: the report.
      hidden: parts of texts to replace, such as the paths of directories.
    """
    rewritten = _rewritten(report, hidden or {})
    assert isinstance(rewritten, StudyReport)
    return rewritten


def _rewritten(value: Any, hidden: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        for part, instead in hidden.items():
            value = value.replace(part, instead)
        return _UNPRINTABLE.sub("\ufffd", value)
    if isinstance(value, tuple):
        return tuple(_rewritten(item, hidden) for item in value)
    if isinstance(value, dict):
        return {_rewritten(key, hidden): _rewritten(item, hidden) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **{name: _rewritten(item, hidden) for name, item in fields.items()})
    return value


def read_report(path: str | Path) -> StudyReport:
    """Return the report that a report.json holds.

    Raises:
      ValueError: there is no such file, it is damaged, or a newer version of slmjax wrote it.
    """
    path = Path(path)
    remedy = "restore it from a copy, or write it again with `slmjax report STUDY_DIR`"
    try:
        data = read_object(path, {"version": int, "study": str}, remedy=remedy)
    except FileNotFoundError as error:
        raise ValueError(f"there is no {path}: `slmjax report STUDY_DIR` writes it") from error
    if data["version"] > VERSION:
        raise ValueError(
            f"{path} has version {data['version']}, and this slmjax reads versions up to {VERSION}: install "
            "a newer slmjax"
        )
    try:
        return from_json(StudyReport, data)
    except ConfigError as error:
        raise ValueError(f"{path}: {str(error).rstrip('.')}: {remedy}") from error


def write_report_data(report: StudyReport, path: str | Path) -> Path:
    """Write report.json, and return its path."""
    return write_text(Path(path), f"{_compact(to_json(report))}\n")


def _compact(value: Any, indent: str = "") -> str:
    """Return JSON with a line for each field and record, and lists of numbers or texts in one line."""
    # A line for each number of a curve would make files of a repository ten times as long.
    inner = indent + " "
    if isinstance(value, dict) and value:
        fields = [f"{inner}{json.dumps(key)}: {_compact(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(fields) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        items = [f"{inner}{_compact(item, inner)}" for item in value]
        return "[\n" + ",\n".join(items) + f"\n{indent}]"
    return json.dumps(value, allow_nan=False)
