"""`slmjax report`, `slmjax runs` and `slmjax compare`."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

from slmjax.cli.options import by_place, parse, print_json


def report_command(words: Sequence[str]) -> int:
    """write a run's page: slmjax report RUN_DIR"""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        run_dir: Annotated[str, *by_place("RUN_DIR")]  # run directory, finished or not
        output: str | None = None  # file of the page (none: report.html in the run directory)
        images: bool = True  # write the charts as PNG files too, to plots/ in the run directory
        json: bool = False  # print the page's path as JSON

    given = parse(Arguments, words, command="report", description=report_command.__doc__)
    from slmjax.telemetry.report import write_report

    page = write_report(given.run_dir, output=given.output, with_images=given.images)
    print_json({"page": str(page)}) if given.json else print(page)
    return 0


def runs_command(words: Sequence[str]) -> int:
    """list runs with their results: slmjax runs [DIR]"""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        directory: Annotated[str, *by_place("[DIR]")] = "runs"  # where run directories are
        json: bool = False  # print the list as JSON

    given = parse(Arguments, words, command="runs", description=runs_command.__doc__)
    from slmjax.telemetry.report import list_runs

    found = list_runs(given.directory)
    print_json([dataclasses.asdict(one) for one in found]) if given.json else _show_runs(found)
    return 0


def _show_runs(found: Sequence[Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from slmjax.data.lost_text import lost_note
    from slmjax.telemetry.progress import format_seconds

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", no_wrap=True)
    table.add_column("state")
    for name in ("step", "loss", "bits/byte", "params", "time"):
        table.add_column(name, justify="right")
    for one in found:
        partly = "" if one.complete else "~"
        table.add_row(
            one.name,
            one.status,
            f"{one.step:,}/{one.steps:,}",
            "" if one.loss is None else f"{partly}{one.loss:.4f}",
            ""
            if one.bits_per_byte is None
            else f"{partly}{one.bits_per_byte:.3f}{'!' if one.lost_text else ''}",
            "" if one.parameters is None else f"{one.parameters / 1e6:.1f}M",
            "" if one.seconds is None else format_seconds(one.seconds),
        )
    console = Console(highlight=False)
    console.print(table)
    if any(one.loss is not None and not one.complete for one in found):
        console.print("~ on a part of the held-out text, by the last evaluation on the way")
    for one in found:
        if one.lost_text:
            console.print(f"! {one.name}: {lost_note(one.lost_text)}")


def compare_command(words: Sequence[str]) -> int:
    """put runs side by side in one page: slmjax compare RUN_DIR RUN_DIR ..."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        run_dirs: Annotated[tuple[str, ...], *by_place("RUN_DIR ...")]  # run directories
        output: str = "comparison.html"  # file of the page
        json: bool = False  # print results and differing settings as JSON

    given = parse(Arguments, words, command="compare", description=compare_command.__doc__)
    from slmjax.telemetry.report import comparison, write_comparison

    page = write_comparison(given.run_dirs, given.output)
    runs = comparison.read_runs(given.run_dirs)
    names = comparison.short_names(runs)
    if given.json:
        tables = {"results": comparison.results(runs), "settings": comparison.config_differences(runs)}
        rows = {
            title: {name: dict(zip(names, cells, strict=True)) for name, *cells in part}
            for title, part in tables.items()
        }
        print_json({"page": str(page), **rows})
        return 0
    _show_rows("results", names, comparison.shown_results(runs))
    _show_rows("settings that differ", names, comparison.shown_differences(runs))
    print(page)
    return 0


def _show_rows(title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
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
