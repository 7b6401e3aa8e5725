"""Selection of the best of several measured values; values that are not finite are never selected.

    is_better(2.5, 3.0)                                    # True
    is_better(math.nan, 3.0), is_better(3.0, math.nan)     # False, True
    best_of({20: math.nan, 40: 2.5, 60: 2.7})              # 40

Comparisons with NaN are false, so `min`, `max` and `sorted` select or skip it depending on its position. All
code that selects the best checkpoint or the best of several settings therefore uses these functions.
"""

import math
from collections.abc import Mapping
from typing import TypeVar

Key = TypeVar("Key")


def is_better(value: float, best: float | None, *, lower_is_better: bool = True) -> bool:
    """Return whether a value is better than the best so far (None: none yet). Equal is not better."""
    if not math.isfinite(value):
        return False
    # A best that is not finite can come from an older version, and any finite value replaces it.
    if best is None or not math.isfinite(best):
        return True
    return value < best if lower_is_better else value > best


def best_of(values: Mapping[Key, float], *, lower_is_better: bool = True) -> Key | None:
    """Return the key of the best value, the first of equal ones; None if no value is finite."""
    # A loop, since `min` with NaN among the values depends on their order.
    best: Key | None = None
    for key, value in values.items():
        if is_better(value, None if best is None else values[best], lower_is_better=lower_is_better):
            best = key
    return best
