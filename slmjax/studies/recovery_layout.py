"""A recovery report as people and programs read it: tables, Markdown, JSON, and a page with a plot of quality
against bytes.
"""

import dataclasses
import html
from collections.abc import Sequence
from pathlib import Path

from rich.console import Group

from slmjax.studies.grids import (
    ABSENT,
    TextTable,
    grids_markdown,
    grids_table,
    in_words,
    interval_text,
    listed,
    num_places,
    signed,
    with_deviation,
)
from slmjax.studies.recovery import ArmRecovery, RecoveryOver, RecoveryReport
from slmjax.studies.statistics import Interval, PairedDifference, Summary
from slmjax.telemetry.report import charts as chart_module
from slmjax.telemetry.report.charts import Chart, Point
from slmjax.telemetry.report.page import chart_grid, document, heading, table
from slmjax.telemetry.run_directory import plain, write_json


def recovery_table(report: RecoveryReport) -> Group:
    """The report for a terminal."""
    return grids_table(recovery_grids(report), report.notes)


def recovery_markdown(report: RecoveryReport) -> str:
    """The report as Markdown, as an entry of experiments/LOG.md has it."""
    return grids_markdown(recovery_grids(report), report.notes)


def recovery_json(report: RecoveryReport) -> dict:
    """The report as JSON can hold it, unrounded."""
    return plain(dataclasses.asdict(report))


# Tables -----------------------------------------------------------------------------------------------------
def recovery_grids(report: RecoveryReport) -> list[TextTable]:
    """What each arm came to, and what those recover that are measured against a rounded one."""
    way = "lower" if report.lower_is_better else "higher"
    columns = [
        [one.arm for one in report.arms],
        [str(len(one.seeds)) for one in report.arms],
        with_deviation([one.metric for one in report.arms]),
        [_with_error(one.distance) for one in report.arms],
        with_deviation([one.kl for one in report.arms]),
        [_mean(one.agreement, ".1%") for one in report.arms],
        [_mean(one.stored_bytes, ",.0f") for one in report.arms],
        [_mean(one.bits_per_number, ".2f") for one in report.arms],
        [_mean(one.tokens_per_second, ",.0f") for one in report.arms],
    ]
    head = (
        "arm",
        "seeds",
        in_words(report.metric),
        "from the reference",
        "KL from the reference",
        "same first choice",
        "bytes",
        "bits a number",
        "tokens/s, training",
    )
    title = (
        f"{report.study}: {in_words(report.metric)}, {way} is better; mean ± standard deviation over seeds "
        f"{listed(report.seeds)}, "
        f"differences ± standard error; reference: {report.reference}"
    )
    if any(one.unrounded is not None for one in report.arms):
        columns.append(with_deviation([one.unrounded for one in report.arms]))
        head += (f"{in_words(report.metric)} before rounding",)
    if any(one.rate is not None for one in report.arms):
        columns.append([ABSENT if one.rate is None else f"{one.rate.rate:g}" for one in report.arms])
        head += ("best learning rate",)
    grids = [TextTable(title=title, head=head, rows=tuple(zip(*columns, strict=True)))]
    if rows := tuple(_recovery_row(one.arm, over) for one in report.arms for over in one.recoveries):
        share = f"{100 * report.confidence:g}%"
        head = (
            "arm",
            "over",
            "seeds",
            "cost of rounding",
            "recovered",
            f"{share} Fieller",
            f"{share} bootstrap",
            "p (Holm)",
            "interval",
        )
        title = "Recovery, 1 − (arm − reference) / (rounded − reference): 0 as rounded, 100% as the reference; ± standard error (delta method)"
        grids.append(TextTable(title=title, head=head, rows=rows))
    return grids


def _mean(one: Summary | None, how: str) -> str:
    return ABSENT if one is None else f"{one.mean:{how}}"


def _with_error(one: PairedDifference | None) -> str:
    if one is None:
        return ""
    places = num_places(one.standard_error, one.mean)
    return f"{signed(one.mean, places)} ± {one.standard_error:.{places}f}"


