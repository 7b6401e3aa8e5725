"""A study: arms that differ in one aspect, the same seeds for each, and the results of their runs.

    arms = (Arm(name="narrow", experiment=...), Arm(name="wide", experiment=...))
    study = Study(name="width", arms=arms, seeds=(0, 1, 2), baseline="narrow")
    members = run_study(study, "studies/width")  # calling it again resumes an interrupted study

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
from slmjax.stored_json import check_object
from slmjax.studies.arms import Arm, Derived
from slmjax.studies.changes import with_changes
from slmjax.studies.claims import recorded_members
from slmjax.studies.design import Budget, LearningRates, Match
from slmjax.studies.statistics.results_table import Rules
from slmjax.telemetry.run_directory import read_log, with_present_names
from slmjax.training.experiment import Experiment

log = logging.getLogger(__name__)

MEMBERS = "members.jsonl"
FINISHED = "finished"
DIVERGED = "diverged"
FAILED = "failed"


# Short names of metrics, and the fields that have them: a study compares whole runs, not their last sessions.
_METRICS = {
    "tokens": ("run_tokens",),
    "seconds": ("run_seconds", "session_seconds"),  # earlier versions recorded the last session alone
    "tokens_per_second": ("session_tokens_per_second",),
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
    # numbers of seeds at which verdicts are drawn, so that seeds may be added (none: once, with all seeds)
    looks: tuple[int, ...] = ()
    confidence: float = 0.95  # of intervals; the probability of any false verdict is at most 1 - confidence

    def __post_init__(self) -> None:
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
        for i, arm in enumerate(self.arms):
            # Members are made in this order, and a derived one needs its source.
            if isinstance(arm, Derived) and arm.source not in names[:i]:
                near = near_names(arm.source, names[:i])
                raise ValueError(
                    f"{arm.name!r} is derived from {arm.source!r}, which is not an arm before it.{near} "
                    f"Before it are {names[:i]}"
                )

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

    def experiment(self, name: str, seed: int) -> Experiment:
        """Return the experiment of an arm, before the study sets seeds and directory.

        For a derived arm, it is that of its source.
        """
        arm = self.trained(name)
        if isinstance(arm.experiment, Experiment):
            experiment = arm.experiment
        elif arm.experiment is not None:
            experiment = arm.experiment(seed)
        elif self.base is not None:
            experiment = self.base
        else:
            raise ValueError(f"arm {name!r} has no experiment: give the arm one, or the study a base")
        try:
            return arm.changes(experiment) if callable(arm.changes) else with_changes(experiment, arm.changes)
        except ValueError as error:
            raise ValueError(f"arm {arm.name!r}: {error}") from None

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """The outcome of one arm with one seed: a line of members.jsonl."""

    arm: str
    seed: int
    fingerprint: str  # of its experiment, and of the derivation of a derived member
    status: str  # "finished", "diverged" or "failed"
    result: dict[str, Any]  # fields of its result.json; empty if it failed
    evaluation: dict[str, Any]  # last evaluation on all held-out text; empty if there is none
    error: str | None = None  # reason of a failure

    def metric_value(self, name: str) -> float | None:
        """Return a metric of result or evaluation; None if not finite, or the member did not finish."""
        # JSON has flags and texts as well; only numbers can be compared.
        fields = {**self.evaluation, **self.result}
        value = next((fields[key] for key in _METRICS.get(name, (name,)) if key in fields), None)
        if self.status != FINISHED or isinstance(value, bool) or not isinstance(value, int | float):
            return None
        return float(value) if math.isfinite(value) else None

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the metrics."""
        names = dict.fromkeys((*self.result, *self.evaluation, *_METRICS))
        return tuple(name for name in names if self.metric_value(name) is not None)


class OnChange(enum.Enum):
    """Handling of members whose experiment has changed since they were trained."""

    REFUSE = "refuse"  # an error that names them; nothing is trained
    REDO = "redo"  # train them again; the old runs stay in the directory


def member_experiment(study: Study, arm: str, seed: int) -> Experiment:
    """Return the experiment of an arm with a seed, for the initial parameters and the order of the data.

    For a derived arm, it is that of its source.
    """
    experiment = study.experiment(arm, seed)
    # The directory of the study is not part of the experiment, so that it can be moved.
    run = dataclasses.replace(experiment.run, seed=seed, directory="runs")
    # One seed for parameters and data: arms of a seed then see the same batches.
    return dataclasses.replace(experiment, run=run, data=dataclasses.replace(experiment.data, seed=seed))


def member_fingerprint(study: Study, arm: str, seed: int) -> str:
    """Return a hash of the experiment and, if derived, the derivation; members match by it."""
    if isinstance(derived := study.arm(arm), Derived):
        # If the source is trained again with another experiment, the derived model is stale as well.
        source = member_fingerprint(study, derived.source, seed)
        # The keys are part of the hash: they stay as they were.
        return fingerprint({"source": source, "recipe": derived.derivation})
    return fingerprint(member_experiment(study, arm, seed))


_MEMBER_FIELDS = {"arm": str, "seed": int, "fingerprint": str, "status": str, "result": dict}
_MEMBER_FIELDS |= {"evaluation": dict}
_REMOVE_LINE = "remove the line, and the member is trained again or read from its run"


def member_of(record: Mapping[str, Any], *, name: str) -> Member:
    """Return the member that a record describes; `name` is that of the record, for errors.

    Raises:
      DamagedFile: it describes none.
    """
    fields = check_object(record, _MEMBER_FIELDS, optional={"error": str}, name=name, remedy=_REMOVE_LINE)
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
            "train them again with on_change=OnChange.REDO"
        )
    return tuple(member for member in members if member not in stale)
