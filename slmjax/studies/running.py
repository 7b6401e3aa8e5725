"""Running a study: its members are trained or derived, recorded, and resumed after an interruption.

    members = run_study(study, "studies/width")  # calling it again resumes an interrupted study

Members are trained one after another, all arms of the first seed before the second: an incomplete study has
complete pairs.

    DIRECTORY/members.jsonl                    a line for each member that ended
    DIRECTORY/ARM/seed-N/RUN                   its run directory
    DIRECTORY/ARM/seed-N/model                 a model derived from another member
"""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from slmjax.config import fingerprint
from slmjax.runner import trainer
from slmjax.studies.arms import Arm, Derived
from slmjax.studies.derived import derive
from slmjax.studies.study import (
    DIVERGED,
    FAILED,
    FINISHED,
    MEMBERS,
    Member,
    OnChange,
    Study,
    member_experiment,
    member_fingerprint,
    read_members,
)
from slmjax.telemetry.run_directory import RunLog, plain, read_log, read_result
from slmjax.training.experiment import Experiment, read_experiment, with_absolute_paths

log = logging.getLogger(__name__)


class Interrupted(RuntimeError):
    """The study was stopped during the training of a member, whose state is saved."""


Train = Callable[..., trainer.Result]  # as `trainer.train`


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
    # Without trackers nothing shows the group, and runs of earlier versions can be resumed.
    group = plan.run.group or (study.name if plan.run.trackers else None)
    experiment = with_absolute_paths(
        dataclasses.replace(
            plan,
            run=dataclasses.replace(plan.run, directory=str(run_parent), group=group),
        )
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
