"""The members of a study as its directory has them, without the study file."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from slmjax.stored_json import check_object
from slmjax.studies.arms import directory_name
from slmjax.studies.study import MEMBERS, Member
from slmjax.telemetry.run_directory import read_log, with_present_names

SEVERAL = "studies.json"  # in the directory of several studies: the directory of each


def recorded_members(
    directory: str | Path, *, arms: Sequence[str], seeds: Sequence[int]
) -> tuple[Member, ...]:
    """Return the members of these arms and seeds in members.jsonl, the last record of each."""
    path = Path(directory) / MEMBERS
    fields = {"arm": str, "seed": int, "fingerprint": str, "status": str, "result": dict, "evaluation": dict}
    remedy = "remove the line, and the member is read from its run the next time the study is run"
    names = {field.name for field in dataclasses.fields(Member)}
    latest: dict[tuple[str, int], Member] = {}
    for record in read_log(path, kind="member") if path.is_file() else []:
        check_object(record, fields, optional={"error": str}, name=f"a record of {path}", remedy=remedy)
        known = {name: value for name, value in record.items() if name in names}
        member = Member(**{**known, "result": with_present_names(record["result"])})
        latest[member.arm, member.seed] = member
    keys = [(arm, seed) for seed in seeds for arm in arms]
    return tuple(latest[key] for key in keys if key in latest)


def directory_of_run(directory: Path, member: Member) -> Path | None:
    """Return the run directory of a member; None if it is not there, or the member has none."""
    recorded = member.result.get("run_dir")
    if not isinstance(recorded, str):
        return None
    path = Path(recorded)
    # A study that was moved has its runs at the same place inside.
    inside = directory / directory_name(member.arm) / f"seed-{member.seed}" / path.name
    return next((each for each in (path, inside) if (each / "config.json").is_file()), None)
