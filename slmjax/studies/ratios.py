"""How much of a loss is made good: a ratio of two paired differences, with its noise.

    recovered_share([1.42, 1.44, 1.43], full=[1.40, 1.41, 1.40], rounded=[1.50, 1.52, 1.49])

With L the figure of each seed, R = 1 - (L_arm - L_full) / (L_rounded - L_full): 0 is no better than rounding,
1 as good as not rounding at all, above 1 better than that. The two differences are averaged over seeds before
they are divided: the mean of each seed's own ratio is drawn away by seeds for which rounding happened to cost
little. N: seeds, R: resamples.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy import stats

from slmjax.studies.statistics import (
    Interval,
    PairedDifference,
    paired_difference,
    percentile_interval,
    resamples,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecoveredShare:
    """What an arm recovers of what rounding costs."""

    share: float | None  # R; None where rounding costs nothing, so that there is nothing to recover
    standard_error: float | None  # of R, by the delta method
    fieller_interval: (
        Interval | None
    )  # None where the cost of rounding is not told from zero: R could then be anything
    bootstrap_interval: Interval | None  # None where a resample of the seeds has rounding cost nothing
    cost: PairedDifference  # rounded minus full: what there is to recover
    gain: PairedDifference  # the arm minus rounded; its t test is that of R = 0

    @property
    def is_above_zero(self) -> bool:
        """Whether the interval of R (Fieller's) lies above zero: the arm is better than rounding."""
        return self.fieller_interval is not None and self.fieller_interval[0] > 0

    @property
    def is_below_zero(self) -> bool:
        """Whether it lies below zero: rounding is better than the arm."""
        return self.fieller_interval is not None and self.fieller_interval[1] < 0


def recovered_share(
    values: Sequence[float],
    *,
    full: Sequence[float],
    rounded: Sequence[float],
    lower_is_better: bool = True,
    confidence: float = 0.95,
    seed: int = 0,
) -> RecoveredShare:
    """The share of the cost of rounding that an arm recovers; element i of all three is of the same seed.

    Three views of its noise. The standard error is the delta method's: that of the mean of (x - r y) /
    mean(y), with x the arm's and y rounding's distance from `full` and r the ratio of their means. Fieller's
    interval (1954) holds every R for which a paired t test does not tell x - (1 - R) y from zero: with normal
    differences it is exact, at 0 it is the paired t test of the arm and `rounded`, at 1 that of the arm and
    `full`. The bootstrap's resamples seeds, all three figures of a seed together (`bootstrap_interval` says
    how, and that with few seeds it is too narrow).

    Args:
      values: figures of the arm.
      full: of the model in full precision, trained as long.
      rounded: of `full` after rounding to the arm's format.
      lower_is_better: which way the figure goes.
      confidence: of the intervals.
      seed: of the bootstrap's draws, where resamples are too many to enumerate.

    Raises:
      ValueError: the lengths differ, there are fewer than two seeds, or a figure is not finite.
    """
    cost = paired_difference(rounded, full, confidence=confidence, seed=seed)
    gain = paired_difference(values, rounded, confidence=confidence, seed=seed)
    y = np.subtract(rounded, full) * (1 if lower_is_better else -1)
    x = np.subtract(values, full) * (1 if lower_is_better else -1)
    if y.mean() <= 0:
        return RecoveredShare(
            share=None,
            standard_error=None,
            fieller_interval=None,
            bootstrap_interval=None,
            cost=cost,
            gain=gain,
        )
    ratio = float(x.mean() / y.mean())
    error = float(np.std(x - ratio * y, ddof=1) / math.sqrt(len(x)) / y.mean())
    # Without noise in either difference, no test can be made (`paired_difference`).
    is_noisy = cost.has_noise or gain.has_noise
    return RecoveredShare(
        share=1 - ratio,
        standard_error=error if is_noisy else None,
        fieller_interval=_turned(fieller_interval(x, y, confidence=confidence)) if is_noisy else None,
        bootstrap_interval=_turned(_bootstrap_interval(x, y, confidence=confidence, seed=seed))
        if is_noisy
        else None,
        cost=cost,
        gain=gain,
    )


def fieller_interval(
    x: Float[np.ndarray, " N"], y: Float[np.ndarray, " N"], *, confidence: float = 0.95
) -> Interval | None:
    """All r with |mean(x - r y)| at most t standard errors of it: Fieller's interval of mean(x) / mean(y) for
    paired values.

    None where the mean of y is within t of its standard errors from zero: the set is then no interval with
    two ends.
    """
    t = float(stats.t.ppf((1 + confidence) / 2, len(x) - 1))
    ((s_xx, s_xy), (_, s_yy)) = np.cov(x, y) / len(x)
    # r**2 a - 2 r b + c <= 0.
    a = y.mean() ** 2 - t**2 * s_yy
    b = x.mean() * y.mean() - t**2 * s_xy
    c = x.mean() ** 2 - t**2 * s_xx
    if a <= 0:
        return None
    reach = math.sqrt(max(b**2 - a * c, 0.0))
    return float((b - reach) / a), float((b + reach) / a)


def _bootstrap_interval(
    x: Float[np.ndarray, " N"], y: Float[np.ndarray, " N"], *, confidence: float, seed: int
) -> Interval | None:
    chosen = resamples(len(x), seed=seed)
    above = x[chosen].mean(axis=1)
    below = y[chosen].mean(axis=1)
    return None if below.min() <= 0 else percentile_interval(above / below, confidence=confidence)


def _turned(ratio: Interval | None) -> Interval | None:
    """The interval of 1 - r from that of r."""
    return None if ratio is None else (1 - ratio[1], 1 - ratio[0])
