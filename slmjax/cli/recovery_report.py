"""`slmjax formats report`: what quantization costs the arms of a study, and what training recovers of it."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

from slmjax.cli.options import parse, positional, print_json


def recovery_command(argv: Sequence[str]) -> int:
    """Report what quantization costs in a study, and what training recovers of it.

    slmjax formats report STUDY.py|STUDY_DIR
    """

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        # Python file whose study() has a recovery, or the directory in which it was run
        study: Annotated[str, *positional("STUDY.py|STUDY_DIR")]
        # directory in which the file was run (none: runs/studies/ and the file's name)
        directory: Annotated[str | None, *positional("[DIRECTORY]")] = None
        # also write recovery.html and its plots (needs the plot extra)
        page: bool = True
        # print the report as JSON
        json: bool = False

    args = parse(Arguments, argv, command="formats report", description=recovery_command.__doc__)
    from slmjax.studies import print_recovery, recovery_json, write_recovery
    from slmjax.studies.ablation import open_ablation

    ablation = open_ablation(args.study, directory=args.directory)
    reports = _reports(ablation)
    written = write_recovery(reports, ablation.directory, with_page=args.page)
    if args.json:
        print_json({"written": str(written), "reports": [recovery_json(report) for report in reports]})
        return 0
    for report in reports:
        print_recovery(report)
        print()
    print(written)
    return 0


def _reports(ablation: Any) -> list[Any]:
    """Report on each study that has a recovery, after measuring finished members not measured before."""
    from slmjax.studies import TuningUnfinished, measure, read_members, report_recovery, tune
    from slmjax.studies.ablation import matched_study

    studies = [study for study in ablation.studies if study.recovery is not None]
    if not studies:
        raise ValueError(
            f"{ablation.file} has no study with a recovery: give one "
            "recovery=Recovery(reference=ARM, rounded={ARM: ROUNDED_ARM}), as experiments/qat_study.py does"
        )
    reports = []
    for study in studies:
        directory = ablation.directory_of(study)
        # As it was run: arms made equal, and at the rates that were chosen for them.
        study, _ = matched_study(study, directory)
        try:
            study, tuned = tune(study, directory, run=read_members)
            members = read_members(study, directory)
        except TuningUnfinished:
            tuned = ()
            members = ()
        if not members:
            raise ValueError(
                f"{directory} has no member of the study {study.name}: run it first, with slmjax ablate "
                f"{ablation.file} --directory {ablation.directory}"
            )
        reports.append(report_recovery(study, members, measure(study, members, directory), tuned=tuned))
    return reports
