"""Tables as columns of text, complete at any width: no cell is cut or folded.

    print_columns(("run", "loss"), [("a", "1.25"), ("b", "0.5")], right=(1,))

In a pipe or a file the columns are as wide as their cells. On a terminal that is too narrow for this, a few
rows with long cells have a line for each cell, or the first cell of every row has a line of its own, above
one or two lines of the others. Where that does not fit either, every cell has a line.
"""

import shutil
import sys
from collections.abc import Collection, Sequence

from rich.cells import cell_len

GAP = "  "  # between columns, and before the cells below the first one


def print_columns(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Collection[int] = (),
    title: str = "",
) -> None:
    """Print a table to standard output; nothing if it has no rows.

    Args:
      head: names of the columns.
      rows: cells, as many in each row as there are names.
      right: indices of the columns that are aligned to the right.
      title: a line above the table.
    """
    if rows:
        lines = column_lines(head, rows, right=right, width=output_width())
        print("\n".join([*([printable(title)] if title else []), *lines]))


def output_width() -> int | None:
    """Return the columns of the terminal of standard output; None for a pipe or a file, without a limit."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    return shutil.get_terminal_size().columns if is_terminal else None


def column_lines(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Collection[int] = (),
    width: int | None = None,
) -> list[str]:
    """Return the lines of a table.

    Args:
      head: names of the columns.
      rows: cells, as many in each row as there are names.
      right: indices of the columns that are aligned to the right.
      width: most columns of a line, if that is possible at all; None for no limit.
    """
    table = [[printable(cell) for cell in row] for row in (head, *rows)]
    lines = _aligned(table, right)
    if _fits(lines, width):
        return lines
    assert width is not None
    return (
        _with_long_rows(table, right, width)
        or _below_first_cell(table, right, width)
        or [line for row in table[1:] for line in _items(table[0], row)]
    )


def _with_long_rows(table: Sequence[Sequence[str]], right: Collection[int], width: int) -> list[str] | None:
    """Return lines in which rows with long cells, at most a third of all, have a line for each cell."""
    by_length = sorted(
        range(1, len(table)), key=lambda index: max(map(cell_len, table[index][1:]), default=0)
    )
    least = -(-2 * len(by_length) // 3)
    for num_short in range(len(by_length) - 1, least - 1, -1):
        short = [0, *sorted(by_length[:num_short])]
        aligned = _aligned([table[index] for index in short], right)
        if num_short and _fits(aligned, width):
            lines = dict(zip(short, aligned, strict=True))
            return [
                line
                for index, row in enumerate(table)
                for line in ([lines[index]] if index in lines else _items(table[0], row))
            ]
    return None


MOST_COLUMNS = 5  # that are not divided into two lines


def _below_first_cell(table: Sequence[Sequence[str]], right: Collection[int], width: int) -> list[str] | None:
    """Return lines in which the first cell of a row stands above one or two lines of the others."""
    inner = [row[1:] for row in table]
    num_columns = len(inner[0])
    least = num_columns if num_columns <= MOST_COLUMNS else num_columns // 2
    for split in range(num_columns, least - 1, -1):
        first = _aligned([row[:split] for row in inner], {index - 1 for index in right})
        second = _aligned([row[split:] for row in inner], {index - 1 - split for index in right})
        if _fits([GAP + line for line in (*first, *second)], width):
            rows = zip(table, first, second, strict=True)
            # A heading without text needs no line, and neither does an empty second half.
            below = [[row[0], *(GAP + line for line in lines)] for row, *lines in rows]
            return [line.rstrip() for lines in below for line in lines if line.strip()]
    return None


def printable(text: str) -> str:
    """Return text for a terminal: control and invalid characters, as names of files have, are escaped."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def _aligned(table: Sequence[Sequence[str]], right: Collection[int]) -> list[str]:
    widths = [max(map(cell_len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = []
        for index, cell in enumerate(row):
            space = " " * (widths[index] - cell_len(cell))
            cells.append(space + cell if index in right else cell + space)
        lines.append(GAP.join(cells).rstrip())
    return lines


def _fits(lines: Sequence[str], width: int | None) -> bool:
    return width is None or all(cell_len(line) <= width for line in lines)


def _items(names: Sequence[str], row: Sequence[str]) -> list[str]:
    """Return the cells of a row with the names of their columns, one in a line, without empty cells."""
    cells = [pair for pair in zip(names[1:], row[1:], strict=True) if pair[1]]
    return [row[0], *(f"{GAP}{name}: {cell}" if name else f"{GAP}{cell}" for name, cell in cells)]
