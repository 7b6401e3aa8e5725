"""A study file from its question to its findings: every stage in order, resumable.

    ablation = open_ablation("experiments/deep_or_wide.py")    # or the directory of one that was interrupted
    for outcome in run_ablation(ablation):
        outcome.findings.comparisons[0].verdict

The stages: arms are made equal where the study says so; the study is fixed (`study_directory.py`); arms are
tuned; members are trained or derived; findings are written. Each is a function of its own that can be called
without the others.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from slmjax.config import near_names
from slmjax.stored_json import read_object
from slmjax.studies.arms import Derived
from slmjax.studies.findings import (
    FINDINGS,
    Findings,
    analyze,
    ladder_of,
    read_findings,
    unresolved,
    with_flops,
    write_findings,
)
from slmjax.studies.matching import Matched, at_matched, match_arms
from slmjax.studies.noise import ledger_of, record_noise
from slmjax.studies.plan import StudyPlan, plan_study
from slmjax.studies.recovery import RecoveryReport, measure, report_recovery
from slmjax.studies.recovery_layout import write_recovery
from slmjax.studies.report import write_study_report, write_tuned
from slmjax.studies.report.counting import count_costs, read_costs
from slmjax.studies.running import run_study
from slmjax.studies.study import FAILED, Member, OnChange, Study, read_members
from slmjax.studies.study_directory import (
    PLAN,
    STUDY_FILE,
    StudyDirectory,
    copy_study,
    load_studies,
    with_num_seeds,
    with_seeds,
)
from slmjax.studies.tuning import Tuned, tune, unresolved_arms
from slmjax.telemetry.run_directory import plain, write_json

log = logging.getLogger(__name__)

DIRECTORY = Path("runs") / "studies"
SEVERAL = "studies.json"  # in the directory of a file with several studies

RunStudy = Callable[..., tuple[Member, ...]]  # as `run_study`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ablation:
    """A study file, or the copy of one in its directory, and where its results are."""

    file: Path
    size: str  # that the file was asked for
    studies: tuple[Study, ...]  # in the order in which they run
    directory: Path

    def directory_of(self, study: Study) -> Path:
        """Return the directory of one study: of its own if the file has several."""
        return self.directory / study.directory if len(self.studies) > 1 else self.directory

    def ladder_of(self, study: Study) -> dict[str, Path]:
        """Return the directories of all sizes of a study's ladder, by size; empty without a ladder."""
        return {
            each.size: self.directory_of(each)
            for each in self.studies
            if study.ladder and each.ladder == study.ladder
        }

    @property
    def arm_names(self) -> tuple[str, ...]:
        """Names of the arms of all studies, each once."""
        return tuple(dict.fromkeys(arm.name for study in self.studies for arm in study.arms))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """One study after its members have ended, or as many as could."""

    study: Study  # with the rates of tuned arms
    directory: Path
    members: tuple[Member, ...]
    findings: Findings
    recovery: RecoveryReport | None
    report: Path  # the page, or report.md where pages cannot be drawn

    @property
    def num_left(self) -> int:
        """The number of members that have not ended yet."""
        return len(self.study.arms) * len(self.study.seeds) - len(self.members)

    @property
    def failed(self) -> tuple[Member, ...]:
        """Members that failed; running the study again tries them again."""
        return tuple(member for member in self.members if member.status == FAILED)


