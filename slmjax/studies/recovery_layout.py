"""Recovery reports as tables, Markdown, JSON, and an HTML page with a plot of quality against bytes."""

import dataclasses
import html
from collections.abc import Sequence
from pathlib import Path

from rich.console import Group

from slmjax.studies.recovery import ArmRecovery, RecoveryOver, RecoveryReport
from slmjax.studies.statistics.samples import Interval, PairedDifference, Summary
from slmjax.studies.text_tables import (
    ABSENT,
    TextTable,
    console_tables,
    in_words,
    interval_text,
    listed,
    markdown_tables,
    num_decimals,
    print_tables,
    signed,
    with_deviation,
    with_renamed_keys,
)
from slmjax.telemetry.report import charts as chart_module
from slmjax.telemetry.report.charts import Chart, Point
from slmjax.telemetry.report.page import chart_grid, document, heading, table
from slmjax.telemetry.run_directory import plain, write_json


def recovery_table(report: RecoveryReport) -> Group:
    """Return the report for a console of rich; `print_recovery` prints it at any width."""
    return console_tables(recovery_text_tables(report), report.notes)


def print_recovery(report: RecoveryReport) -> None:
    """Print the report to standard output, complete in a pipe and on a terminal of any width."""
    print_tables(recovery_text_tables(report), report.notes)


def recovery_markdown(report: RecoveryReport) -> str:
    """Return the report as Markdown, for an entry of experiments/LOG.md."""
    return markdown_tables(recovery_text_tables(report), report.notes)


def recovery_json(report: RecoveryReport) -> dict:
    """Return the report for JSON, unrounded."""
    # The key of the recovered fraction in files is older than the field's name.
    return with_renamed_keys(plain(dataclasses.asdict(report)), {"fraction": "share"})


# Tables -----------------------------------------------------------------------------------------------------
def recovery_text_tables(report: RecoveryReport) -> list[TextTable]:
    """Return the tables of a report: results of each arm, and recoveries."""
    way = "lower" if report.lower_is_better else "higher"
    # By column, since the decimals of a column depend on all of its arms.
    columns = [
        [arm.arm for arm in report.arms],
        [str(len(arm.seeds)) for arm in report.arms],
        with_deviation([arm.metric for arm in report.arms]),
        [_with_error(arm.distance) for arm in report.arms],
        with_deviation([arm.kl for arm in report.arms]),
        [_mean(arm.agreement, ".1%") for arm in report.arms],
        [_mean(arm.stored_bytes, ",.0f") for arm in report.arms],
        [_mean(arm.bits_per_number, ".2f") for arm in report.arms],
        [_mean(arm.tokens_per_second, ",.0f") for arm in report.arms],
    ]
    head = (
        "arm",
        "seeds",
        in_words(report.metric),
        "from the reference",
        "KL from the reference",
        "same first choice",
        "bytes",
        "bits per weight",
        "tokens/s, training",
    )
    title = (
        f"{report.study}: {in_words(report.metric)}, {way} is better; mean ± standard deviation over seeds "
        f"{listed(report.seeds)}, "
        f"differences ± standard error; reference: {report.reference}"
    )
    # Columns that would be empty for every arm are left out.
    if any(arm.unrounded is not None for arm in report.arms):
        columns.append(with_deviation([arm.unrounded for arm in report.arms]))
        head += (f"{in_words(report.metric)} before rounding",)
    if any(arm.tuned is not None for arm in report.arms):
        columns.append([ABSENT if arm.tuned is None else f"{arm.tuned.rate:g}" for arm in report.arms])
        head += ("best learning rate",)
    text_tables = [TextTable(title=title, head=head, rows=tuple(zip(*columns, strict=True)))]
    if rows := tuple(_recovery_row(arm.arm, over) for arm in report.arms for over in arm.recoveries):
        confidence = f"{100 * report.confidence:g}%"
        head = (
            "arm",
            "over",
            "seeds",
            "cost of rounding",
            "recovered",
            f"{confidence} Fieller",
            f"{confidence} bootstrap",
            "p (Holm)",
            "interval",
        )
        title = (
            "Recovery, 1 − (arm − reference) / (rounded − reference): 0 as rounded, 100% as the reference; "
            "± standard error (delta method)"
        )
        text_tables.append(TextTable(title=title, head=head, rows=rows))
    return text_tables


def _mean(summary: Summary | None, spec: str) -> str:
    return ABSENT if summary is None else f"{summary.mean:{spec}}"


def _with_error(difference: PairedDifference | None) -> str:
    if difference is None:
        return ""
    decimals = num_decimals(difference.standard_error, difference.mean)
    return f"{signed(difference.mean, decimals)} ± {difference.standard_error:.{decimals}f}"


