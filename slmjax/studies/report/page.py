"""The page of a study: one HTML file that loads nothing else."""

import html
from collections.abc import Sequence

from slmjax.studies.caveats import counted
from slmjax.studies.report.charts import curves_chart, tradeoffs, tuned_rates
from slmjax.studies.report.data import ComparisonReport, StudyReport
from slmjax.studies.report.sentences import (
    answer_text,
    freedom_text,
    ladder_sentences,
    losers,
    metric_words,
    progress_text,
    summary,
)
from slmjax.studies.report.tables import (
    arms_table,
    costs_table,
    further_table,
    ladder_table,
    matching_table,
    noise_table,
    sensitivity_note,
    settings_table,
    statistics_table,
    text_table,
    time_note,
    tuning_table,
    verdicts_table,
)
from slmjax.studies.report.verdict_charts import forest_chart, pairs_chart
from slmjax.studies.text_tables import TextTable, in_words
from slmjax.telemetry.report.charts import Chart
from slmjax.telemetry.report.page import chart_grid, document, folded, heading, table

MOST_SETTINGS = 30  # rows of settings that are shown at once


class _Page:
    """Parts of a page with its charts, which are numbered in the order in which they stand."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.charts: list[Chart] = []

    def section(self, title: str, *parts: str) -> None:
        """Add a section, unless all of its parts are empty."""
        if any(parts):
            self.parts.append(f"<h2>{html.escape(title)}</h2>{''.join(parts)}")

    def grid(self, charts: Sequence[Chart | None]) -> str:
        """Return the places of charts; empty without one."""
        shown = [chart for chart in charts if chart is not None]
        if not shown:
            return ""
        first = len(self.charts)
        self.charts += shown
        return chart_grid(shown, first)


def study_page(report: StudyReport) -> str:
    """Return the page of a study as HTML.

    Raises:
      ValueError: the `plot` extra, which draws the charts, is not installed.
    """
    page = _Page()
    about = " · ".join(
        text for text in (report.study, progress_text(report), metric_words(report), report.date) if text
    )
    page.parts.append(heading(report.question or report.study, about))
    page.parts.append(_paragraphs([summary(report), answer_text(report), report.look], kind="lead"))
    # The order is that of a reader's questions: the verdicts first, how they were made last.
    page.section("Verdicts", page.grid([forest_chart(report)]), _table(verdicts_table(report)))
    page.section("What lost", _list(losers(report)))
    tables = (arms_table(report), costs_table(report), further_table(report))
    page.section("Arms", *map(_table, tables), _paragraphs([time_note(report)], kind="about"))
    page.section("Sizes", _table(ladder_table(report)), _list(ladder_sentences(report)))
    fronts = tradeoffs(report)
    page.section(
        "Quality and cost",
        page.grid([chart for chart, _ in fronts]),
        _list([text for _, text in fronts]),
    )
    page.section("Paired differences", page.grid([pairs_chart(report)]))
    page.section("Learning curves", page.grid([curves_chart(report, chart) for chart in report.curves]))
    _add_method(page, report)
    _add_provenance(page, report)
    body = "".join(page.parts)
    return document(title=report.question or report.study, body=body, charts=page.charts)


def _add_method(page: _Page, report: StudyReport) -> None:
    """Add how arms were made comparable, and how much the verdicts can see."""
    page.section(
        "Learning rates",
        page.grid([tuned_rates(report)]),
        _table(tuning_table(report)),
        _tuning_notes(report),
    )
    page.section("Power and noise", _list(noise_sentences(report)), _table(noise_table(report)))
    page.section("Uncertainty of the held-out text", _table(text_table(report)))
    matched = [item.text for item in report.matched if item.text]
    page.section("Quantities made equal", _table(matching_table(report)), _list(matched))
    page.section("Settings that differ", _settings(report))
    if report.comparisons:
        statistics = _table(statistics_table(report))
        page.section("Statistics", folded("standard errors, degrees of freedom, p values", statistics))


def _add_provenance(page: _Page, report: StudyReport) -> None:
    """Add caveats, and what it takes to repeat the study."""
    page.section("Changes since the study was fixed", _list(report.changes))
    page.section("Notes", _list([report.budget, *report.notes]))
    page.section("Environment", table(report.environment) if report.environment else "")
    commands = "\n".join(report.commands)
    page.section("Reproduce", f"<pre>{html.escape(commands)}</pre>" if commands else "")


def noise_sentences(report: StudyReport) -> list[str]:
    """Return sentences on the noise that verdicts were drawn from, and on what they can resolve."""
    noise = report.noise
    metric = in_words(report.metric)
    sentences = []
    if noise is not None and noise.deviation is not None:
        sentences.append(
            f"Runs of one arm vary between seeds with a standard deviation of {noise.deviation:.3g} {metric} "
            f"(pooled, {freedom_text(noise.degrees_of_freedom)})."
        )
        if noise.equality_p is not None:
            sentences.append(
                f"Test that all arms are equally noisy (Brown-Forsythe): p = {noise.equality_p:.2g}."
            )
    if noise is not None and noise.noisy:
        sentences.append(
            f"Noisier than the others, and judged by their own differences: {', '.join(noise.noisy)}."
        )
    if noise is not None and (others := [name for name in noise.apart if name not in noise.noisy]):
        sentences.append(
            f"Perhaps noisier than the others, and judged by their own differences: {', '.join(others)}."
        )
    # A study in progress has pairs of fewer seeds than it will have.
    num_seeds = max((len(item.seeds) for item in report.comparisons), default=0)
    if noise is not None and noise.smallest_resolved is not None:
        sentences.append(
            f"With {counted(num_seeds, 'seed')} and "
            f"{counted(len(report.comparisons), 'comparison')}, a difference of "
            f"{noise.smallest_resolved:.3g} is found 4 times in 5."
        )
    if report.smallest_effect is not None:
        sentences.append(_effect_sentence(report))
    sentences += [text for item in report.comparisons if (text := _open_sentence(item))]
    return [*sentences, *(noise.notes if noise is not None else ())]


def _effect_sentence(report: StudyReport) -> str:
    text = f"The smallest difference worth having was set to {report.smallest_effect:g}"
    if report.smallest_effect_power is not None:
        text += f", which is resolved {100 * report.smallest_effect_power:.0f} times in 100"
        if report.smallest_effect_seeds is not None:
            text += f", and 4 times in 5 with {counted(report.smallest_effect_seeds, 'seed')}"
    return f"{text}."


def _open_sentence(item: ComparisonReport) -> str:
    """Return why a comparison is not resolved, and what would resolve it; empty if it is."""
    parts = [f"not resolved, as {item.reason}"] if item.reason else []
    if item.seeds_needed is not None:
        seeds = counted(item.seeds_needed, "seed")
        parts.append(f"about {seeds} would resolve the difference, if it stays as it is")
    return f"{item.arm} against {item.against}: {'; '.join(parts)}." if parts else ""


def _settings(report: StudyReport) -> str:
    settings = settings_table(report)
    if settings is None:
        return ""
    first = table(settings.rows[:MOST_SETTINGS], head=settings.head)
    rest = settings.rows[MOST_SETTINGS:]
    return first + (folded(f"{len(rest)} more", table(rest, head=settings.head)) if rest else "")


def _tuning_notes(report: StudyReport) -> str:
    notes = [f"{item.arm}: {item.text}" for item in report.tuned if item.text]
    return _list([*notes, sensitivity_note(report)])


def _table(text_table: TextTable | None) -> str:
    return "" if text_table is None or not text_table.rows else table(text_table.rows, head=text_table.head)


def _list(texts: Sequence[str]) -> str:
    items = "".join(f"<li>{html.escape(text)}</li>" for text in texts if text)
    return f'<div class="box"><ul>{items}</ul></div>' if items else ""


def _paragraphs(texts: Sequence[str], *, kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return "".join(f"<p{attribute}>{html.escape(text)}</p>" for text in texts if text)
