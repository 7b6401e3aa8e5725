"""Running a study: its members are trained or derived, recorded, and resumed after an interruption.

    members = run_study(study, "studies/width")                 # calling it again resumes what is left
    members = run_study(study, "studies/width", worker=True)    # one of many processes, on any hosts

Members are taken in order, all arms of the first seed before the second: an incomplete study has complete
pairs. The directory is the queue. Each process claims a member before it trains it (`claims.py`), so that any
number of them may work on one study.

    DIRECTORY/claims/ARM/seed-N/               who trained it, and the outcome
    DIRECTORY/members.jsonl                    a line for each member that ended
    DIRECTORY/ARM/seed-N/RUN                   its run directory
    DIRECTORY/ARM/seed-N/model                 a model derived from another member

A run whose worker was killed or lost is taken over: it is renamed to RUN.TOKEN, after the number of the new
claim, before it is resumed from its newest checkpoint. What the earlier worker writes after that, should it
only have been paused, is not in the run: its paths are gone, and files that it has open were replaced.
"""

import contextlib
import dataclasses
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from slmjax.config import fingerprint
from slmjax.data import provenance
from slmjax.data.preparation import HELDOUT
from slmjax.ownership import owned_by, require_ownership
from slmjax.runner import trainer
from slmjax.runner.population import train_population
from slmjax.stop_signals import Stopped, StopSignals
from slmjax.studies.arms import Arm, Derived
from slmjax.studies.claims import ClaimLost, Claims, Lease, locked
from slmjax.studies.derived import derive, evaluate_run
from slmjax.studies.groups import Populations, tasks_together
from slmjax.studies.member_queue import MemberQueue, Task, evaluation_at, metric_at
from slmjax.studies.study import (
    DIVERGED,
    FAILED,
    FINISHED,
    MEMBERS,
    STOPPED,
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
LEASE = Lease()


def run_study(
    study: Study,
    directory: str | Path,
    *,
    on_change: OnChange = OnChange.REFUSE,
    train: Train = trainer.train,
    console: Console | None = None,
    only: Sequence[str] | None = None,
    worker: bool = False,
    wait: bool = False,
    lease: Lease = LEASE,
    earlier: str | Path | None = None,
    populations: Populations = Populations.AUTO,
) -> tuple[Member, ...]:
    """Train the members that have not ended yet, and return all that have.

    A member that diverges or fails is recorded as such, and the study continues. Called again, it skips
    members that finished or diverged, retries those that failed, and resumes an interrupted run from its
    newest checkpoint. Several processes may call it at once.

    Args:
      study: the arms and seeds.
      directory: directory of runs and records; created if it does not exist.
      on_change: handling of members whose experiment has changed.
      train: a replacement for `trainer.train`.
      console: where to show progress (none: standard output).
      only: names of the arms to train (none: all); arms that these build on or are derived from are trained
        as well.
      worker: whether this is one of many processes: it returns once other workers, who are seen to live,
        train all that is left. Otherwise it waits for them.
      wait: whether a worker waits, too.
      lease: of the claims of this process.
      earlier: the directory that has those of the study's earlier studies (none: the one `directory` is in).
      populations: whether members that share a program, such as the seeds of an arm, are trained in one. AUTO
        measures whether it is faster, and lets workers share the members instead. With another `train` they
        are trained one after another.

    Raises:
      ValueError: an experiment has changed (`read_members`), there is no such arm, the processes of this
        program train one run together, or several workers cannot share this file system.
      Interrupted: the current run was stopped by a signal, and has saved its state.
    """
    # Each process would train, record and skip members on its own.
    if jax.process_count() > 1:
        raise ValueError(
            "a study does not run in processes that are joined: start each as a worker of its own "
            "(SLMJAX_DISTRIBUTED=off, --worker)"
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    claims = Claims(directory, lease=lease, needs_links=worker)
    earlier = Path(earlier or directory.absolute().parent)
    if train is not trainer.train or (worker and populations is Populations.AUTO):
        populations = Populations.NEVER
    queue = MemberQueue(study, directory, claims, only=only, on_change=on_change, earlier=earlier)
    # Between trainings, too, a worker ends in order: its claims are released.
    with _stopping_in_order(worker) as signals, claims:
        while True:
            if signals is not None and signals.received:
                raise Interrupted("stopped between two members: start the worker again to train the rest")
            if (task := queue.take()) is not None:
                _run_members(queue, task, populations=populations, train=train, console=console)
            elif queue.is_done or (worker and not wait and queue.is_in_good_hands):
                break
            else:
                queue.pause()
    return read_members(study, directory)


@contextlib.contextmanager
def _stopping_in_order(worker: bool) -> Iterator[StopSignals | None]:
    """Context in which a worker that is stopped by a signal raises Interrupted."""
    if not worker:
        yield None
        return
    with StopSignals() as signals:
        try:
            yield signals
        except Stopped as error:
            raise Interrupted(f"{error}: start the worker again to train the rest") from error


# Members ----------------------------------------------------------------------------------------------------
def _run_member(
    queue: MemberQueue, task: Task, *, train: Train, console: Console | None, spent: float | None = None
) -> None:
    """Train or derive a member under a claim, and record it.

    Args:
      spent: seconds that it has had in one program with others; None for a member that is trained alone.

    Raises:
      ClaimLost: another process has taken over; nothing is recorded.
    """
    study = queue.study
    directory = queue.directory
    claim = task.claim
    begin = time.monotonic()
    if spent is None:
        log.info("%s%s", queue.member_text(task), queue.time_left())
    try:
        with owned_by(claim.require):
            source = queue.source(task.arm, task.seed)
            if isinstance(task.arm, Derived):
                assert source is not None, task.arm
                member = _derive_member(study, task.arm, task, directory, source=source)
            else:
                progress: dict[str, Any] = {"train": train, "console": console}
                member = _train_member(study, task.arm, task, directory, source=source, **progress)
        if not isinstance(member, Member):
            claim.release(rung=member)
            log.info("%s: at rung %d", queue.member_text(task), member["step"])
            return
        fields = dataclasses.asdict(member)
        # Written as soon as a member ends: a later crash cannot lose it.
        claim.record(fields)
    except ClaimLost as error:
        log.warning("study %s: %s. This worker has stopped and recorded nothing", study.name, error)
        raise
    except BaseException:
        with contextlib.suppress(ClaimLost, OSError):
            claim.release()
        raise
    _append_line(directory / MEMBERS, fields)
    seconds = (spent or 0.0) + time.monotonic() - begin
    queue.add_seconds(task, seconds, compiling=member.compile_seconds)
    log.info("%s: %s", queue.member_text(task), _outcome_text(study, member))


def _outcome_text(study: Study, member: Member) -> str:
    if (value := member.metric_value(study.metric)) is not None:
        return f"{member.status}, {study.metric} {value:.4f}"
    return member.status if member.error is None else f"{member.status} ({member.error})"


def _run_members(
    queue: MemberQueue, first: Task, *, populations: Populations, train: Train, console: Console | None
) -> None:
    """Train or derive a member, and those that are trained in one program with it, and record them."""
    tasks = tasks_together(queue, first, populations=populations)

    def require(now: bool) -> None:
        for task in tasks:
            task.claim.require(now)

    spent = None
    if len(tasks) > 1:
        begin = time.monotonic()
        with owned_by(require):
            is_together = _train_group(queue, tasks, console=console)
        spent = (time.monotonic() - begin) / len(tasks) if is_together else None
    # Runs that have ended are recorded, and others trained alone.
    for task in tasks:
        with contextlib.suppress(ClaimLost):
            _run_member(queue, task, train=train, console=console, spent=spent)


def _train_group(queue: MemberQueue, tasks: Sequence[Task], *, console: Console | None) -> bool:
    """Train members in one program; an error is logged, and leaves runs that can be resumed.

    Returns:
      whether the members were trained.

    Raises:
      Interrupted: a signal stopped the training, and all states are saved.
    """
    experiments = []
    runs = []
    for task in tasks:
        experiment = _experiment(queue.study, task, queue.directory, source_run=None)
        run, result = _earlier_run(experiment, fence=task.claim.fence)
        if result is None:
            experiments.append(experiment)
            runs.append(run)
    names = ", ".join(f"{task.arm.name} seed {task.seed}" for task in tasks)
    log.info("%s: %d members in one program: %s%s", queue.study.name, len(tasks), names, queue.time_left())
    try:
        results = train_population(experiments, resume=runs, console=console) if experiments else []
    except ClaimLost as error:
        log.warning("study %s: %s. The members that are left are trained alone", queue.study.name, error)
    except Exception:
        log.exception("study %s: training in one program failed: members are trained alone", queue.study.name)
    else:
        # A signal stops the whole study.
        if any(result.status not in (FINISHED, DIVERGED) for result in results):
            raise Interrupted(f"stopped at {names}, whose runs are saved: run the study again to resume them")
        return True
    return False


def _append_line(path: Path, fields: dict[str, Any]) -> None:
    """Append a member to members.jsonl, where people look; the claim has it already."""
    try:
        with locked(path, seconds=10), RunLog(path) as records:
            records.write("member", **fields)
    except (TimeoutError, OSError) as error:
        log.warning("%s lacks a line, which is in the claims: %s", path, error)


def _train_member(
    study: Study,
    arm: Arm,
    task: Task,
    directory: Path,
    *,
    source: Member | None,
    train: Train,
    console: Console | None,
) -> Member | dict[str, Any]:
    """Start or resume the run of a member, from the run that it builds on if there is one.

    Returns:
      the member, or of early stopping the rung that it has reached.
    """
    seed = task.seed
    # The fingerprint is that of the plan, without the directory of the study.
    member_hash = member_fingerprint(study, arm.name, seed)
    about: dict[str, Any] = {"arm": arm.name, "seed": seed, "fingerprint": member_hash}
    if source is not None and source.status != FINISHED:
        return _without_source(about, source, study)
    source_run = None if source is None else Path(source.result["run_dir"])
    experiment = _experiment(study, task, directory, source_run=source_run)
    try:
        # A run may have ended just before it was recorded: then only the record is missing.
        run, result = _earlier_run(experiment, fence=task.claim.fence)
        if task.stopped is not None:
            return _stopped(about, task.stopped, run=run)
        # At a rung, too: what is left of its steps is trained with those after it.
        rung = task.stop_after or 0
        if result is None and run is not None and evaluation_at(run, rung) is not None:
            result = {"status": "interrupted", "step": rung, "run_dir": str(run)}
        was_trained = result is None
        if result is None:
            result = plain(dataclasses.asdict(train(experiment, resume=run, console=console)))
        result, evaluation = _evaluated(result, experiment, was_trained=was_trained)
    except (ClaimLost, Interrupted):
        raise
    except Exception as error:  # a failure is a result too, and no reason to lose the other arms
        # Of a run that another process has taken over, files are missing: that is no failure of the member.
        require_ownership(now=True)
        log.exception("study %s: arm %s, seed %d failed", study.name, arm.name, seed)
        return Member(
            **about, status=FAILED, result={}, evaluation={}, error=f"{type(error).__name__}: {error}"
        )
    if result["status"] == "interrupted" and result["step"] == task.stop_after:
        record = evaluation_at(Path(result["run_dir"]), result["step"])
        # Without held-out text there is no evaluation, and so no metric.
        value = metric_at(record or {}, study, result["step"])
        return {"step": result["step"], "value": value, "fingerprint": member_hash}
    # A signal stops the whole study, not only this member.
    if result["status"] not in (FINISHED, DIVERGED):
        require_ownership(now=True)
        raise Interrupted(
            f"stopped at arm {arm.name}, seed {seed}, whose run is saved: run the study again to resume it"
        )
    return Member(**about, status=result["status"], result=result, evaluation=evaluation)


def _evaluated(
    result: dict[str, Any], experiment: Experiment, *, was_trained: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the result of a run and its evaluation on all held-out text, which is made if it was cut short.

    Raises:
      Interrupted: a signal ended the evaluation that follows the training.
    """
    run = Path(result["run_dir"])
    evaluation = _final_evaluation(run)
    record = provenance.read_record(run) or []
    holds_out = any((source.get(HELDOUT) or {}).get("documents") for source in record)
    if evaluation or not holds_out or result["status"] != FINISHED:
        return result, evaluation
    # The result then has the loss of another text, which compares with that of no other member.
    if was_trained:
        raise Interrupted(f"stopped in the evaluation of {run}: run the study again to complete it")
    return evaluate_run(result, experiment)


def _experiment(study: Study, task: Task, directory: Path, *, source_run: Path | None) -> Experiment:
    """Return the experiment of a member with its directory, to be trained to its next rung or to the end."""
    plan = member_experiment(study, task.arm.name, task.seed, run=source_run)
    run = dataclasses.replace(
        plan.run,
        directory=str((directory / task.arm.directory / f"seed-{task.seed}").absolute()),
        # Without trackers nothing shows the group, and runs of earlier versions can be resumed.
        group=plan.run.group or (study.name if plan.run.trackers else None),
        stop_after=task.stop_after,
    )
    return with_absolute_paths(dataclasses.replace(plan, run=run))


def _stopped(about: Mapping[str, Any], reason: str, *, run: Path | None) -> Member:
    """Return a member that is not trained further, with the state in which its run is."""
    result = None if run is None else read_result(run)
    if result is None:  # a seed that was added after the arm was stopped, or a session that was killed
        return Member(**about, status=STOPPED, result={}, evaluation={}, error=reason)
    result |= {"status": STOPPED}
    evaluation = evaluation_at(Path(result["run_dir"]), result["step"]) or {}
    evaluation = {name: value for name, value in evaluation.items() if name not in ("kind", "time")}
    return Member(**about, status=STOPPED, result=result, evaluation=evaluation, error=reason)


def _derive_member(study: Study, arm: Derived, task: Task, directory: Path, *, source: Member) -> Member:
    """Derive a member from another arm's of the same seed."""
    seed = task.seed
    fence = task.claim.fence
    about: dict[str, Any] = {
        "arm": arm.name,
        "seed": seed,
        "fingerprint": member_fingerprint(study, arm.name, seed),
    }
    if source.status != FINISHED:
        return _without_source(about, source, study)
    # A worker that was paused may still write to the directory of its own claim.
    name = f"model.{fence}" if fence else "model"
    out = (directory / arm.directory / f"seed-{seed}" / name).absolute()
    try:
        result, evaluation = derive(
            arm.derivation, source.result, member_experiment(study, arm.name, seed), out=out
        )
    except Exception as error:  # as for a training
        require_ownership(now=True)
        log.exception("study %s: arm %s, seed %d failed", study.name, arm.name, seed)
        return Member(
            **about, status=FAILED, result={}, evaluation={}, error=f"{type(error).__name__}: {error}"
        )
    return Member(**about, status=FINISHED, result=plain(result), evaluation=plain(evaluation))


def _without_source(about: Mapping[str, Any], source: Member, study: Study) -> Member:
    """Return a member that builds on a run, or is derived from one, that did not finish."""
    if source.status == DIVERGED:
        # An outcome of all that the arm consists of: leaving out the seed would make the arm look better.
        status = DIVERGED
        error = f"{source.arm} diverged with seed {source.seed}, so that there is nothing to build on"
    elif source.status == STOPPED and study.stopping is not None:
        status = STOPPED
        error = f"as {source.arm}"
    else:
        # A failure, and so tried again: its source may have finished by then.
        status = FAILED
        status_text = "failed" if source.status == FAILED else f"was {source.status}"
        error = f"{source.arm} {status_text} with seed {source.seed}, so that there is nothing to build on"
    return Member(**about, status=status, result={}, evaluation={}, error=error)


def _earlier_run(experiment: Experiment, *, fence: int) -> tuple[Path | None, dict[str, Any] | None]:
    """Return the newest run of this experiment that can be resumed, and its result if it ended unrecorded.

    After a takeover (`fence` above 0), the run belongs to this claim from now on.
    """
    runs = [path.parent for path in Path(experiment.run.directory).glob("[!.]*/config.json")]
    runs.sort(key=lambda run: (_is_own(run, fence), (run / "config.json").stat().st_mtime), reverse=True)
    for run in runs:
        try:
            # Runs of an earlier version of the arm stay in the directory, and must not be resumed.
            if _without_rung(read_experiment(run)) != _without_rung(experiment):
                continue
        except ValueError:  # written by a version with other settings
            continue
        if (result := read_result(run)) is not None and result["status"] in (FINISHED, DIVERGED):
            return run, result
        # A run that was stopped before its first checkpoint starts again.
        if any(path.name.isdigit() for path in (run / "checkpoints").glob("*")):
            return run if _is_own(run, fence) else take_over(run, fence), None
    return None, None


def _without_rung(experiment: Experiment) -> str:
    """Return the fingerprint of an experiment, wherever its session is to end."""
    return fingerprint(
        dataclasses.replace(experiment, run=dataclasses.replace(experiment.run, stop_after=None))
    )


def _is_own(run: Path, fence: int) -> bool:
    """Return whether no process of an earlier claim can write to a run directory."""
    return fence == 0 or run.name.endswith(f".{fence}")


def take_over(run: Path, fence: int) -> Path:
    """Rename a run directory to RUN.FENCE, and return it; another process may still be writing to it.

    What that process writes under the old name is not in the new directory. Files that it may have open, such
    as the log, are replaced by copies. Checkpoints are not: each is complete once it has its name, and one
    that is being written is removed before the run is resumed.

    Raises:
      OSError: the directory cannot be renamed or its files be copied; it has its old name then.
    """
    target = run.with_name(f"{re.sub(r'[.][0-9]+$', '', run.name)}.{fence}")
    run.rename(target)
    try:
        for path in sorted(target.rglob("*")):
            inner = path.relative_to(target).parts
            is_written_once = inner[0] in ("checkpoints", "tokenizer") or inner[0].startswith("profile")
            if is_written_once or path.is_symlink() or not path.is_file():
                continue
            temporary = path.with_name(f".{path.name}.{fence}.tmp")
            # With its times, by which the newest run is chosen.
            shutil.copy2(path, temporary)
            temporary.replace(path)
    except OSError:
        target.rename(run)
        raise
    log.info("%s is taken over as %s", run, target.name)
    return target


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