def _recovery_row(arm: str, over: RecoveryOver) -> tuple[str, ...]:
    first_cells = (arm, over.rounded, str(len(over.pairs)))
    verdict = over.verdict.value
    if (recovered := over.recovered) is None:
        return *first_cells, *[ABSENT] * 5, verdict
    cost = _with_error(recovered.cost)
    if recovered.fraction is None:
        return *first_cells, cost, *[ABSENT] * 4, verdict
    decimals = max(num_decimals(recovered.standard_error, recovered.fraction) - 2, 0)  # in percent
    error = "" if recovered.standard_error is None else f" ± {100 * recovered.standard_error:.{decimals}f}"
    p = ABSENT
    if over.adjusted_p is not None:
        p = "< 0.001" if over.adjusted_p < 0.001 else f"{over.adjusted_p:.3f}"
    intervals = (recovered.fieller_interval, recovered.bootstrap_interval)
    return (
        *first_cells,
        cost,
        # The typographic minus, as in all other cells.
        f"{100 * recovered.fraction:.{decimals}f}%{error}".replace("-", "−"),
        *(_percent(interval, decimals) for interval in intervals),
        p,
        verdict,
    )


def _percent(ends: Interval | None, decimals: int) -> str:
    return ABSENT if ends is None else interval_text((100 * ends[0], 100 * ends[1]), decimals) + "%"


# A page -----------------------------------------------------------------------------------------------------
def quality_chart(report: RecoveryReport, *, name: str = "quality-against-bytes") -> Chart | None:
    """Return the chart of quality against bytes for all measured arms; None if there are none."""
    # Roles are not stored with the arms: they follow from the comparisons.
    rounded = {over.rounded for arm in report.arms for over in arm.recoveries}

    def kind(arm: str) -> str:
        return "rounded" if arm in rounded else "reference" if arm == report.reference else "trained"

    shown = [
        Point(
            label=arm.arm, series=kind(arm.arm), x=arm.stored_bytes.mean, y=arm.metric.mean, error=_error(arm)
        )
        for arm in report.arms
        if arm.metric is not None and arm.stored_bytes is not None
    ]
    metric = in_words(report.metric)
    about = f"{metric} over bytes as stored; bars: standard error of the paired difference from the reference"
    return chart_module.points(
        name, f"{report.study}: quality against bytes", about, shown, x_title="bytes", y_title=metric
    )


def _error(arm: ArmRecovery) -> float:
    """Return the standard error of the distance from the reference: common noise moves all points alike."""
    return 0.0 if arm.distance is None else arm.distance.standard_error


def write_recovery(
    reports: Sequence[RecoveryReport], directory: str | Path, *, with_page: bool = True
) -> Path:
    """Write recovery.json, recovery.md and, with `with_page`, recovery.html and its plots.

    Returns:
      the path of the page, or of recovery.json without one.

    Raises:
      ValueError: `with_page` is set, but the `plot` extra is not installed.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "recovery.md").write_text("\n".join(map(recovery_markdown, reports)), encoding="utf-8")
    # JSON and Markdown first: they need no extra, and are there even if plots fail.
    written = write_json(
        directory / "recovery.json", {"reports": [recovery_json(report) for report in reports]}
    )
    if not with_page:
        return written
    # A page numbers its charts, so that sections need the index of their first one.
    pairs = [(report, quality_chart(report, name=f"quality-{i}")) for i, report in enumerate(reports)]
    charts = [chart for _, chart in pairs if chart is not None]
    body = heading("Recovery", " · ".join(report.study for report in reports)) + "".join(
        recovery_section(
            report, [] if chart is None else [chart], first=charts.index(chart) if chart is not None else 0
        )
        for report, chart in pairs
    )
    page = directory / "recovery.html"
    page.write_text(document(title="Recovery", body=body, charts=charts), encoding="utf-8")
    for chart in charts:
        (directory / f"{chart.name}.png").write_bytes(chart_module.png(chart))
    return page


def recovery_section(report: RecoveryReport, charts: Sequence[Chart], *, first: int = 0) -> str:
    """Return a report's section of a page; `first` is the index of its first chart."""
    # Names of arms come from users, and are escaped.
    tables = "".join(
        f'<p class="soft">{html.escape(text_table.title)}</p>{table(text_table.rows, head=text_table.head)}'
        for text_table in recovery_text_tables(report)
    )
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in report.notes)
    return f"<h2>{html.escape(report.study)}</h2>{chart_grid(charts, first)}{tables}" + (
        f"<ul>{notes}</ul>" if notes else ""
    )
