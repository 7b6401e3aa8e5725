"""A study: arms that differ in one aspect, the same seeds for each, and the results of their runs.

    arms = (Arm(name="narrow", experiment=...), Arm(name="wide", experiment=...))
    study = Study(name="width", arms=arms, seeds=(0, 1, 2), baseline="narrow")
    members = run_study(study, "studies/width")  # calling it again resumes an interrupted study

A member is a run: an arm with a seed, which is used for the initial parameters, dropout and the order of the
data. Or it is a model derived from such a run, for example by rounding (`arms.py`). So a pair of arms sees
the same batches, and starts from the same parameters if the models are the same. Members are trained one
after another, all arms of the first seed before the second: an incomplete study has complete pairs.

    DIRECTORY/members.jsonl                    a line for each member that ended
    DIRECTORY/ARM/seed-N/RUN                   its run directory
    DIRECTORY/ARM/seed-N/model                 a model derived from another member
"""

import dataclasses
import enum
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from slmjax.config import fingerprint, near_names
from slmjax.runner import trainer
from slmjax.stored_json import check_object
from slmjax.studies.arms import Arm, Derived
from slmjax.studies.derived import derive
from slmjax.telemetry.run_directory import RunLog, plain, read_log, read_result, with_present_names
from slmjax.training.experiment import Experiment, read_experiment, with_absolute_paths

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
class Budget:
    """The metric that must be equal for all arms for a fair comparison."""

    metric: str = "tokens"  # of each run, over all of its sessions: tokens, seconds, step
    tolerance: float = 0.0  # largest difference between arms of a seed, as a fraction of the largest value

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 1:
            raise ValueError(
                f"the budget's tolerance is {self.tolerance}: give a fraction from 0 to below 1, such as 0.02"
            )


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
    lower_is_better: bool = True  # whether a lower metric is better
    further_metrics: tuple[str, ...] = ()  # to report without a verdict
    budget: Budget = Budget()
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
        if not 0 < self.confidence < 1:
            raise ValueError(
                f"confidence is {self.confidence}: give a fraction between 0 and 1, such as 0.95"
            )
        for i, arm in enumerate(self.arms):
            # Members are made in this order, and a derived one needs its source.
            if isinstance(arm, Derived) and arm.source not in names[:i]:
                near = near_names(arm.source, names[:i])
                raise ValueError(
                    f"{arm.name!r} is derived from {arm.source!r}, which is not an arm before it.{near} "
                    f"Before it are {names[:i]}"
                )

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


class Interrupted(RuntimeError):
    """The study was stopped during the training of a member, whose state is saved."""


Train = Callable[..., trainer.Result]  # as `trainer.train`


def member_experiment(study: Study, arm: str, seed: int) -> Experiment:
    """Return the experiment of an arm with a seed, for the initial parameters and the order of the data.

    For a derived arm, it is that of its source.
    """
    experiment = study.trained(arm).of_seed(seed)
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
    latest: dict[tuple[str, int], Member] = {}
    for record in read_log(path, kind="member") if path.is_file() else []:
        fields = check_object(
            record,
            _MEMBER_FIELDS,
            optional={"error": str},
            name=f"a record of {path}",
            remedy=_REMOVE_LINE,
        )
        known = {
            field.name: fields[field.name] for field in dataclasses.fields(Member) if field.name in fields
        }
        member = Member(**{**known, "result": with_present_names(fields["result"])})
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


