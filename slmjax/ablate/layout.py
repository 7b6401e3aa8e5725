"""Findings as people and programs read them: tables for a terminal, Markdown for a log of questions, JSON.

Figures are rounded to what the noise allows: to the second digit of the standard error of the mean.
"""

import dataclasses
import math
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from slmjax.ablate.findings import Comparison, Findings, amount
from slmjax.ablate.statistics import Interval, PairedDifference, Summary
from slmjax.runlog import plain, write_json

ABSENT = "—"
SIGNIFICANT = 5  # digits of a figure whose noise is not known


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """A table of text, whatever it is then written as."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def findings_table(findings: Findings) -> Group:
    """The findings for a terminal: `Console().print(findings_table(findings))`."""
    shown: list[Table | Text] = []
    for grid in _grids(findings):
        table = Table(title=Text(grid.title), title_justify="left", title_style="bold")
        for i, name in enumerate(grid.head):
            table.add_column(Text(name), justify="left" if i == 0 else "right")
        for row in grid.rows:
            table.add_row(*map(Text, row))  # Text: the brackets of an interval are no markup
        shown.append(table)
    return Group(*shown, *(Text(line) for line in (budget_line(findings), *findings.notes)))


def findings_markdown(findings: Findings) -> str:
    """The findings as Markdown, as an entry of experiments/LOG.md has them."""
    parts = []
    for grid in _grids(findings):
        lines = [grid.head, ("---", *["---:"] * (len(grid.head) - 1)), *grid.rows]
        table = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
        parts.append(f"{grid.title}\n\n{table}")
    notes = "\n".join(f"- {line}" for line in (budget_line(findings), *findings.notes))
    return "\n\n".join([*parts, notes]) + "\n"


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


# Tables ---------------------------------------------------------------------------------------------------------------
def _grids(findings: Findings) -> list[Grid]:
    with_baseline = [one for one in findings.comparisons if one.against == findings.baseline]
    grids = [_arms_grid(findings, with_baseline)]
    if others := [one for one in findings.comparisons if one.against != findings.baseline]:
        rows = tuple((f"{one.arm} − {one.against}", str(len(one.seeds)), *_comparison_cells(one)) for one in others)
        grids.append(Grid(title="Further comparisons", head=("arms", "pairs", "difference", *_comparison_head(findings)), rows=rows))
    if findings.arms and findings.arms[0].figures:
        names = tuple(findings.arms[0].figures)
        head = ("arm", *(column for name in names for column in (_words(name), "difference")))
        about = f"difference to {findings.baseline} with its {100 * findings.confidence:g}% t interval"
        columns = [column for name in names for column in _figure_columns(findings, with_baseline, name)]
        rows = tuple(zip([one.arm for one in findings.arms], *columns, strict=True))
        grids.append(Grid(title=f"Further figures, without a verdict: mean ± standard deviation; {about}", head=head, rows=rows))
    return grids


def _arms_grid(findings: Findings, comparisons: list[Comparison]) -> Grid:
    by_arm = {one.arm: one for one in comparisons}
    rows = []
    for one, mean in zip(findings.arms, _with_deviation([one.metric for one in findings.arms]), strict=True):
        cells = ("baseline", *[""] * 4) if one.arm == findings.baseline else _comparison_cells(by_arm[one.arm])
        rows.append((one.arm, str(len(one.seeds)), mean, *cells))
    metric, way = _words(findings.metric), "lower" if findings.lower_is_better else "higher"
    title = f"{findings.study}: {metric}, {way} is better; mean ± standard deviation over seeds {_listed(findings.seeds)}"
    head = ("arm", "seeds", metric, f"difference to {findings.baseline}", *_comparison_head(findings))
    return Grid(title=title, head=head, rows=tuple(rows))


def _comparison_head(findings: Findings) -> tuple[str, ...]:
    share = f"{100 * findings.confidence:g}%"
    return f"{share} t interval", f"{share} bootstrap", "p (Holm)", "verdict"


def _comparison_cells(one: Comparison) -> tuple[str, ...]:
    if (found := one.difference) is None or one.adjusted_p is None:
        return ABSENT, ABSENT, ABSENT, ABSENT, one.verdict.value
    places = _places(found.standard_error, found.mean)
    p = "< 0.001" if one.adjusted_p < 0.001 else f"{one.adjusted_p:.3f}"
    intervals = [_interval(interval, places) if found.has_noise else ABSENT for interval in (found.t_interval, found.bootstrap_interval)]
    return _signed(found.mean, places), *intervals, p, one.verdict.value


def _figure_columns(findings: Findings, comparisons: list[Comparison], name: str) -> tuple[list[str], list[str]]:
    """A further figure of every arm, and its difference to the baseline."""
    differences = {one.arm: one.figures[name] for one in comparisons}
    return _with_deviation([one.figures[name] for one in findings.arms]), [
        _with_interval(differences.get(one.arm)) for one in findings.arms
    ]


# Numbers --------------------------------------------------------------------------------------------------------------
def _places(error: float | None, value: float) -> int:
    """Decimals that show the second digit of a standard error, or some digits of the value where there is none."""
    if error:
        return min(max(1 - math.floor(math.log10(error)), 0), 12)
    digits = SIGNIFICANT - 1 - math.floor(math.log10(abs(value))) if value else SIGNIFICANT - 1
    return min(max(digits, 0), 12)


def _with_deviation(column: list[Summary | None]) -> list[str]:
    """Means and standard deviations, all with the decimals that the quietest arm allows, so that they compare at a glance."""
    places = max((_places(one.standard_error, one.mean) for one in column if one is not None), default=0)
    return [ABSENT if one is None else f"{one.mean:,.{places}f}{_deviation(one, places)}" for one in column]


def _deviation(one: Summary, places: int) -> str:
    return "" if one.standard_deviation is None else f" ± {one.standard_deviation:,.{places}f}"


def _with_interval(one: PairedDifference | None) -> str:
    if one is None:
        return ""
    places = _places(one.standard_error, one.mean)
    return f"{_signed(one.mean, places)} {_interval(one.t_interval, places)}"


def _signed(value: float, places: int) -> str:
    text = f"{abs(value):,.{places}f}"
    return text if not float(text.replace(",", "")) else f"{'−' if value < 0 else '+'}{text}"


def _interval(interval: Interval, places: int) -> str:
    return f"[{', '.join(_signed(end, places) for end in interval)}]"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _listed(seeds: tuple[int, ...]) -> str:
    return ", ".join(map(str, seeds))
