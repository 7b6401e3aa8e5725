"""`slmjax quant report`: what quantization costs the arms of a study, and what training recovers of it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from slmjax.cli.options import by_place, parse, print_aside, print_json


def recovery_command(words: Sequence[str]) -> int:
    """what training for a format recovers of what rounding to it costs: slmjax quant report STUDY_FILE
    [DIRECTORY]
    """

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        study_file: Annotated[
            str, *by_place("STUDY_FILE")
        ]  # Python file of a study, with recoveries(directory)
        directory: Annotated[str | None, *by_place("[DIRECTORY]")] = (
            None  # where the study was trained (none: runs/ and the file's name)
        )
        page: bool = True  # write recovery.html and its plots too (the plot extra)
        json: bool = False  # print the report as JSON

    given = parse(Arguments, words, command="quant report", description=recovery_command.__doc__)
    from rich.console import Console

    from slmjax.studies import recovery_json, recovery_table, write_recovery

    path = Path(given.study_file)
    directory = Path(given.directory or Path("runs") / path.stem.replace("_", "-"))
    reports = _reports(path, directory)
    written = write_recovery(reports, directory, with_page=given.page)
    if given.json:
        print_json({"written": str(written), "reports": [recovery_json(report) for report in reports]})
        return 0
    console = Console(width=max(180, Console().width), highlight=False)
    for report in reports:
        console.print(recovery_table(report))
    print(written)
    return 0


def _reports(path: Path, directory: Path) -> list[Any]:
    """What the members of a study file's recoveries have come to so far; those that were not measured yet
    are.
    """
    from slmjax.studies import measure, read_members, report_recovery
    from slmjax.training import recipes

    find: Any = getattr(recipes.run_file(path), "recoveries", None)
    if not callable(find):
        raise ValueError(
            f"{path} needs a function `def recoveries(directory: Path) -> tuple[Recovery, ...]` that says "
            "which arm is the reference and "
            "which are rounded, and has none: experiments/qat_study.py has one"
        )
    reports = []
    recoveries: Any = find(directory)
    for recovery in recoveries:
        place = directory / recovery.directory
        members = read_members(recovery.study, place)
        if not members:
            raise ValueError(
                f"{place} holds no member of the study {recovery.study.name}: name the directory in which "
                f"{path} was run"
            )
        reports.append(report_recovery(recovery, members, measure(recovery, members, place, log=print_aside)))
    return reports