def run_study(
    study: Study,
    directory: str | Path,
    *,
    on_change: OnChange = OnChange.REFUSE,
    train: Train = trainer.train,
    console: Console | None = None,
) -> tuple[Member, ...]:
    """Train the members that have not ended yet, and return all of them.

    A member that diverges or fails is recorded as such, and the study continues. Called again, it skips
    members that finished or diverged, retries those that failed, and resumes an interrupted run from its
    newest checkpoint.

    Args:
      study: the arms and seeds.
      directory: directory of runs and records; created if it does not exist.
      on_change: handling of members whose experiment has changed.
      train: a replacement for `trainer.train`.
      console: where to show progress (none: standard output).

    Raises:
      ValueError: an experiment has changed (`read_members`), or there are several processes.
      Interrupted: the current run was stopped by a signal, and has saved its state.
    """
    # Each process would train, record and skip members on its own.
    if jax.process_count() > 1:
        raise ValueError(
            "a study runs in one process: use one host, or train its members separately on several hosts"
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    done = {
        (member.arm, member.seed): member for member in read_members(study, directory, on_change=on_change)
    }
    # Seeds in the outer loop: an interrupted study has complete pairs.
    with RunLog(directory / MEMBERS) as records:
        for seed in study.seeds:
            for arm in study.arms:
                # A failure may be of the machine, such as a full disk, and is tried again; divergence is a
                # result.
                if (arm.name, seed) in done and done[arm.name, seed].status != FAILED:
                    continue
                if isinstance(arm, Derived):
                    member = _derive_member(study, arm, seed, directory, source=done[arm.source, seed])
                else:
                    member = _train_member(study, arm, seed, directory, train=train, console=console)
                # Written as soon as a member ends: a later crash cannot lose it.
                records.write("member", **dataclasses.asdict(member))
                done[arm.name, seed] = member
    return read_members(study, directory)


def _train_member(
    study: Study, arm: Arm, seed: int, directory: Path, *, train: Train, console: Console | None
) -> Member:
    """Start or resume the run of a member."""
    # The fingerprint is that of the plan, without the directory of the study.
    plan = member_experiment(study, arm.name, seed)
    run_parent = (directory / arm.directory / f"seed-{seed}").absolute()
    experiment = with_absolute_paths(
        dataclasses.replace(plan, run=dataclasses.replace(plan.run, directory=str(run_parent)))
    )
    about: dict[str, Any] = {"arm": arm.name, "seed": seed, "fingerprint": fingerprint(plan)}
    log.info("study %s: arm %s, seed %d", study.name, arm.name, seed)
    # A run may have ended just before its line was written: then only the line is missing.
    run, result = _earlier_run(run_parent, experiment)
    if result is None:
        try:
            result = plain(dataclasses.asdict(train(experiment, resume=run, console=console)))
        except Exception as error:  # a failure is a result too, and no reason to lose the other arms
            log.exception("study %s: arm %s, seed %d failed", study.name, arm.name, seed)
            return Member(
                **about, status=FAILED, result={}, evaluation={}, error=f"{type(error).__name__}: {error}"
            )
    # A signal stops the whole study, not only this member.
    if result["status"] not in (FINISHED, DIVERGED):
        raise Interrupted(
            f"stopped at arm {arm.name}, seed {seed}, whose run is saved: run the study again to resume it"
        )
    return Member(
        **about, status=result["status"], result=result, evaluation=_final_evaluation(Path(result["run_dir"]))
    )


def _derive_member(study: Study, arm: Derived, seed: int, directory: Path, *, source: Member) -> Member:
    """Derive a member from another arm's of the same seed."""
    about: dict[str, Any] = {
        "arm": arm.name,
        "seed": seed,
        "fingerprint": member_fingerprint(study, arm.name, seed),
    }
    # A failure, and so retried: its source may be trained by then.
    if source.status != FINISHED:
        error = f"{source.arm} is {source.status} with this seed, so there is nothing to derive it from"
        return Member(**about, status=FAILED, result={}, evaluation={}, error=error)
    log.info("study %s: arm %s, seed %d, derived from %s", study.name, arm.name, seed, source.arm)
    out = (directory / arm.directory / f"seed-{seed}" / "model").absolute()
    try:
        result, evaluation = derive(
            arm.derivation, source.result, member_experiment(study, arm.name, seed), out=out
        )
    except Exception as error:  # as for a training
        log.exception("study %s: arm %s, seed %d failed", study.name, arm.name, seed)
        return Member(
            **about, status=FAILED, result={}, evaluation={}, error=f"{type(error).__name__}: {error}"
        )
    return Member(**about, status=FINISHED, result=plain(result), evaluation=plain(evaluation))


def _earlier_run(run_parent: Path, experiment: Experiment) -> tuple[Path | None, dict[str, Any] | None]:
    """Return the newest run of this experiment that can be resumed, and its result if it ended unrecorded."""
    for run in sorted(
        (path.parent for path in run_parent.glob("[!.]*/config.json")),
        key=lambda run: run.stat().st_mtime,
        reverse=True,
    ):
        try:
            # Runs of an earlier version of the arm stay in the directory, and must not be resumed.
            if fingerprint(read_experiment(run)) != fingerprint(experiment):
                continue
        except ValueError:  # written by a version with other settings
            continue
        if (result := read_result(run)) is not None and result["status"] in (FINISHED, DIVERGED):
            return run, result
        # A run that was stopped before its first checkpoint starts again.
        if any(path.name.isdigit() for path in (run / "checkpoints").glob("*")):
            return run, None
    return None, None


def _final_evaluation(run: Path) -> dict[str, Any]:
    """Return the log's last evaluation on all held-out text."""
    path = run / "log.jsonl"
    records = (
        [record for record in read_log(path, kind="eval") if record.get("complete")] if path.is_file() else []
    )
    return (
        {name: value for name, value in records[-1].items() if name not in ("kind", "time")}
        if records
        else {}
    )
