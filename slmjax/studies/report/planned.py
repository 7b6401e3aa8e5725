"""What a study's directory has of its plan: matches, learning rates, settings.

    planned = read_planned("studies/width")
    planned.matched[0].changed                        # "steps 300 to 250"

`plan.json` has the arms with their experiments, and what was chosen to make them equal; `tuned.json` the
learning rate of each arm, if rates were tuned. What is not there is empty: results from elsewhere have no
plan.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slmjax.stored_json import check_list, read_json, read_object
from slmjax.studies.report.data import MatchReport, TunedReport
from slmjax.studies.study_directory import PLAN
from slmjax.studies.tuning import Tuned
from slmjax.telemetry.report.reading import RunRecords, number
from slmjax.telemetry.run_directory import write_json

TUNED = "tuned.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """The plan of a study, as far as its directory has it."""

    size: str | None = None  # that its file was asked for
    matched: tuple[MatchReport, ...] = ()
    tuned: tuple[TunedReport, ...] = ()
    derived_from: Mapping[str, str] = dataclasses.field(default_factory=dict)  # by derived arm
    # by arm, a record without any result: settings are shown before the first run has ended
    experiments: Mapping[str, RunRecords] = dataclasses.field(default_factory=dict)


def read_planned(directory: str | Path) -> Planned:
    """Return the plan of a study's directory.

    Raises:
      DamagedFile: a file of the plan is damaged.
    """
    directory = Path(directory)
    remedy = "restore the file from a copy"
    tuned: list[Any] = []
    if (directory / TUNED).is_file():
        tuned = read_json(directory / TUNED, remedy=remedy)
        check_list(tuned, {"arm": str, "rate": float, "tried": list}, name=TUNED, remedy=remedy)
    if not (directory / PLAN).is_file():
        return Planned(tuned=tuple(map(_tuned, tuned)))
    optional = {"size": str, "arms": dict, "matched": list}
    plan = read_object(directory / PLAN, optional=optional, remedy=remedy)
    arms = {name: arm for name, arm in (plan.get("arms") or {}).items() if isinstance(arm, dict)}
    matched = plan.get("matched") or []
    check_list(matched, {"arm": str, "quantity": str}, name=f"'matched' of {PLAN}", remedy=remedy)
    return Planned(
        size=plan.get("size"),
        matched=tuple(map(_matched, matched)),
        tuned=tuple(map(_tuned, tuned)),
        derived_from={name: str(arm["derived_from"]) for name, arm in arms.items() if "derived_from" in arm},
        experiments={
            name: _without_results(directory, arm["experiment"])
            for name, arm in arms.items()
            if isinstance(arm.get("experiment"), dict)
        },
    )


def write_tuned(directory: str | Path, tuned: Sequence[Tuned]) -> Path:
    """Write the learning rates of a study to its directory, for its report."""
    return write_json(Path(directory) / TUNED, [dataclasses.asdict(item) for item in tuned])


def _matched(record: Mapping[str, Any]) -> MatchReport:
    before = record.get("value_before")
    after = record.get("value_after")
    target = number(record.get("target"))
    reached = number(record.get("after"))
    tolerance = number(record.get("tolerance")) or 0.0
    is_met = target is not None and reached is not None and abs(reached - target) <= tolerance * abs(target)
    return MatchReport(
        arm=record["arm"],
        quantity=record["quantity"],
        target=target,
        before=number(record.get("before")),
        after=reached,
        changed="nothing" if before == after else f"{record.get('dimension')} {before} to {after}",
        is_met=is_met,
        text=str(record.get("text") or ""),
    )


def _tuned(record: Mapping[str, Any]) -> TunedReport:
    tried = [item for item in record["tried"] if isinstance(item, dict)]
    return TunedReport(
        arm=record["arm"],
        rate=float(record["rate"]),
        tried=tuple(
            (rate, number(item.get("value")))
            for item in tried
            if (rate := number(item.get("rate"))) is not None and math.isfinite(rate)
        ),
        seeds=tuple(seed for seed in record.get("seeds") or () if isinstance(seed, int)),
        is_resolved=bool(record.get("is_resolved", True)),
        sensitivity=number(record.get("sensitivity")),
        text=str(record.get("reason") or ""),
    )


def _without_results(directory: Path, experiment: dict[str, Any]) -> RunRecords:
    return RunRecords(
        path=directory,
        config=experiment,
        environment={},
        data=[],
        result=None,
        train=[],
        evals=[],
        samples=[],
        messages=[],
    )
