"""`slmjax formats report`: what quantization costs the arms of a study, and what training recovers of it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from slmjax.cli.options import parse, positional, print_json


def recovery_command(argv: Sequence[str]) -> int:
    """Report what quantization costs in a study, and what training recovers of it.

    slmjax formats report STUDY_FILE [DIRECTORY]
    """

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        # Python file of a study that defines recoveries(directory)
        study_file: Annotated[str, *positional("STUDY_FILE")]
        # directory in which the study was trained (none: runs/ and the file's name)
        directory: Annotated[str | None, *positional("[DIRECTORY]")] = None
        # also write recovery.html and its plots (needs the plot extra)
        page: bool = True
        # print the report as JSON
        json: bool = False

    args = parse(Arguments, argv, command="formats report", description=recovery_command.__doc__)
    from slmjax.studies import print_recovery, recovery_json, write_recovery

    path = Path(args.study_file)
    directory = Path(args.directory or Path("runs") / path.stem.replace("_", "-"))
    reports = _reports(path, directory)
    written = write_recovery(reports, directory, with_page=args.page)
    if args.json:
        print_json({"written": str(written), "reports": [recovery_json(report) for report in reports]})
        return 0
    for report in reports:
        print_recovery(report)
        print()
    print(written)
    return 0


def _reports(path: Path, directory: Path) -> list[Any]:
    """Report on each recovery of a study file, after measuring finished members not measured before."""
    from slmjax.studies import measure, read_members, report_recovery
    from slmjax.training import recipes

    find_recoveries: Any = getattr(recipes.run_file(path), "recoveries", None)
    if not callable(find_recoveries):
        raise ValueError(
            f"{path} needs a function `def recoveries(directory: Path) -> tuple[Recovery, ...]` that names "
            "the reference arm and the quantized arms; experiments/qat_study.py has one"
        )
    reports = []
    recoveries: Any = find_recoveries(directory)
    for recovery in recoveries:
        study_dir = directory / recovery.directory
        members = read_members(recovery.study, study_dir)
        if not members:
            raise ValueError(
                f"{study_dir} has no member of the study {recovery.study.name}: give the directory in which "
                f"{path} was run"
            )
        measurements = measure(recovery, members, study_dir)
        reports.append(report_recovery(recovery, members, measurements))
    return reports
