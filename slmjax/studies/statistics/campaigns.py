"""False discoveries over many studies: what is expected among all verdicts of a campaign.

    benjamini_yekutieli([0.001, 0.02, 0.4])               # adjusted p values
    e_bh([e_value(p) for p in (0.001, 0.02, 0.4)])        # adjusted, comparable with a level

Holm's correction limits the probability of any false verdict in one study. Over a hundred studies, some of
their verdicts are false nevertheless. Here the expected share of false ones among all that are reported (the
false discovery rate) is at most the level, however the tests depend on each other: comparisons of a study
share a baseline, and studies share text.
"""

import math
from collections.abc import Sequence

HALF = 0.5


def benjamini_yekutieli(p_values: Sequence[float]) -> tuple[float, ...]:
    """Return the adjusted p values, in the given order (Benjamini and Yekutieli, 2001).

    Rejecting those up to a level limits the false discovery rate to it under any dependence. The k-th
    smallest of m is multiplied by m (1 + 1/2 + ... + 1/m) / k; none is above the one after it, nor above 1.

    Raises:
      ValueError: a p value is not between 0 and 1.
    """
    for value in p_values:
        _check_p_value(value)
    num = len(p_values)
    factor = num * sum(1 / k for k in range(1, num + 1))
    adjusted = [1.0] * num
    smallest = 1.0
    # Step-up: from the largest p value down.
    order = sorted(range(num), key=lambda i: p_values[i])
    for rank in range(num, 0, -1):
        i = order[rank - 1]
        smallest = min(smallest, factor / rank * p_values[i])
        adjusted[i] = smallest
    return tuple(adjusted)


def e_value(p_value: float, *, power: float = HALF) -> float:
    """Return an e value from a p value: power * p ** (power - 1), infinite for p = 0.

    An e value has an expectation of at most 1 if there is no effect. The function is a calibrator (Vovk and
    Wang, 2021), which turns any p value into one. Unlike p values, e values of studies that follow each other
    may be multiplied, also if a study was only run because of the one before it. Averages of e values are
    e values.

    Raises:
      ValueError: the p value is not between 0 and 1, or the power not between both.
    """
    _check_p_value(p_value)
    if not 0 < power < 1:
        raise ValueError(f"the power of the calibrator is {power}: give one between 0 and 1, such as 0.5")
    return power * p_value ** (power - 1) if p_value else math.inf


def mixed_e_value(p_value: float) -> float:
    """Return the average of `e_value` over all powers: (1 - p + p log p) / (p (log p)**2).

    It needs no choice of a power, and is less for p values around 0.01, more for very small ones.

    Raises:
      ValueError: the p value is not between 0 and 1.
    """
    _check_p_value(p_value)
    if p_value == 0:
        return math.inf
    log = math.log(p_value)
    # Close to 1 both parts of the fraction vanish; its series is 1/2 - log(p) / 6.
    if log > -1e-4:
        return HALF - log / 6
    return (1 - p_value + p_value * log) / (p_value * log**2)


def e_bh(e_values: Sequence[float]) -> tuple[float, ...]:
    """Return adjusted e values, comparable with a level as p values are (e-BH; Wang and Ramdas, 2022).

    Rejecting those up to a level limits the false discovery rate to it under any dependence. With the k-th
    largest of m, it is the least m / (k e) of this one and of smaller ones, at most 1.

    Raises:
      ValueError: an e value is negative or NaN.
    """
    for value in e_values:
        if not value >= 0:
            raise ValueError(f"{value} is not an e value: it must be 0 or more")
    num = len(e_values)
    adjusted = [1.0] * num
    smallest = 1.0
    order = sorted(range(num), key=lambda i: -e_values[i])
    for rank in range(num, 0, -1):
        i = order[rank - 1]
        if e_values[i] > 0:
            smallest = min(smallest, num / (rank * e_values[i]))
        adjusted[i] = smallest
    return tuple(adjusted)


def _check_p_value(value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{value} is not a p value: it must be between 0 and 1")