# Opening ----------------------------------------------------------------------------------------------------
def open_ablation(
    path: str | Path,
    *,
    directory: str | Path | None = None,
    size: str | None = None,
    num_seeds: int | None = None,
) -> Ablation:
    """Load a study file, or open the directory of one that was begun.

    Args:
      path: the file, or the directory.
      directory: of results (none: runs/studies and the name of the file).
      size: that the file is asked for, "small" or "large" (none: small, or that of the directory).
      num_seeds: of every study (none: as the file says; of a directory, as many as it had last).

    Raises:
      ValueError: it is neither, or `load_studies` refuses the file.
    """
    path = Path(path)
    if not path.is_dir():
        size = size or "small"
        name = path.stem.replace("_", "-") + ("" if size == "small" else f"-{size}")
        file = path
        directory = Path(directory or DIRECTORY / name)
    else:
        if directory is not None:
            raise ValueError(f"{path} is the directory of a study already: leave out --directory {directory}")
        directory = path
        file = path / STUDY_FILE
        if not file.is_file() and (path.parent / STUDY_FILE).is_file():
            raise ValueError(f"{path} is one of several studies of one file: give {path.parent}")
        fixed = _fixed_size(path)
        if size not in (None, fixed):
            raise ValueError(
                f"{path} was begun with --budget {fixed}: leave out --budget {size}, or begin another "
                "directory from the study's file"
            )
        size = fixed
    studies = load_studies(file, size=size)
    if num_seeds is not None:
        studies = with_num_seeds(studies, num_seeds)
    ablation = Ablation(file=file, size=size, studies=studies, directory=directory)
    if num_seeds is None and path.is_dir():
        seeds_of = {
            study.name: StudyDirectory.open(begun).seeds
            for study in studies
            if ((begun := ablation.directory_of(study)) / PLAN).is_file()
        }
        ablation = dataclasses.replace(ablation, studies=with_seeds(studies, seeds_of))
    return ablation


def is_study_directory(path: str | Path) -> bool:
    """Return whether a path is the directory of one study or of several."""
    return any((Path(path) / name).is_file() for name in (PLAN, SEVERAL))


def _fixed_size(directory: Path) -> str:
    """Return the size that the studies of a directory were fixed with."""
    if (directory / SEVERAL).is_file():
        remedy = "restore the file from a copy, or use another directory"
        return read_object(directory / SEVERAL, {"size": str}, remedy=remedy)["size"]
    return StudyDirectory.open(directory).plan["size"]


# Running ----------------------------------------------------------------------------------------------------
def run_ablation(
    ablation: Ablation,
    *,
    redo: bool = False,
    only: Sequence[str] = (),
    worker: bool = False,
    wait: bool = False,
    run: RunStudy = run_study,
) -> Iterator[Outcome]:
    """Run the studies in order, and yield the outcome of each as soon as it has one.

    Called again, it resumes where it was stopped. All studies are fixed before the first run of any.

    Args:
      ablation: what to run.
      redo: train members again whose experiment has changed; the old runs stay.
      only: names of the arms to train now, and what they build on (none: all).
      worker: whether this is one of several processes that train the members (`run_study`).
      wait: whether a worker waits for the others in the end, as it does where a later study builds on this.
      run: a replacement for `run_study`.

    Raises:
      ValueError: a name of `only` is of no arm, or the directory is of another study or of other arms.
      Interrupted: a signal stopped the training of a member, whose state is saved.
    """
    for name in only:
        if name not in ablation.arm_names:
            raise ValueError(
                f"{name!r} is not an arm.{near_names(name, ablation.arm_names)} Arms are "
                f"{', '.join(ablation.arm_names)}"
            )
    needed = _needed_arms(ablation.studies, only)
    built_on = {each.name for study in ablation.studies for each in study.earlier}
    fixed = fix_studies(ablation, on_change=OnChange.REDO if redo else OnChange.REFUSE)
    # Studies as they are run: an arm that builds on a tuned one builds on it at its own rate.
    ready: dict[str, Study] = {}
    for study, directory in fixed:
        earlier = tuple(ready[each.name] for each in study.earlier)
        study = ready[study.name] = dataclasses.replace(study, earlier=earlier)
        if not needed[study.name]:
            continue
        # The studies that it builds on lie in the directory of the file.
        options: dict[str, Any] = {"on_change": directory.on_change, "earlier": ablation.directory}
        if worker:
            options |= {"worker": True, "wait": wait or study.name in built_on}
        if only:
            options["only"] = needed[study.name]
        tuned: tuple[Tuned, ...] = ()
        if study.tune is not None:
            # The members of the study begin when all rates are known.
            sweep = {name: value for name, value in options.items() if name != "only"}
            sweep |= {"wait": True} if worker else {}
            swept = needed[study.name] if only else None
            study, tuned = tune(study, directory.path, run=functools.partial(run, **sweep), only=swept)
            ready[study.name] = study
            write_tuned(directory.path, tuned)
        members = run(study, directory.path, **options)
        ledger = ledger_of(ablation.directory)
        sizes = ablation.ladder_of(study)
        outcome = conclude(study, members, directory, tuned=tuned, ledger=ledger, sizes=sizes)
        # Another worker may have ended a member, and written its findings before these.
        while len(newer := read_members(study, directory.path, on_change=directory.on_change)) > len(members):
            members = newer
            outcome = conclude(study, members, directory, tuned=tuned, ledger=ledger, sizes=sizes)
        yield outcome


