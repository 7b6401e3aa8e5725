"""Findings of a study that has not ended, from its plan and the members that have; no code of it is run.

findings = findings_so_far("studies/width")
"""

from pathlib import Path
from typing import Any

from slmjax.config import from_json
from slmjax.stored_json import read_object
from slmjax.studies.design import Budget
from slmjax.studies.findings import Findings, analyze_members, read_findings
from slmjax.studies.questions import Question
from slmjax.studies.report.records import recorded_members
from slmjax.studies.statistics.results_table import Rules
from slmjax.studies.study import Member
from slmjax.studies.study_directory import CHANGES, PLAN
from slmjax.telemetry.run_directory import read_log

_REMEDY = "restore the file from a copy"


def findings_so_far(directory: str | Path) -> Findings | None:
    """Return the findings of a study: those in findings.json, unless members have ended since.

    None if the directory has neither findings nor a plan.

    Raises:
      ValueError: a file of the study is damaged.
    """
    directory = Path(directory)
    try:
        written = read_findings(directory)
    except FileNotFoundError:
        written = None
    if not (directory / PLAN).is_file():
        return written
    plan = _latest_plan(directory)
    arms = plan["arms"]
    settings = plan["settings"]
    members = tuple(
        member
        for member in recorded_members(directory, arms=tuple(arms), seeds=tuple(settings["seeds"]))
        # Rates of tuned arms are chosen after the plan, and change the experiments of all members.
        if settings.get("tune") is not None or _is_of_plan(member, arms)
    )
    if written is not None and not _is_behind(written, members):
        return written
    return analyze_members(_question(plan["study"], tuple(arms), settings), members)


def _latest_plan(directory: Path) -> dict[str, Any]:
    """Return the plan with what was changed last."""
    fields = {"study": str, "settings": dict, "arms": dict}
    plan = read_object(directory / PLAN, fields, remedy=_REMEDY)
    path = directory / CHANGES
    changes = read_log(path, kind="change") if path.is_file() else []
    latest = changes[-1] if changes else plan
    return {**plan, "settings": latest["settings"], "arms": latest["arms"]}


def _is_of_plan(member: Member, arms: dict[str, Any]) -> bool:
    """Return whether a member is of the experiment that its arm has now."""
    fingerprints = arms[member.arm].get("fingerprints") or {}
    return fingerprints.get(str(member.seed), member.fingerprint) == member.fingerprint


def _is_behind(findings: Findings, members: tuple[Member, ...]) -> bool:
    """Return whether a member has ended since the findings were written."""
    values = {
        (arm.arm, seed): value
        for arm in findings.arms
        for seed, value in zip(findings.seeds, arm.values, strict=True)
    }
    return any(
        (value := member.metric_value(findings.metric)) is not None
        and values.get((member.arm, member.seed)) != value
        for member in members
    )


def _question(name: str, arms: tuple[str, ...], settings: dict[str, Any]) -> Question:
    return Question(
        name=name,
        arms=arms,
        seeds=tuple(settings["seeds"]),
        baseline=settings["baseline"],
        metric=settings["metric"],
        text=settings["question"],
        further_metrics=tuple(settings["further_metrics"]),
        comparisons=tuple((pair[0], pair[1]) for pair in settings["comparisons"]),
        budget=from_json(Budget, settings["budget"]),
        rules=Rules(
            confidence=settings["confidence"],
            lower_is_better=settings["lower_is_better"],
            equal_within=settings["equal_within"],
            smallest_effect=settings["smallest_effect"],
            looks=tuple(settings["looks"]),
        ),
    )
