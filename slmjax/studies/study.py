"""A study: arms that differ in one aspect, the same seeds for each, and the results of their runs.

    arms = (Arm(name="narrow", experiment=...), Arm(name="wide", experiment=...))
    study = Study(name="width", arms=arms, seeds=(0, 1, 2), baseline="narrow")
    members = run_study(study, "studies/width")  # calling it again resumes an interrupted study

An arm may build on a run of another arm (`Arm.after`), also of an earlier study: a teacher, a model that is
continued. Its experiment then depends on that run's directory, which is unknown before; it counts as
SOURCE_RUN until then, so that a study can be planned, and moved.

A member is a run: an arm with a seed, which is used for the initial parameters, dropout and the order of the
data. Or it is a model derived from such a run, for example by rounding (`arms.py`). So a pair of arms sees
the same batches, and starts from the same parameters if the models are the same. Members are trained one
after another, all arms of the first seed before the second: an incomplete study has complete pairs.

    DIRECTORY/members.jsonl                    a line for each member that ended
    DIRECTORY/claims/ARM/seed-N/               who trained it, and its outcome (`claims.py`)
    DIRECTORY/ARM/seed-N/RUN                   its run directory
    DIRECTORY/ARM/seed-N/model                 a model derived from another member
"""

import dataclasses
import enum
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slmjax.config import fingerprint, near_names
from slmjax.stored_json import DamagedFile, check_object
from slmjax.studies.arms import Arm, Derived, check_printable, directory_name
from slmjax.studies.changes import with_changes
from slmjax.studies.claims import recorded_members
from slmjax.studies.design import Budget, LearningRates, Match, Recovery
from slmjax.studies.statistics.results_table import Rules
from slmjax.studies.stopping import SuccessiveHalving
from slmjax.telemetry.run_directory import Category, read_log, with_present_names
from slmjax.training.experiment import Experiment

log = logging.getLogger(__name__)

MEMBERS = "members.jsonl"
FINISHED = "finished"
DIVERGED = "diverged"
FAILED = "failed"
STOPPED = "stopped early"
SOURCE_RUN = Path("SOURCE_RUN")  # stands for the run that an arm builds on where that is not known