def fix_studies(
    ablation: Ablation, *, on_change: OnChange = OnChange.REFUSE
) -> tuple[tuple[Study, StudyDirectory], ...]:
    """Make the arms of all studies equal where they say so, and fix each study in its directory.

    Returns:
      each study as it is fixed, with its directory.

    Raises:
      ValueError: arms cannot be matched, or the directory is of another study or of other arms.
    """
    ablation.directory.mkdir(parents=True, exist_ok=True)
    if len(ablation.studies) > 1:
        names = {each.name: each.directory for each in ablation.studies}
        write_json(ablation.directory / SEVERAL, {"size": ablation.size, "studies": names})
    fixed: dict[str, tuple[Study, StudyDirectory]] = {}
    for asked in ablation.studies:
        earlier = tuple(fixed[each.name][0] for each in asked.earlier)
        asked = dataclasses.replace(asked, earlier=earlier)
        path = ablation.directory_of(asked)
        study, matched = matched_study(asked, path)
        directory = StudyDirectory.create(
            path,
            study,
            size=ablation.size,
            asked=asked,
            matched=matched,
            plan=functools.partial(_plan_before, study, ledger_of(ablation.directory)),
            on_change=on_change,
        )
        fixed[asked.name] = (study, directory)
    copy_study(ablation.file, ablation.directory)
    return tuple(fixed.values())


def _plan_before(study: Study, ledger: Path) -> dict[str, Any] | None:
    """Return the costs and the power of a study for its plan.json; None if they cannot be computed."""
    try:
        return plain(dataclasses.asdict(plan_study(study, ledger=ledger)))
    except ValueError as error:
        # The member of an arm that cannot be trained fails, and says so; the others are trained.
        log.warning("costs and power of the study %s are not known: %s", study.name, error)
        return None


def plan_ablation(ablation: Ablation, *, measured: bool = True) -> tuple[StudyPlan, ...]:
    """Return the plan of each study, with its arms matched. Nothing is written or trained.

    Args:
      ablation: what would be run.
      measured: whether to compile the step of each arm and to time a few steps on this device.

    Raises:
      ValueError: the experiment of an arm is invalid, or arms cannot be matched.
    """
    plans = []
    for asked in ablation.studies:
        study, matched = matched_study(asked, ablation.directory_of(asked))
        ledger = ledger_of(ablation.directory)
        plans.append(plan_study(study, measure=measured, matched=matched, ledger=ledger))
    return tuple(plans)


def matched_study(study: Study, directory: Path) -> tuple[Study, tuple[Matched, ...]]:
    """Return a study with its arms made equal: by the choices in its directory, if it has some for it."""
    # Times of steps differ from one measurement to the next, and other choices would be other arms.
    matched = StudyDirectory(path=directory).matched_before(study)
    return match_arms(study) if matched is None else (at_matched(study, matched), matched)


