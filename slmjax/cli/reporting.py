"""`slmjax report`, `slmjax runs` and `slmjax compare`."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

from slmjax.cli.options import parse, positional, print_json


def report_command(argv: Sequence[str]) -> int:
    """Write the HTML report of a run.

    slmjax report RUN_DIR
    """

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        # run directory, finished or not
        run_dir: Annotated[str, *positional("RUN_DIR")]
        # file to write (none: report.html in the run directory)
        output: str | None = None
        # also write the charts as PNG files, to plots/ in the run directory
        images: bool = True
        # print the path of the report as JSON
        json: bool = False

    args = parse(Arguments, argv, command="report", description=report_command.__doc__)
    from slmjax.telemetry.report import write_report

    page = write_report(args.run_dir, output=args.output, with_images=args.images)
    print_json({"page": str(page)}) if args.json else print(page)
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
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from slmjax.data.lost_text import lost_note

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", no_wrap=True)
    table.add_column("state")
    for name in ("step", "loss", "bits/byte", "params", "time"):
        table.add_column(name, justify="right")
    for run in runs:
        table.add_row(*_run_cells(run))
    console = Console(highlight=False)
    console.print(table)
    if any(run.loss is not None and not run.complete for run in runs):
        console.print("~ on part of the held-out text, from the last evaluation during training")
    for run in runs:
        if run.lost_text:
            console.print(f"! {run.name}: {lost_note(run.lost_text)}")


def _run_cells(run: Any) -> tuple[str, ...]:
    from slmjax.telemetry.progress import format_seconds

    partial = "" if run.complete else "~"
    lossy = "!" if run.lost_text else ""
    return (
        run.name,
        run.status,
        f"{run.step:,}/{run.steps:,}",
        "" if run.loss is None else f"{partial}{run.loss:.4f}",
        "" if run.bits_per_byte is None else f"{partial}{run.bits_per_byte:.3f}{lossy}",
        "" if run.parameters is None else f"{run.parameters / 1e6:.1f}M",
        "" if run.seconds is None else format_seconds(run.seconds),
    )


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
        # print the results and the settings that differ as JSON
        json: bool = False

    args = parse(Arguments, argv, command="compare", description=compare_command.__doc__)
    from slmjax.telemetry.report import comparison, write_comparison

    page = write_comparison(args.run_dirs, args.output)
    runs = comparison.read_runs(args.run_dirs)
    names = comparison.short_names(runs)
    if args.json:
        tables = {"results": comparison.results(runs), "settings": comparison.config_differences(runs)}
        by_run = {
            title: {row: dict(zip(names, cells, strict=True)) for row, *cells in rows}
            for title, rows in tables.items()
        }
        print_json({"page": str(page), **by_run})
        return 0
    _print_rows("results", names, comparison.shown_results(runs))
    _print_rows("settings that differ", names, comparison.shown_differences(runs))
    print(page)
    return 0


def _print_rows(title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    if not rows:
        return
    table = Table(title=title, title_justify="left")
    for name in ("", *names):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)
