"""Findings as people and programs read them: tables for a terminal, Markdown for a log of questions, JSON."""

import dataclasses
from pathlib import Path

from rich.console import Group

from slmjax.studies.findings import Comparison, Findings, amount
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
    with_interval,
)
from slmjax.telemetry.run_directory import plain, write_json


def findings_table(findings: Findings) -> Group:
    """The findings for a terminal: `Console().print(findings_table(findings))`."""
    return grids_table(_grids(findings), (budget_line(findings), *findings.notes))


def findings_markdown(findings: Findings) -> str:
    """The findings as Markdown, as an entry of experiments/LOG.md has them."""
    return grids_markdown(_grids(findings), (budget_line(findings), *findings.notes))


def findings_json(findings: Findings) -> dict:
    """The findings as JSON can hold them, unrounded."""
    return plain(dataclasses.asdict(findings))


def write_findings(findings: Findings, directory: str | Path) -> Path:
    """Writes study.json and study.md into the study's directory; returns the path of study.json."""
    (Path(directory) / "study.md").write_text(findings_markdown(findings), encoding="utf-8")
    return write_json(Path(directory) / "study.json", findings_json(findings))


def budget_line(findings: Findings) -> str:
    """One sentence on whether the arms had the same budget."""
    if findings.is_matched is None:
        return f"Budget: no two arms have finished a seed, so that their {findings.budget} cannot be compared yet."
    means = [one.budget.mean for one in findings.arms if one.budget is not None]
    if not findings.is_matched:
        return f"Budget: NOT matched, {amount(min(means))} to {amount(max(means))} {findings.budget} a run on average."
    return f"Budget: matched, {amount(sum(means) / len(means))} {findings.budget} a run on average."


# Tables -----------------------------------------------------------------------------------------------------
def _grids(findings: Findings) -> list[TextTable]:
    with_baseline = [one for one in findings.comparisons if one.against == findings.baseline]
    grids = [_arms_grid(findings, with_baseline)]
    if others := [one for one in findings.comparisons if one.against != findings.baseline]:
        rows = tuple(
            (f"{one.arm} − {one.against}", str(len(one.seeds)), *_comparison_cells(one)) for one in others
        )
        grids.append(
            TextTable(
                title="Further comparisons",
                head=("arms", "pairs", "difference", *_comparison_head(findings)),
                rows=rows,
            )
        )
    if findings.arms and findings.arms[0].figures:
        names = tuple(findings.arms[0].figures)
        head = ("arm", *(column for name in names for column in (in_words(name), "difference")))
        about = f"difference to {findings.baseline} with its {100 * findings.confidence:g}% t interval"
        columns = [column for name in names for column in _figure_columns(findings, with_baseline, name)]
        rows = tuple(zip([one.arm for one in findings.arms], *columns, strict=True))
        grids.append(
            TextTable(
                title=f"Further figures, without a verdict: mean ± standard deviation; {about}",
                head=head,
                rows=rows,
            )
        )
    return grids


def _arms_grid(findings: Findings, comparisons: list[Comparison]) -> TextTable:
    by_arm = {one.arm: one for one in comparisons}
    rows = []
    for one, mean in zip(findings.arms, with_deviation([one.metric for one in findings.arms]), strict=True):
        cells = (
            ("baseline", *[""] * 4) if one.arm == findings.baseline else _comparison_cells(by_arm[one.arm])
        )
        rows.append((one.arm, str(len(one.seeds)), mean, *cells))
    metric = in_words(findings.metric)
    way = "lower" if findings.lower_is_better else "higher"
    title = f"{findings.study}: {metric}, {way} is better; mean ± standard deviation over seeds {listed(findings.seeds)}"
    head = ("arm", "seeds", metric, f"difference to {findings.baseline}", *_comparison_head(findings))
    return TextTable(title=title, head=head, rows=tuple(rows))


def _comparison_head(findings: Findings) -> tuple[str, ...]:
    share = f"{100 * findings.confidence:g}%"
    return f"{share} t interval", f"{share} bootstrap", "p (Holm)", "verdict"


def _comparison_cells(one: Comparison) -> tuple[str, ...]:
    if (found := one.difference) is None or one.adjusted_p is None:
        return ABSENT, ABSENT, ABSENT, ABSENT, one.verdict.value
    places = num_places(found.standard_error, found.mean)
    p = "< 0.001" if one.adjusted_p < 0.001 else f"{one.adjusted_p:.3f}"
    intervals = [
        interval_text(interval, places) if found.has_noise else ABSENT
        for interval in (found.t_interval, found.bootstrap_interval)
    ]
    return signed(found.mean, places), *intervals, p, one.verdict.value


def _figure_columns(
    findings: Findings, comparisons: list[Comparison], name: str
) -> tuple[list[str], list[str]]:
    """A further figure of every arm, and its difference to the baseline."""
    differences = {one.arm: one.figures[name] for one in comparisons}
    return with_deviation([one.figures[name] for one in findings.arms]), [
        with_interval(differences.get(one.arm)) for one in findings.arms
    ]
