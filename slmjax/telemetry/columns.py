"""Tables as columns of text, complete at any width: no cell is cut or folded.

    print_columns(("run", "loss"), [("a", "1.25"), ("b", "0.5")], right=(1,))

In a pipe or a file the columns are as wide as their cells. On a terminal that is too narrow for this, the
first cell of a row has a line of its own, above the others; where these do not fit either, every cell has.
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
    below = _aligned([row[1:] for row in table], {index - 1 for index in right})
    if _fits([GAP + line for line in below], width):
        # A heading without text needs no line.
        pairs = zip(table, below, strict=True)
        return [line for row, rest in pairs for line in (row[0], GAP + rest) if line.strip()]
    labels = [row[0] for row in table[1:]]
    items = [_items(table[0][1:], row[1:]) for row in table[1:]]
    return [line for label, lines in zip(labels, items, strict=True) for line in (label, *lines)]


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


def _items(names: Sequence[str], cells: Sequence[str]) -> list[str]:
    """Return the cells of a row with the names of their columns, one in a line, without empty cells."""
    pairs = zip(names, cells, strict=True)
    return [f"{GAP}{name}: {cell}" if name else f"{GAP}{cell}" for name, cell in pairs if cell]