# Short names of metrics, and the fields that have them: a study compares whole runs, not their last sessions.
# Of members that were trained in one program, seconds and pace are a member's share, as if in turn.
_METRICS = {
    "tokens": ("run_tokens",),
    "seconds": ("run_seconds", "session_seconds"),  # earlier versions recorded the last session alone
    "tokens_per_second": ("session_tokens_per_second",),
    "memory_bytes": ("session_peak_memory_bytes",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Arms, seeds, and the criteria of verdicts, all fixed before anything is trained."""

    name: str
    arms: tuple[Arm | Derived, ...]  # derived arms after their sources
    seeds: tuple[
        int, ...
    ]  # at least 2 for a comparison, 3 or more to resolve all but the largest differences
    baseline: str  # name of the arm that every other is compared with
    # the metric of verdicts: a field of the result, or of the last evaluation in the log
    metric: str = "bits_per_byte"
    question: str = ""  # in words, for the report
    base: Experiment | None = None  # the experiment of arms that only name their changes
    lower_is_better: bool = True  # whether a lower metric is better
    further_metrics: tuple[str, ...] = ()  # to report without a verdict
    budget: Budget = Budget()
    matched: tuple[Match, ...] = ()  # made equal to the baseline's before anything is trained
    tune: LearningRates | None = None  # each arm is trained at its own best learning rate
    comparisons: tuple[tuple[str, str], ...] = ()  # (arm, other arm), besides each arm with the baseline
    # a difference of the metric up to this counts as none: "equal" is then a verdict (none: it is not)
    equal_within: float | None = None
    smallest_effect: float | None = None  # the smallest difference worth having, for power
    # arms that are behind on the way are not trained to the end, and have no verdict (none: all are)
    stopping: SuccessiveHalving | None = None
    # numbers of seeds at which verdicts are drawn, so that seeds may be added (none: once, with all seeds)
    looks: tuple[int, ...] = ()
    confidence: float = 0.95  # of intervals; the probability of any false verdict is at most 1 - confidence
    recovery: Recovery | None = None  # for a report on what training recovers of the cost of quantization
    # studies that are run before, and whose runs arms build on; each has a directory in the same directory
    earlier: "tuple[Study, ...]" = ()
    ladder: str = ""  # name of the question that is asked at several sizes (`combinators.ladder`)
    size: str = ""  # the size of this study on the ladder
    # of the baseline's loss over compute on a ladder, such as the entropy of the text where it is known
    asymptote: float = 0.0

    def __post_init__(self) -> None:
        check_printable(self.name, what="the study's name")
        # A question may have several lines.
        check_printable("".join(self.question.split()), what="the study's question")
        names = [arm.name for arm in self.arms]
        # In lower case: some file systems ignore case.
        directories = [arm.directory.lower() for arm in self.arms]
        if len(set(directories)) < len(directories):
            raise ValueError(
                f"arms {', '.join(names)}: two have the same name or the same directory: rename one"
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds are {self.seeds}: give at least one, and each only once")
        if self.baseline not in names:
            raise ValueError(
                f"the baseline {self.baseline!r} is not an arm.{near_names(self.baseline, names)} Arms are "
                f"{', '.join(names)}"
            )
        _ = self.rules  # which checks its fields
        if not math.isfinite(self.asymptote):
            raise ValueError(f"the asymptote of the study is {self.asymptote}: give a finite loss, such as 0")
        for i, arm in enumerate(self.arms):
            # Members are made in this order, and a derived one needs its source.
            if isinstance(arm, Derived) and arm.source not in names[:i]:
                near = near_names(arm.source, names[:i])
                raise ValueError(
                    f"{arm.name!r} is derived from {arm.source!r}, which is not an arm before it.{near} "
                    f"Before it are {names[:i]}"
                )
        _check_sources(self)
        if self.recovery is not None:
            _check_recovery(self, self.recovery)

    @property
    def directory(self) -> str:
        """Name of the study's directory in that of several studies."""
        return directory_name(self.name)

    @property
    def rules(self) -> Rules:
        """What turns results into verdicts."""
        return Rules(
            confidence=self.confidence,
            lower_is_better=self.lower_is_better,
            equal_within=self.equal_within,
            smallest_effect=self.smallest_effect,
            looks=self.looks,
        )

    def experiment(self, name: str, seed: int, *, run: Path | None = None) -> Experiment:
        """Return the experiment of an arm, before the study sets seeds and directory.

        For a derived arm, it is that of its source.

        Args:
          name: of the arm.
          seed: of the member.
          run: of an arm that builds on another's run: that run's directory (none: SOURCE_RUN).
        """
        arm = self.trained(name)
        if callable(arm.experiment):
            source = () if arm.after is None else (run or SOURCE_RUN,)
            experiment = arm.experiment(seed, *source)
        elif (experiment := arm.experiment or self.base) is None:
            raise ValueError(f"arm {name!r} has no experiment: give the arm one, or the study a base")
        try:
            return arm.changes(experiment) if callable(arm.changes) else with_changes(experiment, arm.changes)
        except ValueError as error:
            raise ValueError(f"arm {arm.name!r}: {error}") from None

    def source(self, name: str, seed: int) -> "tuple[Study, str, int] | None":
        """Return the member that an arm's member builds on: study, arm and seed; None if it builds on none.

        An earlier study with a single seed has one run for all seeds, such as a teacher.
        """
        arm = self.trained(name)
        if arm.after is None:
            return None
        if isinstance(arm.after, str):
            return self, arm.after, seed
        earlier = next(study for study in self.earlier if study.name == arm.after[0])
        return earlier, arm.after[1], earlier.seeds[0] if len(earlier.seeds) == 1 else seed

    def arm(self, name: str) -> Arm | Derived:
        """Return the arm of a name. Raises ValueError if there is none."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        names = [arm.name for arm in self.arms]
        raise ValueError(
            f"{name!r} is not an arm of the study.{near_names(name, names)} Arms are {', '.join(names)}"
        )

    def trained(self, name: str) -> Arm:
        """Return the arm of a name; for a derived arm, the trained arm that it comes from."""
        arm = self.arm(name)
        # A derived arm may be derived from another derived one.
        return self.trained(arm.source) if isinstance(arm, Derived) else arm


def _check_sources(study: Study) -> None:
    """Raise ValueError for an arm that builds on no arm there is."""
    names = [study.name for study in study.earlier]
    if len({name.lower() for name in (*names, study.name)}) < len(names) + 1:
        raise ValueError(f"studies {', '.join((*names, study.name))}: two have the same name: rename one")
    before: list[str] = []
    for arm in study.arms:
        if isinstance(arm, Arm) and isinstance(arm.after, str) and arm.after not in before:
            raise ValueError(
                f"{arm.name!r} is after {arm.after!r}, which is not an arm before it."
                f"{near_names(arm.after, before)} Before it are {before}; an arm of one of the study's "
                "`earlier` studies is named after=(STUDY, ARM)"
            )
        if isinstance(arm, Arm) and isinstance(arm.after, tuple):
            earlier = next((each for each in study.earlier if each.name == arm.after[0]), None)
            if earlier is None:
                near = near_names(arm.after[0], names)
                raise ValueError(
                    f"{arm.name!r} is after an arm of {arm.after[0]!r}, which is not among the study's "
                    f"earlier studies.{near} They are {names}"
                )
            earlier.arm(arm.after[1])  # which checks the name
        before.append(arm.name)


def _check_recovery(study: Study, recovery: Recovery) -> None:
    """Raise ValueError for roles of arms that do not exist, or that one arm has twice."""
    # A wrong name would otherwise show only after hours of training.
    for name in (recovery.reference, *recovery.rounded, *(rounded for _, rounded in recovery.pairs)):
        study.arm(name)
    for arm, rounded in recovery.pairs:
        # With two equal arms, R is constant or undefined.
        if len({arm, rounded, recovery.reference}) < 3:
            raise ValueError(
                f"the recovery of {arm!r} over {rounded!r} with {recovery.reference!r} needs three different "
                "arms"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """The outcome of one arm with one seed: a line of members.jsonl."""

    arm: str
    seed: int
    fingerprint: str  # of its experiment, and of the derivation of a derived member
    status: str  # "finished", "diverged", "failed" or "stopped early"
    result: dict[str, Any]  # fields of its result.json; empty if it failed
    evaluation: dict[str, Any]  # last evaluation on all held-out text; empty if there is none
    error: str | None = None  # reason of a failure, or of stopping early

    def metric_value(self, name: str) -> float | None:
        """Return a metric of result or evaluation; None if not finite, or the member did not finish."""
        # JSON has flags and texts as well; only numbers can be compared.
        fields = {**self.evaluation, **self.result}
        value = next((fields[key] for key in _METRICS.get(name, (name,)) if key in fields), None)
        if self.status != FINISHED or isinstance(value, bool) or not isinstance(value, int | float):
            return None
        if name in ("seconds", "tokens_per_second"):
            members = max(self.population, 1)
            value = value / members if name == "seconds" else value * members
        return float(value) if math.isfinite(value) else None

    @property
    def population(self) -> int:
        """The number of runs that were trained in one program with it, itself included."""
        population = self.result.get("population", 1)
        return population if isinstance(population, int) else 1

    @property
    def compile_seconds(self) -> float:
        """Its share of the seconds in which its last session compiled programs; 0 if that is not known."""
        by_category = self.result.get("session_seconds_by_category")
        seconds = by_category.get(Category.COMPILE.value) if isinstance(by_category, dict) else None
        return seconds / max(self.population, 1) if isinstance(seconds, float) else 0.0

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the metrics."""
        names = dict.fromkeys((*self.result, *self.evaluation, *_METRICS))
        return tuple(name for name in names if self.metric_value(name) is not None)


class OnChange(enum.Enum):
    """Handling of members whose experiment has changed since they were trained."""

    REFUSE = "refuse"  # an error that names them; nothing is trained
    REDO = "redo"  # train them again; the old runs stay in the directory


def member_experiment(study: Study, arm: str, seed: int, *, run: Path | None = None) -> Experiment:
    """Return the experiment of an arm with a seed, for the initial parameters and the order of the data.

    For a derived arm, it is that of its source. `run` is the directory of the run that an arm builds on
    (`Study.experiment`).
    """
    experiment = study.experiment(arm, seed, run=run)
    # The directory of the study is not part of the experiment, so that it can be moved.
    settings = dataclasses.replace(experiment.run, seed=seed, directory="runs")
    # One seed for parameters and data: arms of a seed then see the same batches.
    return dataclasses.replace(experiment, run=settings, data=dataclasses.replace(experiment.data, seed=seed))


def member_fingerprint(study: Study, arm: str, seed: int) -> str:
    """Return a hash of the experiment and of what it builds on or is derived from; members match by it."""
    if isinstance(derived := study.arm(arm), Derived):
        # If the source is trained again with another experiment, the derived model is stale as well.
        source = member_fingerprint(study, derived.source, seed)
        # The keys are part of the hash: they stay as they were.
        return fingerprint({"source": source, "recipe": derived.derivation})
    experiment = member_experiment(study, arm, seed)
    if (member := study.source(arm, seed)) is None:
        return fingerprint(experiment)
    # The directory of the run that it builds on is no part of it, but that run's experiment is.
    return fingerprint({"after": member_fingerprint(*member), "experiment": experiment})


_MEMBER_FIELDS = {"arm": str, "seed": int, "fingerprint": str, "status": str, "result": dict}
_MEMBER_FIELDS |= {"evaluation": dict}
_REMOVE_RECORD = "remove it, and the member is trained again or read from its run"


def member_of(record: Mapping[str, Any], *, name: str) -> Member:
    """Return the member that a record describes; `name` is that of the record, for errors.

    Raises:
      DamagedFile: it describes none.
    """
    fields = check_object(record, _MEMBER_FIELDS, optional={"error": str}, name=name, remedy=_REMOVE_RECORD)
    try:
        directory_name(fields["arm"])
    except ValueError as error:
        raise DamagedFile(f"{name} is of no arm ({error}): {_REMOVE_RECORD}") from None
    known = {field.name: fields[field.name] for field in dataclasses.fields(Member) if field.name in fields}
    return Member(**{**known, "result": with_present_names(fields["result"])})


def read_members(
    study: Study, directory: str | Path, *, on_change: OnChange = OnChange.REFUSE
) -> tuple[Member, ...]:
    """Read the members that ended, by seed and arm in the order of the study.

    Of several lines about a member, the last counts.

    Raises:
      ValueError: the experiment of a member has changed, and `on_change` is not REDO.
    """
    path = Path(directory) / MEMBERS
    # The file is only appended to, so that an interruption loses no line.
    records = [
        (f"a record of {path}", record)
        for record in (read_log(path, kind="member") if path.is_file() else [])
    ]
    # Of members that were claimed the claim has the outcome: the log may lack lines of other hosts.
    records += [(str(file), record) for file, record in recorded_members(Path(directory))]
    latest: dict[tuple[str, int], Member] = {}
    for name, record in records:
        member = member_of(record, name=name)
        latest[member.arm, member.seed] = member
    # Members of arms and seeds that the study no longer has are skipped.
    keys = [(arm.name, seed) for seed in study.seeds for arm in study.arms]
    members = [latest[key] for key in keys if key in latest]
    # Results of different experiments must never be compared under one name.
    stale = [
        member
        for member in members
        if member.fingerprint != member_fingerprint(study, member.arm, member.seed)
    ]
    if stale and on_change is OnChange.REFUSE:
        raise ValueError(
            f"{directory}: members of {', '.join(sorted({member.arm for member in stale}))} were trained "
            "with another experiment than the study has now. Undo the change, use another directory, or "
            "train them again with on_change=OnChange.REDO (--redo of `slmjax ablate`)"
        )
    return tuple(member for member in members if member not in stale)
