"""Which of several measured figures is kept: a figure that is not finite never is.

    is_better(2.5, 3.0)                                    # True
    is_better(math.nan, 3.0), is_better(3.0, math.nan)     # False, True
    best_of({20: math.nan, 40: 2.5, 60: 2.7})              # 40

Comparisons with NaN are false, and `min`, `max` and `sorted` keep or skip it by its place: where a comparison
decides what is kept (the best checkpoint, the best of several settings), it is made here.
"""

import math
from collections.abc import Mapping
from typing import TypeVar

Key = TypeVar("Key")


def is_better(figure: float, best: float | None, *, lower_is_better: bool = True) -> bool:
    """Return whether a figure takes the place of the best so far (None: there is none yet). Equal figures do
    not.
    """
    if not math.isfinite(figure):
        return False
    if best is None or not math.isfinite(best):
        return True
    return figure < best if lower_is_better else figure > best


def best_of(figures: Mapping[Key, float], *, lower_is_better: bool = True) -> Key | None:
    """Return the key of the best figure, of equal ones the first; None if no figure is finite."""
    found: Key | None = None
    for key, figure in figures.items():
        if is_better(figure, None if found is None else figures[found], lower_is_better=lower_is_better):
            found = key
    return found
