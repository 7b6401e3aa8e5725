"""Findings as tables for a terminal, as Markdown for a log, and as JSON."""

from typing import Any

from rich.console import Group

from slmjax.config import to_json
from slmjax.studies.caveats import counted, format_count
from slmjax.studies.findings import ArmSummary, Comparison, Findings
from slmjax.studies.statistics.ladders import ladder_lines
from slmjax.studies.statistics.verdicts import Verdict
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
    lines = (*verdict_lines(findings), noise_line(findings), look_line(findings), budget_line(findings))
    ladder = () if findings.ladder is None else ladder_lines(findings.ladder)
    return [line for line in (*lines, *ladder, *findings.notes) if line]


def budget_line(findings: Findings) -> str:
    """Return a sentence on whether the arms had the same budget; empty if none is compared."""
    if findings.budget is None:
        return ""
    if findings.is_matched is None:
        return f"Budget: no two arms have finished a seed, so their {findings.budget} cannot be compared yet."
    # Derived arms may have no budget of their own.
    means = [arm.budget.mean for arm in findings.arms if arm.budget is not None]
    # The field is that of the last step, and its value counts them.
    unit = "steps" if findings.budget == "step" else findings.budget
    if not findings.is_matched:
        low, high = (format_count(mean) for mean in (min(means), max(means)))
        return f"Budget: NOT matched, {low} to {high} {unit} per run on average."
    return f"Budget: matched, {format_count(sum(means) / len(means))} {unit} per run on average."


# Tables -----------------------------------------------------------------------------------------------------
def _text_tables(findings: Findings) -> list[TextTable]:
    tables = [_verdicts_table(findings)] if findings.comparisons else []
    tables.append(_arms_table(findings))
    # Every arm has the same further metrics, some of them None.
    if findings.arms and findings.arms[0].further_metrics:
        tables.append(_further_table(findings))
    if findings.text:
        tables.append(_text_table(findings))
    return tables


def _verdicts_table(findings: Findings) -> TextTable:
    has_margin = findings.rules.equal_within is not None
    rows = tuple(
        (_comparison_name(findings, comparison), *_comparison_cells(comparison, has_margin=has_margin))
        for comparison in findings.comparisons
    )
    # Of a closed test both values are adjusted together, and neither is that of Holm.
    correction = findings.correction.value
    heads = (f"p ({correction})", *([f"p of equality ({correction})"] if has_margin else []))
    way = "lower" if findings.rules.lower_is_better else "higher"
    return TextTable(
        title=f"{findings.study}: {in_words(findings.metric)}, {way} is better; minus {findings.baseline}",
        head=("arm", "difference", f"{_confidence(findings)} interval", *heads, "verdict"),
        rows=rows,
    )


def _comparison_name(findings: Findings, comparison: Comparison) -> str:
    # Differences of further pairs are not to the baseline.
    is_usual = comparison.against == findings.baseline
    return comparison.arm if is_usual else f"{comparison.arm} − {comparison.against}"


def _confidence(findings: Findings) -> str:
    return f"{100 * findings.rules.confidence:g}%"


def _comparison_cells(comparison: Comparison, *, has_margin: bool) -> tuple[str, ...]:
    verdict = comparison.verdict.value
    if (judgement := comparison.judgement) is None:
        return ABSENT, ABSENT, ABSENT, *([ABSENT] if has_margin else []), verdict
    # No more decimals than the noise of this comparison allows.
    decimals = num_decimals(judgement.standard_error, judgement.difference)
    p_values = [judgement.adjusted_p]
    if has_margin:
        p_values.append(1.0 if judgement.adjusted_equal_p is None else judgement.adjusted_equal_p)
    # The t test of a few seeds does not support more digits.
    shown = ["< 0.001" if p < 0.001 else f"{p:.3f}" for p in p_values]
    # Without noise, the interval has no width, and would look exact.
    interval = interval_text(judgement.interval, decimals) if judgement.standard_error else ABSENT
    return signed(judgement.difference, decimals), interval, *shown, verdict


def _arms_table(findings: Findings) -> TextTable:
    metric = in_words(findings.metric)
    columns = {
        "seeds": [str(len(arm.seeds)) for arm in findings.arms],
        f"{metric} ± deviation": with_deviation([arm.metric for arm in findings.arms]),
        f"{_confidence(findings)} interval": [_mean_interval(arm) for arm in findings.arms],
    }
    if any(arm.diverged for arm in findings.arms):
        columns["diverged"] = [_divergence_text(arm) for arm in findings.arms]
    rows = tuple((arm.arm, *cells) for arm, *cells in zip(findings.arms, *columns.values(), strict=True))
    return TextTable(title=f"Arms over seeds {listed(findings.seeds)}", head=("arm", *columns), rows=rows)


