"""`slmjax report`, `slmjax runs` and `slmjax compare`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from slmjax.cli.options import parse, positional, print_json


def report_command(argv: Sequence[str]) -> int:
    """Write the HTML report of a run or of a study.

    slmjax report RUN_DIR
    slmjax report STUDY_DIR [--log [--write]]
    slmjax report STUDY_DIR --no-page --output experiments/results/NAME

    The report of a study has tables for texts, too, and report.json, from which it can be written again
    without the runs.
    """

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        # directory of a run or a study, finished or not, or one with the report.json of a study
        directory: Annotated[str, *positional("RUN_DIR|STUDY_DIR")]
        # file to write (none: report.html in the run directory); of a study, the directory to write to
        output: str | None = None
        # also write the charts as PNG files, to plots/ in the run directory
        images: bool = True
        # of a study: also write report.html; without it, --output has what a repository keeps of a study
        page: bool = True
        # print the entry of a study for a log of questions, such as experiments/LOG.md
        log: bool = False
        # with --log, also insert it above the other entries of the log file
        write: bool = False
        # the log file
        log_file: str = "experiments/LOG.md"
        # print the path of the report as JSON
        json: bool = False

    args = parse(Arguments, argv, command="report", description=report_command.__doc__)
    if args.write and not args.log:
        raise ValueError("--write inserts the entry that --log prints: use both, --log --write")
    if not (Path(args.directory) / "config.json").is_file():
        return _report_study(args)
    if args.log:
        raise ValueError(f"{args.directory} is a run, and --log is for a study: name the study's directory")
    from slmjax.telemetry.report import write_report

    page = write_report(args.directory, output=args.output, with_images=args.images)
    print_json({"page": str(page)}) if args.json else print(page)
    return 0


def _report_study(args: Any) -> int:
    from slmjax.studies.report import (
        directories_of,
        insert_entry,
        log_entry,
        study_report,
        write_report_files,
    )

    studies = []
    for directory in directories_of(args.directory):
        report = study_report(directory)
        # Of several studies, each has a directory of its own in the one that is written to.
        several = directory != Path(args.directory)
        parent = Path(args.output) if args.output is not None else Path(args.directory)
        target = parent / directory.name if several else parent
        page = write_report_files(report, target, with_page=args.page)
        entry = log_entry(report) if args.log else None
        if args.write:
            insert_entry(str(entry), args.log_file)
        studies.append({"study": report.study, "page": str(page), "entry": entry})
        if not args.json:
            print(page if entry is None else entry)
    if args.json:
        print_json({"page": studies[0]["page"] if studies else None, "studies": studies})
    return 0


def runs_command(argv: Sequence[str]) -> int:
    """List runs with their results.

    slmjax runs [DIR]
    """

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        # directory that contains the run directories
        directory: Annotated[str, *positional("[DIR]")] = "runs"
        # print the list as JSON
        json: bool = False

    args = parse(Arguments, argv, command="runs", description=runs_command.__doc__)
    from slmjax.telemetry.report import list_runs

    runs = list_runs(args.directory)
    print_json([dataclasses.asdict(run) for run in runs]) if args.json else _print_runs(runs)
    return 0


def _print_runs(runs: Sequence[Any]) -> None:
    from slmjax.data.lost_text import lost_note
    from slmjax.telemetry.columns import print_columns, printable

    head = ("run", "state", "step", "loss", "bits/byte", "params", "tokens", "time")
    print_columns(head, [_run_cells(run) for run in runs], right=range(2, len(head)))
    notes = ["tokens and time are of all sessions of a run"]
    if any(run.loss is not None and not run.complete for run in runs):
        notes.append("~ on part of the held-out text, from the last evaluation during training")
    if any(run.seconds is None and run.session_seconds is not None for run in runs):
        notes.append("+ the time of the last session: the log does not have them all")
    for run in runs:
        if run.changed:
            changes = list(run.changed.items())
            shown = "; ".join(f"{path} {_history(values)}" for path, values in changes[:MOST_CHANGES])
            further = f"; {len(changes) - MOST_CHANGES} more" if len(changes) > MOST_CHANGES else ""
            notes.append(f"* {run.name}: a resumed session changed settings: {shown}{further}")
        if run.lost_text:
            notes.append(f"! {run.name}: {lost_note(run.lost_text)}")
        if run.problem is not None:
            notes.append(f"? {run.name}: {run.problem}")
    print("\n".join(["", *map(printable, notes)]))


MOST_CHANGES = 3  # changed settings of a run that are listed


def _history(values: Sequence[Any]) -> str:
    from slmjax.telemetry.report.settings import History

    return History(tuple((step, value) for step, value in values)).text()


def _run_cells(run: Any) -> tuple[str, ...]:
    from slmjax.telemetry.progress import format_seconds

    partial = "" if run.complete else "~"
    lossy = "!" if run.lost_text else ""
    time = "" if run.seconds is None else format_seconds(run.seconds)
    if run.seconds is None and run.session_seconds is not None:
        time = f"{format_seconds(run.session_seconds)}+"
    marks = f"{'*' if run.changed else ''}{'?' if run.problem is not None else ''}"
    return (
        run.name,
        f"{run.status}{marks}",
        "" if run.problem is not None else f"{run.step:,}/{run.steps:,}",
        "" if run.loss is None else f"{partial}{run.loss:.4f}",
        "" if run.bits_per_byte is None else f"{partial}{run.bits_per_byte:.3f}{lossy}",
        "" if run.parameters is None else _rounded(run.parameters),
        "" if run.tokens is None else _rounded(run.tokens),
        time,
    )


def _rounded(count: int) -> str:
    """Return a count to three or four digits: 950, 60.0k, 1.4M, 2,000.5M."""
    return f"{count:,}" if count < 1000 else f"{count / 1e3:.1f}k" if count < 1e6 else f"{count / 1e6:,.1f}M"


def compare_command(argv: Sequence[str]) -> int:
    """Compare the results and settings of runs, in one HTML page.

    slmjax compare RUN_DIR RUN_DIR ...
    """

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        # run directories, two or more
        run_dirs: Annotated[tuple[str, ...], *positional("RUN_DIR ...")]
        # file to write
        output: str = "comparison.html"
        # print all settings that differ, those of layers one by one, and not the most important
        all: bool = False
        # print the results and all settings that differ as JSON
        json: bool = False

    args = parse(Arguments, argv, command="compare", description=compare_command.__doc__)
    from slmjax.telemetry.columns import print_columns
    from slmjax.telemetry.report import comparison
    from slmjax.telemetry.report.names import full_names, short_names

    page = comparison.write_comparison(args.run_dirs, args.output)
    runs = comparison.read_runs(args.run_dirs)
    paths = [run.path for run in runs]
    if args.json:
        tables = {"results": comparison.results(runs), "settings": comparison.config_differences(runs)}
        by_run = {
            title: {row: _by_run(full_names(paths), cells) for row, *cells in rows}
            for title, rows in tables.items()
        }
        print_json({"page": str(page), **by_run})
        return 0
    names = short_names(paths)
    most = None if args.all else comparison.MOST_SETTINGS
    differences = comparison.shown_differences(runs, most=most)
    print_columns(("run", "directory"), [*zip(names, map(str, paths), strict=True)])
    print()
    print_columns(("", *names), comparison.shown_results(runs), title="results")
    if note := comparison.text_note(runs):
        print(note)
    print()
    print_columns(("", *names), differences.rows, title="settings that differ")
    if differences.further:
        print(f"{len(differences.further)} more settings, those of single layers too, with --all")
    print(f"\n{page}")
    return 0


def _by_run(names: Sequence[str], cells: Sequence[Any]) -> dict[str, Any]:
    """Return values by the name of their run; one that a session changed as a list of [first step, value]."""
    from slmjax.telemetry.report.settings import History

    values = [list(cell.values) if isinstance(cell, History) else cell for cell in cells]
    return dict(zip(names, values, strict=True))
