"""Exact intervals of proportions, such as the share of runs that diverge.

exact_interval(1, 8)      # (0.003, 0.527): one of eight runs has diverged
"""

from scipy import special

from slmjax.studies.statistics.samples import Interval


def exact_interval(successes: int, trials: int, *, confidence: float = 0.95) -> Interval:
    """Return the interval of a probability by Clopper and Pearson (1934).

    It has every probability for which neither tail of the binomial distribution beyond the observed number is
    below half of 1 - confidence, and contains the true one at least as often as the confidence says. Its ends
    are quantiles of beta distributions.

    Raises:
      ValueError: there are no trials, more successes than trials, or the confidence is not between 0 and 1.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(
            f"{successes} of {trials} is no proportion: give at least 1 trial, and from 0 to all successes"
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: give a fraction between 0 and 1, such as 0.95")
    tail = (1 - confidence) / 2
    failures = trials - successes
    # With no success or no failure, the beta distribution is at the end of the range.
    low = float(special.betaincinv(successes, failures + 1, tail)) if successes else 0.0
    high = float(special.betaincinv(successes + 1, failures, 1 - tail)) if failures else 1.0
    return low, high