def _mean_interval(arm: ArmSummary) -> str:
    if arm.metric is None or arm.interval is None or not arm.metric.standard_error:
        return ABSENT
    decimals = num_decimals(arm.metric.standard_error, arm.metric.mean)
    return f"[{', '.join(f'{end:,.{decimals}f}' for end in arm.interval)}]"


def _divergence_text(arm: ArmSummary) -> str:
    """Return the share of diverged runs with its interval."""
    if arm.divergence is None:
        return ABSENT
    low, high = (f"{100 * end:.0f}" for end in arm.divergence.interval)
    return f"{arm.divergence.num_diverged} of {arm.divergence.num_runs} [{low}%, {high}%]"


def _further_table(findings: Findings) -> TextTable:
    by_arm = {
        comparison.arm: comparison
        for comparison in findings.comparisons
        if comparison.against == findings.baseline
    }
    names = tuple(findings.arms[0].further_metrics)
    columns = []
    for name in names:
        columns.append(with_deviation([arm.further_metrics[name] for arm in findings.arms]))
        compared = [by_arm.get(arm.arm) for arm in findings.arms]
        columns.append(
            [with_interval(None if item is None else item.further_metrics[name]) for item in compared]
        )
    return TextTable(
        title=f"Further metrics, without a verdict; difference to {findings.baseline} with its "
        f"{_confidence(findings)} interval",
        head=("arm", *(column for name in names for column in (in_words(name), "difference"))),
        rows=tuple((arm.arm, *cells) for arm, *cells in zip(findings.arms, *columns, strict=True)),
    )


def _text_table(findings: Findings) -> TextTable:
    rows = []
    for item in findings.text:
        sources = item.sources
        # Both with the decimals of the smaller one, so that they compare at a glance.
        errors = [error for error in (sources.seed_error, sources.text_error) if error]
        decimals = num_decimals(min(errors, default=None), sources.difference)
        rows.append(
            (
                item.arm if item.against == findings.baseline else f"{item.arm} − {item.against}",
                f"{sources.seed_error:.{decimals}f}",
                f"{sources.text_error:.{decimals}f}",
                f"{item.num_documents:,}",
                sources.advice.value,
            )
        )
    return TextTable(
        title="Standard error of the difference by source",
        head=("arm", "by seeds", "by held-out text", "documents", "worth buying"),
        rows=tuple(rows),
    )


# Sentences --------------------------------------------------------------------------------------------------
def verdict_lines(findings: Findings) -> list[str]:
    """Return sentences on what is equal, and on what it takes to resolve the rest."""
    lines = []
    margin = findings.rules.equal_within
    equal = [item for item in findings.comparisons if item.verdict is Verdict.EQUAL]
    if equal:
        names = ", ".join(_comparison_name(findings, item) for item in equal)
        lines.append(f"Equal within {margin:g}: {names}.")
    needed = [
        f"{_comparison_name(findings, item)} (about {item.judgement.seeds_needed:,})"
        for item in findings.comparisons
        if item.judgement is not None and item.judgement.seeds_needed is not None
    ]
    if needed:
        lines.append(f"Seeds that would resolve it, if the difference stays as it is: {', '.join(needed)}.")
    return lines


def noise_line(findings: Findings) -> str:
    """Return a sentence on the noise and on the difference that these seeds resolve; empty if not known."""
    noise = findings.noise
    if not noise.deviation:
        return ""
    text = (
        f"Noise between seeds: standard deviation {noise.deviation:.3g} of a run "
        f"({counted(noise.degrees_of_freedom, 'degree of freedom')})."
    )
    if findings.smallest_resolved is None:
        return text
    return f"{text} These seeds resolve a difference of {findings.smallest_resolved:.2g} 4 times in 5."


def look_line(findings: Findings) -> str:
    """Return a sentence on the look that counts; empty without fixed looks."""
    if findings.look is None:
        return ""
    planned = listed(findings.rules.looks)
    if not findings.look:
        return f"No look yet: the first is at {findings.rules.looks[0]} seeds of every arm ({planned})."
    return f"Look at {findings.look} seeds of those planned ({planned}), at level {findings.level:.3g}."
