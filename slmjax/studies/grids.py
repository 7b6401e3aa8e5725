"""Tables of text for a terminal and in Markdown, and the figures in them.

Figures are rounded to what the noise allows: to the second digit of the standard error of the mean.
"""

import dataclasses
import math
from collections.abc import Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from slmjax.studies.statistics import Interval, PairedDifference, Summary

ABSENT = "—"
SIGNIFICANT = 5  # digits of a figure whose noise is not known


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTable:
    """A table of text, whatever it is then written as."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def grids_table(grids: Sequence[TextTable], notes: Sequence[str]) -> Group:
    """Tables and what is to be said beside them, for a terminal."""
    shown: list[Table | Text] = []
    for grid in grids:
        table = Table(title=Text(grid.title), title_justify="left", title_style="bold")
        for i, name in enumerate(grid.head):
            table.add_column(Text(name), justify="left" if i == 0 else "right")
        for row in grid.rows:
            table.add_row(*map(Text, row))  # Text: the brackets of an interval are no markup
        shown.append(table)
    return Group(*shown, *map(Text, notes))


def grids_markdown(grids: Sequence[TextTable], notes: Sequence[str]) -> str:
    """The same as Markdown."""
    parts = []
    for grid in grids:
        lines = [grid.head, ("---", *["---:"] * (len(grid.head) - 1)), *grid.rows]
        table = "\n".join(
            f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
        )
        parts.append(f"{grid.title}\n\n{table}")
    return "\n\n".join([*parts, *(["\n".join(f"- {line}" for line in notes)] if notes else [])]) + "\n"


# Numbers ----------------------------------------------------------------------------------------------------
def num_places(error: float | None, value: float) -> int:
    """Decimals that show the second digit of a standard error, or some digits of the value where there is
    none.
    """
    if error:
        return min(max(1 - math.floor(math.log10(error)), 0), 12)
    digits = SIGNIFICANT - 1 - math.floor(math.log10(abs(value))) if value else SIGNIFICANT - 1
    return min(max(digits, 0), 12)


def with_deviation(column: list[Summary | None]) -> list[str]:
    """Means and standard deviations, all with the decimals that the quietest arm allows, so that they compare
    at a glance.
    """
    places = max((num_places(one.standard_error, one.mean) for one in column if one is not None), default=0)
    return [ABSENT if one is None else f"{one.mean:,.{places}f}{_deviation(one, places)}" for one in column]


def _deviation(one: Summary, places: int) -> str:
    return "" if one.standard_deviation is None else f" ± {one.standard_deviation:,.{places}f}"


def with_interval(one: PairedDifference | None) -> str:
    """The mean and its t interval; nothing where there is none."""
    if one is None:
        return ""
    places = num_places(one.standard_error, one.mean)
    return f"{signed(one.mean, places)} {interval_text(one.t_interval, places)}"


def signed(value: float, places: int) -> str:
    """With its sign, unless it is rounded to zero."""
    text = f"{abs(value):,.{places}f}"
    return text if not float(text.replace(",", "")) else f"{'−' if value < 0 else '+'}{text}"


def interval_text(interval: Interval, places: int) -> str:
    """Both ends."""
    return f"[{', '.join(signed(end, places) for end in interval)}]"


def in_words(name: str) -> str:
    """A figure's name without underscores."""
    return name.replace("_", " ")


def listed(seeds: Sequence[int]) -> str:
    """Numbers with commas between."""
    return ", ".join(map(str, seeds))
