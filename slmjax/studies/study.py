"""A study: arms that differ in what is asked about, the same seeds for each, and what their runs came to.

    arms = (Arm(name="narrow", experiment=...), Arm(name="wide", experiment=...))
    study = Study(name="width", arms=arms, seeds=(0, 1, 2), baseline="narrow")
    members = run_study(study, "studies/width")      # the same call again goes on where it was stopped

A member is one run: an arm with a seed, which is that of the initial parameters and dropout and that of the
data's order; or it is a model that is made of such a run's, rounded for one (`arms.py`). So a pair of arms
sees the same batches, and begins alike where the models are alike. Members are trained one after another, all
arms of the first seed before the second: a study that is cut short has whole pairs.

    DIRECTORY/members.jsonl                    a line for each member that came to an end
    DIRECTORY/ARM/seed-N/RUN                   its run directory
    DIRECTORY/ARM/seed-N/model                 a model that was made of another member's
"""

import dataclasses
import enum
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from slmjax.config import fingerprint, near_names
from slmjax.runner import trainer
from slmjax.studies.arms import Arm, Derived
from slmjax.studies.derived import derive
from slmjax.telemetry.run_directory import RunLog, plain, read_log
from slmjax.training.experiment import Experiment, read_experiment, with_absolute_paths

log = logging.getLogger(__name__)