def _needed_arms(studies: Sequence[Study], only: Sequence[str]) -> dict[str, list[str]]:
    """Return the arms to train of each study: those of some names, or all, and what they build on."""
    needed: dict[str, list[str]] = {}
    built_on: set[tuple[str, str]] = set()
    for study in reversed(studies):
        names: list[str] = []
        # From the last one on: an arm builds on those before it.
        for arm in reversed(study.arms):
            if only and arm.name not in only and (study.name, arm.name) not in built_on:
                continue
            names.insert(0, arm.name)
            source = arm.source if isinstance(arm, Derived) else arm.after
            if source is not None:
                built_on.add((study.name, source) if isinstance(source, str) else source)
        needed[study.name] = names
    return needed


def conclude(
    study: Study,
    members: Sequence[Member],
    directory: StudyDirectory,
    *,
    tuned: Sequence[Tuned] = (),
    ledger: Path | None = None,
    sizes: Mapping[str, Path] | None = None,
) -> Outcome:
    """Analyze the members of a study that ended, and write its findings and its reports.

    On a ladder, the findings of the other sizes are written again, with what all sizes show together.

    Args:
      study: as it was run.
      members: that ended.
      directory: of the study.
      tuned: the learning rates of its arms, if they were tuned.
      ledger: of the noise of runs, for the plans of later studies (none: it is not recorded).
      sizes: directories of all sizes of its ladder, by size (none: it has no ladder).
    """
    changes = [change.text for change in directory.changes_since_lock()]
    findings = _without_unresolved(analyze(study, members, changes=changes), study, tuned)
    count_costs(directory.path, members)
    costs = read_costs(directory.path)
    flops = {arm: cost["flops"] for arm, cost in costs.items() if "flops" in cost}
    findings = _with_ladder(with_flops(findings, study, flops), study, sizes or {})
    write_findings(findings, directory.path)
    if ledger is not None:
        record_noise(ledger, findings, members)
    recovery = None
    if study.recovery is not None:
        recovery = report_recovery(study, members, measure(study, members, directory.path), tuned=tuned)
        write_recovery([recovery], directory.path)
    return Outcome(
        study=study,
        directory=directory.path,
        members=tuple(members),
        findings=findings,
        recovery=recovery,
        report=write_study_report(directory.path, findings),
    )


def _with_ladder(findings: Findings, study: Study, sizes: Mapping[str, Path]) -> Findings:
    """Return findings with those of all sizes that have any, and write them to the other sizes, too."""
    known: dict[str, Findings] = {}
    for size, directory in sizes.items():
        if size == study.size:
            known[size] = findings
        elif (directory / FINDINGS).is_file():
            try:
                known[size] = read_findings(directory)
            # The verdicts of this size do not depend on that file.
            except ValueError as error:
                log.warning("the ladder of %s is shown without %s: %s", study.ladder, size, error)
    if len(known) < 2:
        return findings
    ladder = ladder_of(study.ladder, known, asymptote=study.asymptote)
    for size, other in known.items():
        if size != study.size and other.ladder != ladder:
            other = dataclasses.replace(other, ladder=ladder)
            write_findings(other, sizes[size])
            write_study_report(sizes[size], other)
    return dataclasses.replace(findings, ladder=ladder)


def _without_unresolved(findings: Findings, study: Study, tuned: Sequence[Tuned]) -> Findings:
    """Return findings without verdicts on arms whose best learning rate is not resolved."""
    arms = unresolved_arms(study, tuned)
    comparisons = tuple(
        unresolved(comparison, f"the best learning rate of {' and '.join(named)} is not resolved")
        if (named := [arm for arm in (comparison.arm, comparison.against) if arm in arms])
        else comparison
        for comparison in findings.comparisons
    )
    # An arm that is not at its best may lose because of its rate alone.
    notes = [f"{choice.arm}: {note}" for choice in tuned for note in choice.notes()]
    return dataclasses.replace(findings, comparisons=comparisons, notes=(*findings.notes, *notes))
