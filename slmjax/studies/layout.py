"""Findings as tables for a terminal, as Markdown for a log, and as JSON."""

import dataclasses
from pathlib import Path

from rich.console import Group

from slmjax.atomic_files import write_text
from slmjax.studies.findings import Comparison, Findings, format_count
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
    with_interval,
    with_renamed_keys,
)
from slmjax.telemetry.run_directory import plain, write_json


def findings_table(findings: Findings) -> Group:
    """Return the findings for a console of rich; `print_findings` prints them at any width."""
    return console_tables(_text_tables(findings), (budget_line(findings), *findings.notes))


def print_findings(findings: Findings) -> None:
    """Print the findings to standard output, complete in a pipe and on a terminal of any width."""
    print_tables(_text_tables(findings), (budget_line(findings), *findings.notes))


def findings_markdown(findings: Findings) -> str:
    """Return the findings as Markdown, for an entry of experiments/LOG.md."""
    return markdown_tables(_text_tables(findings), (budget_line(findings), *findings.notes))


def findings_json(findings: Findings) -> dict:
    """Return the findings for JSON, unrounded."""
    # The key of further metrics in files is older than the field's name.
    return with_renamed_keys(plain(dataclasses.asdict(findings)), {"further_metrics": "figures"})


def write_findings(findings: Findings, directory: str | Path) -> Path:
    """Write study.json and study.md to the study's directory; returns the path of study.json."""
    # For people: study.json has the same, unrounded, for programs.
    write_text(Path(directory) / "study.md", findings_markdown(findings))
    return write_json(Path(directory) / "study.json", findings_json(findings))


def budget_line(findings: Findings) -> str:
    """Return a sentence on whether the arms had the same budget."""
    if findings.is_matched is None:
        return f"Budget: no two arms have finished a seed, so their {findings.budget} cannot be compared yet."
    # Derived arms may have no budget of their own.
    means = [arm.budget.mean for arm in findings.arms if arm.budget is not None]
    if not findings.is_matched:
        low, high = (format_count(mean) for mean in (min(means), max(means)))
        return f"Budget: NOT matched, {low} to {high} {findings.budget} per run on average."
    return f"Budget: matched, {format_count(sum(means) / len(means))} {findings.budget} per run on average."


# Tables -----------------------------------------------------------------------------------------------------
def _text_tables(findings: Findings) -> list[TextTable]:
    with_baseline = [
        comparison for comparison in findings.comparisons if comparison.against == findings.baseline
    ]
    text_tables = [_arms_table(findings, with_baseline)]
    # Further pairs have a table of their own: their differences are not to the baseline.
    if others := [
        comparison for comparison in findings.comparisons if comparison.against != findings.baseline
    ]:
        rows = tuple(
            (
                f"{comparison.arm} − {comparison.against}",
                str(len(comparison.seeds)),
                *_comparison_cells(comparison),
            )
            for comparison in others
        )
        text_tables.append(
            TextTable(
                title="Further comparisons",
                head=("arms", "pairs", "difference", *_comparison_head(findings)),
                rows=rows,
            )
        )
    # Every arm has the same further metrics, some of them None.
    if findings.arms and findings.arms[0].further_metrics:
        names = tuple(findings.arms[0].further_metrics)
        head = ("arm", *(column for name in names for column in (in_words(name), "difference")))
        about = f"difference to {findings.baseline} with its {100 * findings.confidence:g}% t interval"
        columns = [column for name in names for column in _further_columns(findings, with_baseline, name)]
        rows = tuple(zip([summary.arm for summary in findings.arms], *columns, strict=True))
        text_tables.append(
            TextTable(
                title=f"Further metrics, without a verdict: mean ± standard deviation; {about}",
                head=head,
                rows=rows,
            )
        )
    return text_tables


def _arms_table(findings: Findings, comparisons: list[Comparison]) -> TextTable:
    by_arm = {comparison.arm: comparison for comparison in comparisons}
    rows = []
    means = with_deviation([summary.metric for summary in findings.arms])
    for summary, mean in zip(findings.arms, means, strict=True):
        cells = (
            ("baseline", *[""] * 4)
            if summary.arm == findings.baseline
            else _comparison_cells(by_arm[summary.arm])
        )
        rows.append((summary.arm, str(len(summary.seeds)), mean, *cells))
    metric = in_words(findings.metric)
    way = "lower" if findings.lower_is_better else "higher"
    title = (
        f"{findings.study}: {metric}, {way} is better; mean ± standard deviation over seeds "
        f"{listed(findings.seeds)}"
    )
    head = ("arm", "seeds", metric, f"difference to {findings.baseline}", *_comparison_head(findings))
    return TextTable(title=title, head=head, rows=tuple(rows))


def _comparison_head(findings: Findings) -> tuple[str, ...]:
    confidence = f"{100 * findings.confidence:g}%"
    return f"{confidence} t interval", f"{confidence} bootstrap", "p (Holm)", "verdict"


def _comparison_cells(comparison: Comparison) -> tuple[str, ...]:
    verdict = comparison.verdict.value
    if (difference := comparison.difference) is None or comparison.adjusted_p is None:
        return ABSENT, ABSENT, ABSENT, ABSENT, verdict
    # No more decimals than the noise of this comparison allows.
    decimals = num_decimals(difference.standard_error, difference.mean)
    # The t test of a few seeds does not support more digits.
    p = "< 0.001" if comparison.adjusted_p < 0.001 else f"{comparison.adjusted_p:.3f}"
    # Without noise, intervals have no width, and would look exact.
    intervals = [
        interval_text(interval, decimals) if difference.has_noise else ABSENT
        for interval in (difference.t_interval, difference.bootstrap_interval)
    ]
    return signed(difference.mean, decimals), *intervals, p, verdict


def _further_columns(
    findings: Findings, comparisons: list[Comparison], name: str
) -> tuple[list[str], list[str]]:
    """Return the columns of a further metric: each arm's value, and its difference to the baseline."""
    differences = {comparison.arm: comparison.further_metrics[name] for comparison in comparisons}
    return with_deviation([summary.further_metrics[name] for summary in findings.arms]), [
        with_interval(differences.get(summary.arm)) for summary in findings.arms
    ]