MEMBERS = "members.jsonl"
FINISHED = "finished"
DIVERGED = "diverged"
FAILED = "failed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """What all arms must have had alike for a comparison to be fair."""

    figure: str = "tokens"  # a figure of each run: tokens, seconds, step
    tolerance: float = 0.0  # how far apart the arms of one seed may be, as a share of the largest

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 1:
            raise ValueError(
                f"the budget's tolerance is {self.tolerance}: give a share from 0 up to 1, such as 0.02"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Arms, seeds, and by what they are judged; all of it is said before anything is trained."""

    name: str
    arms: tuple[Arm | Derived, ...]  # trained ones, and those that are made of one that stands before them
    seeds: tuple[
        int, ...
    ]  # at least 2 for a comparison, 3 or more for one that resolves anything but the plainest difference
    baseline: str  # name of the arm that every other is compared with
    # the figure that verdicts are about: of the result, or of the last record of evaluation
    metric: str = "bits_per_byte"
    lower_is_better: bool = True  # which way the metric goes
    figures: tuple[str, ...] = ()  # further figures to report, without a verdict
    budget: Budget = Budget()
    confidence: float = 0.95  # of intervals; verdicts keep the chance of any false one to what is left of 1

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        directories = [arm.directory.lower() for arm in self.arms]
        if len(set(directories)) < len(directories):
            raise ValueError(
                f"arms {', '.join(names)}: two have the same name, or their directories have: rename one"
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds are {self.seeds}: give some, each once")
        if self.baseline not in names:
            raise ValueError(
                f"the baseline {self.baseline!r} is no arm.{near_names(self.baseline, names)} Arms are "
                f"{', '.join(names)}"
            )
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence is {self.confidence}: give a share between 0 and 1, such as 0.95")
        for i, arm in enumerate(self.arms):
            if isinstance(arm, Derived) and arm.source not in names[:i]:
                near = near_names(arm.source, names[:i])
                raise ValueError(
                    f"{arm.name!r} is made of {arm.source!r}, which is no arm before it.{near} Before it are "
                    f"{names[:i]}"
                )

    def arm(self, name: str) -> Arm | Derived:
        """The arm of that name. Raises ValueError if there is none."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        names = [arm.name for arm in self.arms]
        raise ValueError(
            f"{name!r} is no arm of the study.{near_names(name, names)} Arms are {', '.join(names)}"
        )

    def trained(self, name: str) -> Arm:
        """The arm of that name, or the one whose runs its members are made of in the end."""
        arm = self.arm(name)
        return self.trained(arm.source) if isinstance(arm, Derived) else arm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """What became of one arm with one seed: a line of members.jsonl."""

    arm: str
    seed: int
    fingerprint: str  # of its experiment, and of the recipe where it is made of another
    status: str  # "finished", "diverged" or "failed"
    result: dict[str, Any]  # the fields of its result.json; empty if it failed
    evaluation: dict[str, Any]  # the last record of evaluation, on all held-out text; empty if there is none
    error: str | None = None  # why it failed

    def figure(self, name: str) -> float | None:
        """A figure of the result, else of the evaluation; None if it has none of that name that is finite, or
        did not finish.
        """
        value = self.result.get(name, self.evaluation.get(name))
        if self.status != FINISHED or isinstance(value, bool) or not isinstance(value, int | float):
            return None
        return float(value) if math.isfinite(value) else None

    @property
    def figures(self) -> tuple[str, ...]:
        """The names that `figure` knows."""
        return tuple(name for name in {**self.result, **self.evaluation} if self.figure(name) is not None)


class OnChange(enum.Enum):
    """What becomes of members whose experiment is no longer what it was when they were trained."""

    REFUSE = "refuse"  # nothing is trained, and the message names them
    REDO = "redo"  # they are trained anew; the runs of before stay in the directory


class Interrupted(RuntimeError):
    """The study was stopped while a member was in training, whose state is saved."""


Train = Callable[..., trainer.Result]  # as `trainer.train`


def member_experiment(study: Study, arm: str, seed: int) -> Experiment:
    """The experiment of an arm with a seed, in the initial parameters and in the order of the data.

    Of an arm whose members are made of another's, it is that of the other.
    """
    experiment = study.trained(arm).of_seed(seed)
    # Where the study is, is no part of what it asks: its directory can be moved.
    run = dataclasses.replace(experiment.run, seed=seed, directory="runs")
    return dataclasses.replace(experiment, run=run, data=dataclasses.replace(experiment.data, seed=seed))


def member_fingerprint(study: Study, arm: str, seed: int) -> str:
    """What a member came of, experiment and recipe: two that agree are the same member."""
    if isinstance(found := study.arm(arm), Derived):
        return fingerprint({"source": member_fingerprint(study, found.source, seed), "recipe": found.recipe})
    return fingerprint(member_experiment(study, arm, seed))


def read_members(
    study: Study, directory: str | Path, *, on_change: OnChange = OnChange.REFUSE
) -> tuple[Member, ...]:
    """The members that came to an end, by seed and arm in the order of the study; of several lines about one,
    the last counts.

    Raises:
      ValueError: a member was trained with another experiment than the study now gives it, and is not to be
        done again.
    """
    path = Path(directory) / MEMBERS
    latest: dict[tuple[str, int], Member] = {}
    for record in read_log(path, kind="member") if path.is_file() else []:
        member = Member(**{field.name: record[field.name] for field in dataclasses.fields(Member)})
        latest[member.arm, member.seed] = member
    wanted = [(arm.name, seed) for seed in study.seeds for arm in study.arms]
    found = [latest[key] for key in wanted if key in latest]
    stale = [
        member for member in found if member.fingerprint != member_fingerprint(study, member.arm, member.seed)
    ]
    if stale and on_change is OnChange.REFUSE:
        raise ValueError(
            f"{directory}: members of {', '.join(sorted({member.arm for member in stale}))} were trained "
            "with another experiment than the "
            "study has now. Take back the change, name another directory, or train them anew with "
            "on_change=OnChange.REDO"
        )
    return tuple(member for member in found if member not in stale)


def run_study(
    study: Study,
    directory: str | Path,
    *,
    on_change: OnChange = OnChange.REFUSE,
    train: Train = trainer.train,
    console: Console | None = None,
) -> tuple[Member, ...]:
    """Trains the members that have not come to an end yet, and returns all of them.

    A member that diverges or fails is recorded as such, and the study goes on. Called again, it passes over
    what finished or diverged, tries what failed once more, and goes on with a run that was stopped from its
    newest checkpoint.

    Args:
      study: what is to be compared.
      directory: where runs and records go; made if it is not there.
      on_change: what becomes of members whose experiment has changed since.
      train: as `trainer.train`, which it is unless given.
      console: where progress is shown (none: standard output).

    Raises:
      ValueError: an experiment has changed (`read_members`), or several processes are joined.
      Interrupted: the run that was in training was stopped by a signal, and has saved its state.
    """
    if jax.process_count() > 1:
        raise ValueError(
            "a study runs in one process: train its members by themselves on several hosts, or take one host"
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    done = {
        (member.arm, member.seed): member for member in read_members(study, directory, on_change=on_change)
    }
    with RunLog(directory / MEMBERS) as records:
        for seed in study.seeds:
            for arm in study.arms:
                if (arm.name, seed) in done and done[arm.name, seed].status != FAILED:
                    continue
                if isinstance(arm, Derived):
                    member = _make_member(study, arm, seed, directory, source=done[arm.source, seed])
                else:
                    member = _train_member(study, arm, seed, directory, train=train, console=console)
                records.write("member", **dataclasses.asdict(member))
                done[arm.name, seed] = member
    return read_members(study, directory)


def _train_member(
    study: Study, arm: Arm, seed: int, directory: Path, *, train: Train, console: Console | None
) -> Member:
    """One run, begun or gone on with."""
    plan = member_experiment(study, arm.name, seed)
    place = (directory / arm.directory / f"seed-{seed}").absolute()
    experiment = with_absolute_paths(
        dataclasses.replace(plan, run=dataclasses.replace(plan.run, directory=str(place)))
    )
    about: dict[str, Any] = {"arm": arm.name, "seed": seed, "fingerprint": fingerprint(plan)}
    log.info("study %s: arm %s, seed %d", study.name, arm.name, seed)
    run, result = _earlier_run(place, experiment)
    if result is None:
        try:
            result = plain(dataclasses.asdict(train(experiment, resume=run, console=console)))
        except Exception as error:  # what fails is a result too, and no reason to lose the other arms
            log.exception("study %s: arm %s, seed %d failed", study.name, arm.name, seed)
            return Member(
                **about, status=FAILED, result={}, evaluation={}, error=f"{type(error).__name__}: {error}"
            )
    if result["status"] not in (FINISHED, DIVERGED):
        raise Interrupted(
            f"stopped at arm {arm.name}, seed {seed}, whose run is saved: run the study again, and it goes "
            "on from there"
        )
    return Member(
        **about, status=result["status"], result=result, evaluation=_final_evaluation(Path(result["run_dir"]))
    )


def _make_member(study: Study, arm: Derived, seed: int, directory: Path, *, source: Member) -> Member:
    """A member that is made of another arm's of the same seed."""
    about: dict[str, Any] = {
        "arm": arm.name,
        "seed": seed,
        "fingerprint": member_fingerprint(study, arm.name, seed),
    }
    if source.status != FINISHED:
        error = f"{source.arm} is {source.status} with this seed, and there is nothing to make it of"
        return Member(**about, status=FAILED, result={}, evaluation={}, error=error)
    log.info("study %s: arm %s, seed %d, made of %s", study.name, arm.name, seed, source.arm)
    out = (directory / arm.directory / f"seed-{seed}" / "model").absolute()
    try:
        result, evaluation = derive(
            arm.recipe, source.result, member_experiment(study, arm.name, seed), out=out
        )
    except Exception as error:  # as for a training
        log.exception("study %s: arm %s, seed %d failed", study.name, arm.name, seed)
        return Member(
            **about, status=FAILED, result={}, evaluation={}, error=f"{type(error).__name__}: {error}"
        )
    return Member(**about, status=FINISHED, result=plain(result), evaluation=plain(evaluation))


def _earlier_run(place: Path, experiment: Experiment) -> tuple[Path | None, dict[str, Any] | None]:
    """The newest run of this very experiment that can be gone on with; and its result, if the end came just
    before it was recorded.
    """
    for run in sorted(
        (path.parent for path in place.glob("*/config.json")),
        key=lambda run: run.stat().st_mtime,
        reverse=True,
    ):
        try:
            if fingerprint(read_experiment(run)) != fingerprint(experiment):
                continue
        except ValueError:  # of a version that had other settings
            continue
        if (run / "result.json").is_file():
            result = json.loads((run / "result.json").read_text(encoding="utf-8"))
            if result["status"] in (FINISHED, DIVERGED):
                return run, result
        if any(path.name.isdigit() for path in (run / "checkpoints").glob("*")):
            return run, None
    return None, None


def _final_evaluation(run: Path) -> dict[str, Any]:
    """The log's last record of evaluation that was on all held-out text."""
    path = run / "log.jsonl"
    records = (
        [record for record in read_log(path, kind="eval") if record.get("complete")] if path.is_file() else []
    )
    return (
        {name: value for name, value in records[-1].items() if name not in ("kind", "time")}
        if records
        else {}
    )
