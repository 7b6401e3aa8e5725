"""Tables of text for a terminal and Markdown, and the formatting of their numbers.

Means are rounded to the second digit of their standard error.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from slmjax.studies.statistics.samples import Interval, PairedDifference, Summary
from slmjax.telemetry.columns import print_columns

ABSENT = "—"
SIGNIFICANT = 5  # digits of a value without a standard error


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTable:
    """A table of text, independent of the output format."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def console_tables(text_tables: Sequence[TextTable], notes: Sequence[str]) -> Group:
    """Return tables and notes for a terminal."""
    shown: list[Table | Text] = []
    for text_table in text_tables:
        table = Table(title=Text(text_table.title), title_justify="left", title_style="bold")
        for i, name in enumerate(text_table.head):
            table.add_column(Text(name), justify="left" if i == 0 else "right")
        for row in text_table.rows:
            table.add_row(*map(Text, row))  # Text, since the brackets of an interval are not markup
        shown.append(table)
    return Group(*shown, *map(Text, notes))


def print_tables(text_tables: Sequence[TextTable], notes: Sequence[str]) -> None:
    """Print tables and notes, complete in a pipe and on a terminal of any width."""
    for text_table in text_tables:
        columns = range(1, len(text_table.head))
        print_columns(text_table.head, text_table.rows, right=columns, title=text_table.title)
        print()
    print("\n".join(notes))


def markdown_tables(text_tables: Sequence[TextTable], notes: Sequence[str]) -> str:
    """Return tables and notes as Markdown."""
    parts = []
    for text_table in text_tables:
        lines = [text_table.head, ("---", *["---:"] * (len(text_table.head) - 1)), *text_table.rows]
        table = "\n".join(
            # A bar in a name would end its cell; chr(92) is a backslash, which older Pythons refuse in an
            # f-string.
            f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |"
            for line in lines
        )
        parts.append(f"{text_table.title}\n\n{table}")
    return "\n\n".join([*parts, *(["\n".join(f"- {line}" for line in notes)] if notes else [])]) + "\n"


# Numbers ----------------------------------------------------------------------------------------------------
def num_decimals(error: float | None, value: float) -> int:
    """Return the decimals to show: up to the second digit of the standard error, or 5 digits of the value."""
    # More digits would be noise, and fewer would hide differences of about one standard error.
    if error:
        # At most 12: digits beyond these are rounding errors of float64 sums.
        return min(max(1 - math.floor(math.log10(error)), 0), 12)
    digits = SIGNIFICANT - 1 - math.floor(math.log10(abs(value))) if value else SIGNIFICANT - 1
    return min(max(digits, 0), 12)


def with_deviation(column: list[Summary | None]) -> list[str]:
    """Format means and standard deviations, all with the decimals of the arm with the least noise."""
    # One number of decimals for a column, so that its values can be compared at a glance.
    decimals = max(
        (num_decimals(summary.standard_error, summary.mean) for summary in column if summary is not None),
        default=0,
    )
    return [
        ABSENT if summary is None else f"{summary.mean:,.{decimals}f}{_deviation(summary, decimals)}"
        for summary in column
    ]


def _deviation(summary: Summary, decimals: int) -> str:
    return "" if summary.standard_deviation is None else f" ± {summary.standard_deviation:,.{decimals}f}"


def with_interval(summary: PairedDifference | None) -> str:
    """Format the mean and its t interval; empty for None."""
    if summary is None:
        return ""
    decimals = num_decimals(summary.standard_error, summary.mean)
    return f"{signed(summary.mean, decimals)} {interval_text(summary.t_interval, decimals)}"


def signed(value: float, decimals: int) -> str:
    """Format a number with its sign, unless it is rounded to zero."""
    text = f"{abs(value):,.{decimals}f}"
    # "−0.00" would suggest a direction that the digits do not show.
    return text if not float(text.replace(",", "")) else f"{'−' if value < 0 else '+'}{text}"


def interval_text(interval: Interval, decimals: int) -> str:
    """Format both ends of an interval."""
    return f"[{', '.join(signed(end, decimals) for end in interval)}]"


def in_words(name: str) -> str:
    """Return a metric's name without underscores."""
    return name.replace("_", " ")


def listed(seeds: Sequence[int]) -> str:
    """Join seeds with commas."""
    return ", ".join(map(str, seeds))


# JSON -------------------------------------------------------------------------------------------------------
def with_renamed_keys(value: Any, names: Mapping[str, str]) -> Any:
    """Rename the keys of nested dicts and lists: JSON files keep their keys when fields are renamed."""
    if isinstance(value, dict):
        return {names.get(key, key): with_renamed_keys(item, names) for key, item in value.items()}
    return [with_renamed_keys(item, names) for item in value] if isinstance(value, list) else value
