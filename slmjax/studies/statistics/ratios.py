"""The recovered fraction of a cost: a ratio of two paired differences, with its noise.

    recovered_fraction([1.42, 1.44, 1.43], full=[1.40, 1.41, 1.40], rounded=[1.50, 1.52, 1.49])

With L the metric of a seed, R = 1 - (L_arm - L_full) / (L_rounded - L_full): 0 is no better than rounding, 1
as good as full precision, above 1 better than that. The two differences are averaged over seeds before they
are divided: the mean of the ratios of single seeds is biased by seeds for which rounding happens to cost
little.

N: seeds, R: resamples.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy import stats

from slmjax.studies.statistics.samples import (
    Interval,
    PairedDifference,
    paired_difference,
    percentile_interval,
    resamples,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecoveredFraction:
    """The fraction of the cost of rounding that an arm recovers."""

    fraction: float | None  # R; None if rounding costs nothing, so that there is nothing to recover
    standard_error: float | None  # of R, by the delta method
    # None if the cost of rounding does not differ from zero significantly: R could then be anything
    fieller_interval: Interval | None
    bootstrap_interval: Interval | None  # None if rounding costs nothing in a resample of the seeds
    cost: PairedDifference  # rounded minus full
    gain: PairedDifference  # the arm minus rounded; its t test is that of R = 0

    @property
    def is_above_zero(self) -> bool:
        """Whether Fieller's interval of R lies above zero: the arm is better than rounding."""
        return self.fieller_interval is not None and self.fieller_interval[0] > 0

    @property
    def is_below_zero(self) -> bool:
        """Whether it lies below zero: rounding is better than the arm."""
        return self.fieller_interval is not None and self.fieller_interval[1] < 0


def recovered_fraction(
    values: Sequence[float],
    *,
    full: Sequence[float],
    rounded: Sequence[float],
    lower_is_better: bool = True,
    confidence: float = 0.95,
    seed: int = 0,
) -> RecoveredFraction:
    """Return the fraction of the cost of rounding that an arm recovers; element i always has the same seed.

    Its noise is given in three ways. The standard error is that of the delta method: of the mean of (x - r y)
    / mean(y), with the differences x of the arm and y of rounding from `full`, and r the ratio of their
    means. Fieller's interval (1954) has every R for which a paired t test does not distinguish x - (1 - R) y
    from zero. For normal differences it is exact; at 0 it is the paired t test of the arm and `rounded`, at 1
    that of the arm and `full`. The bootstrap resamples seeds, all three values of a seed together (see
    `bootstrap_interval`; with few seeds it is too narrow).

    Args:
      values: metric of the arm.
      full: metric of the model in full precision, trained for as long.
      rounded: metric of `full` after rounding to the arm's format.
      lower_is_better: whether a lower metric is better.
      confidence: of the intervals.
      seed: of the bootstrap, if there are too many resamples to enumerate.

    Raises:
      ValueError: the lengths differ, there are fewer than two seeds, or a value is not finite.
    """
    # The differences are also part of the result: a ratio alone hides how small its denominator is.
    cost = paired_difference(rounded, full, confidence=confidence, seed=seed)
    gain = paired_difference(values, rounded, confidence=confidence, seed=seed)
    # Signs are such that y > 0 if rounding costs something, whichever way the metric goes.
    y = np.subtract(rounded, full) * (1 if lower_is_better else -1)
    x = np.subtract(values, full) * (1 if lower_is_better else -1)
    # A fraction of no cost, or of a gain, has no meaning.
    if y.mean() <= 0:
        return RecoveredFraction(
            fraction=None,
            standard_error=None,
            fieller_interval=None,
            bootstrap_interval=None,
            cost=cost,
            gain=gain,
        )
    ratio = float(x.mean() / y.mean())
    # Linearized at the means: the derivative of mean(x) / mean(y) is (dx - r dy) / mean(y).
    error = float(np.std(x - ratio * y, ddof=1) / math.sqrt(len(x)) / y.mean())
    # Without noise in either difference, no test can be made (`paired_difference`).
    is_noisy = cost.has_noise or gain.has_noise
    return RecoveredFraction(
        fraction=1 - ratio,
        standard_error=error if is_noisy else None,
        fieller_interval=_one_minus(fieller_interval(x, y, confidence=confidence)) if is_noisy else None,
        bootstrap_interval=_one_minus(_bootstrap_interval(x, y, confidence=confidence, seed=seed))
        if is_noisy
        else None,
        cost=cost,
        gain=gain,
    )


def fieller_interval(
    x: Float[np.ndarray, " N"], y: Float[np.ndarray, " N"], *, confidence: float = 0.95
) -> Interval | None:
    """Return Fieller's interval of mean(x) / mean(y) for paired values.

    It has all r for which mean(x - r y) is within t standard errors of zero. None if the mean of y is within
    t of its standard errors of zero: the set is then not a bounded interval.
    """
    # Fieller (1954), Journal of the Royal Statistical Society B 16.
    t = float(stats.t.ppf((1 + confidence) / 2, len(x) - 1))
    # Covariances of the means, not of the values.
    ((s_xx, s_xy), (_, s_yy)) = np.cov(x, y) / len(x)
    # r**2 a - 2 r b + c <= 0.
    a = y.mean() ** 2 - t**2 * s_yy
    b = x.mean() * y.mean() - t**2 * s_xy
    c = x.mean() ** 2 - t**2 * s_xx
    # The quadratic opens downwards: every r outside an interval fits, or every r at all.
    if a <= 0:
        return None
    # Rounding can make a discriminant of zero negative.
    root = math.sqrt(max(b**2 - a * c, 0.0))
    return float((b - root) / a), float((b + root) / a)


def _bootstrap_interval(
    x: Float[np.ndarray, " N"], y: Float[np.ndarray, " N"], *, confidence: float, seed: int
) -> Interval | None:
    indices = resamples(len(x), seed=seed)
    numerators = x[indices].mean(axis=1)
    denominators = y[indices].mean(axis=1)
    # A ratio jumps from one infinity to the other at 0: quantiles across it have no meaning.
    if denominators.min() <= 0:
        return None
    return percentile_interval(numerators / denominators, confidence=confidence)


def _one_minus(ratio: Interval | None) -> Interval | None:
    """Return the interval of 1 - r from that of r."""
    # Subtraction swaps the ends.
    return None if ratio is None else (1 - ratio[1], 1 - ratio[0])
