"""Tables of results for the tests of statistics."""

from collections.abc import Sequence

import numpy as np

from slmjax.studies.statistics.results_table import Table

ARMS = "abcdefghi"


def table(
    values: Sequence[Sequence[float]] | np.ndarray, *, diverged: Sequence[tuple[int, int]] = ()
) -> Table:
    """A table of arms a, b, c, ... by seeds 0, 1, 2, ...; cells that diverged have no value."""
    array = np.array(values, dtype=np.float64)
    flags = np.zeros(array.shape, bool)
    for cell in diverged:
        array[cell] = np.nan
        flags[cell] = True
    return Table(
        arms=tuple(ARMS[: len(array)]), seeds=tuple(range(array.shape[1])), values=array, diverged=flags
    )


def against_first(num_arms: int) -> list[tuple[str, str]]:
    """Each other arm and the first one."""
    return [(arm, ARMS[0]) for arm in ARMS[1:num_arms]]
