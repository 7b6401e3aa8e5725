"""Findings as tables for a terminal, as Markdown for a log, and as JSON."""

from typing import Any

from rich.console import Group

from slmjax.config import to_json
from slmjax.studies.caveats import format_count
from slmjax.studies.findings import Comparison, Findings
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
)


def findings_table(findings: Findings) -> Group:
    """Return the findings for a console of rich; `print_findings` prints them at any width."""
    return console_tables(_text_tables(findings), _lines(findings))


def print_findings(findings: Findings) -> None:
    """Print the findings to standard output, complete in a pipe and on a terminal of any width."""
    print_tables(_text_tables(findings), _lines(findings))


def findings_markdown(findings: Findings) -> str:
    """Return the findings as Markdown, for an entry of experiments/LOG.md."""
    return markdown_tables(_text_tables(findings), _lines(findings))


def findings_json(findings: Findings) -> dict[str, Any]:
    """Return the findings as in findings.json, unrounded."""
    return to_json(findings)


def _lines(findings: Findings) -> list[str]:
    """Return the lines below the tables."""
    return [line for line in (budget_line(findings), *findings.notes) if line]


def budget_line(findings: Findings) -> str:
    """Return a sentence on whether the arms had the same budget; empty if none is compared."""
    if findings.budget is None:
        return ""
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
                "0" if comparison.judgement is None else str(len(comparison.judgement.seeds)),
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
        about = f"difference to {findings.baseline} with its {100 * findings.rules.confidence:g}% t interval"
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
    way = "lower" if findings.rules.lower_is_better else "higher"
    title = (
        f"{findings.study}: {metric}, {way} is better; mean ± standard deviation over seeds "
        f"{listed(findings.seeds)}"
    )
    head = ("arm", "seeds", metric, f"difference to {findings.baseline}", *_comparison_head(findings))
    return TextTable(title=title, head=head, rows=tuple(rows))


def _comparison_head(findings: Findings) -> tuple[str, ...]:
    confidence = f"{100 * findings.rules.confidence:g}%"
    return f"{confidence} t interval", f"{confidence} bootstrap", "p (Holm)", "verdict"


def _comparison_cells(comparison: Comparison) -> tuple[str, ...]:
    verdict = comparison.verdict.value
    if (judgement := comparison.judgement) is None:
        return ABSENT, ABSENT, ABSENT, ABSENT, verdict
    # No more decimals than the noise of this comparison allows.
    decimals = num_decimals(judgement.standard_error, judgement.difference)
    # The t test of a few seeds does not support more digits.
    p = "< 0.001" if judgement.adjusted_p < 0.001 else f"{judgement.adjusted_p:.3f}"
    # Without noise, intervals have no width, and would look exact.
    intervals = [
        interval_text(interval, decimals) if judgement.standard_error else ABSENT
        for interval in (judgement.interval, judgement.bootstrap_interval)
    ]
    return signed(judgement.difference, decimals), *intervals, p, verdict


def _further_columns(
    findings: Findings, comparisons: list[Comparison], name: str
) -> tuple[list[str], list[str]]:
    """Return the columns of a further metric: each arm's value, and its difference to the baseline."""
    differences = {comparison.arm: comparison.further_metrics[name] for comparison in comparisons}
    return with_deviation([summary.further_metrics[name] for summary in findings.arms]), [
        with_interval(differences.get(summary.arm)) for summary in findings.arms
    ]