def _recovery_row(arm: str, one: RecoveryOver) -> tuple[str, ...]:
    begin = (arm, one.rounded, str(len(one.pairs)))
    verdict = one.verdict.value
    if (found := one.recovered) is None:
        return *begin, *[ABSENT] * 5, verdict
    cost = _with_error(found.cost)
    if found.share is None:
        return *begin, cost, *[ABSENT] * 4, verdict
    decimals = max(num_places(found.standard_error, found.share) - 2, 0)  # in percent
    error = "" if found.standard_error is None else f" ± {100 * found.standard_error:.{decimals}f}"
    p = ABSENT if one.adjusted_p is None else "< 0.001" if one.adjusted_p < 0.001 else f"{one.adjusted_p:.3f}"
    return (
        *begin,
        cost,
        f"{100 * found.share:.{decimals}f}%{error}".replace("-", "−"),
        *(_percent(each, decimals) for each in (found.fieller_interval, found.bootstrap_interval)),
        p,
        verdict,
    )


def _percent(ends: Interval | None, decimals: int) -> str:
    return ABSENT if ends is None else interval_text((100 * ends[0], 100 * ends[1]), decimals) + "%"


# A page -----------------------------------------------------------------------------------------------------
def quality_chart(report: RecoveryReport, *, name: str = "quality-against-bytes") -> Chart | None:
    """Quality against bytes: the reference, what is rounded of it, what was trained; None where nothing is
    measured.
    """
    rounded = {over.rounded for one in report.arms for over in one.recoveries}

    def kind(arm: str) -> str:
        return "rounded" if arm in rounded else "reference" if arm == report.reference else "trained"

    shown = [
        Point(
            label=one.arm, series=kind(one.arm), x=one.stored_bytes.mean, y=one.metric.mean, error=_error(one)
        )
        for one in report.arms
        if one.metric is not None and one.stored_bytes is not None
    ]
    metric = in_words(report.metric)
    about = f"{metric} over bytes as stored; bars: standard error of the paired difference from the reference"
    return chart_module.points(
        name, f"{report.study}: quality against bytes", about, shown, x_title="bytes", y_title=metric
    )


def _error(one: ArmRecovery) -> float:
    """Of the distance from the reference: the noise that arms share moves all points alike."""
    return 0.0 if one.distance is None else one.distance.standard_error


def write_recovery(
    reports: Sequence[RecoveryReport], directory: str | Path, *, with_page: bool = True
) -> Path:
    """Writes recovery.json, recovery.md and, where the `plot` extra is there to draw it, recovery.html;
    returns what is to be looked at.

    Raises:
      ValueError: a page is wanted, and the `plot` extra is not installed.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "recovery.md").write_text("\n".join(map(recovery_markdown, reports)), encoding="utf-8")
    written = write_json(
        directory / "recovery.json", {"reports": [recovery_json(report) for report in reports]}
    )
    if not with_page:
        return written
    found = [(report, quality_chart(report, name=f"quality-{i}")) for i, report in enumerate(reports)]
    charts = [chart for _, chart in found if chart is not None]
    body = heading("Recovery", " · ".join(report.study for report in reports)) + "".join(
        recovery_section(
            report, [] if chart is None else [chart], first=charts.index(chart) if chart is not None else 0
        )
        for report, chart in found
    )
    page = directory / "recovery.html"
    page.write_text(document(title="Recovery", body=body, charts=charts), encoding="utf-8")
    for chart in charts:
        (directory / f"{chart.name}.png").write_bytes(chart_module.png(chart))
    return page


def recovery_section(report: RecoveryReport, charts: Sequence[Chart], *, first: int = 0) -> str:
    """A report's part of a page, whose charts are those from `first` on."""
    tables = "".join(
        f'<p class="soft">{html.escape(grid.title)}</p>{table(grid.rows, head=grid.head)}'
        for grid in recovery_grids(report)
    )
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in report.notes)
    return f"<h2>{html.escape(report.study)}</h2>{chart_grid(charts, first)}{tables}" + (
        f"<ul>{notes}</ul>" if notes else ""
    )
