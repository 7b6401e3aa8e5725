"""Effective speed-up, and the trend of a gap over sizes.

    curve = fit_power_law([1e15, 1e16, 1e17], [[1.60, 1.61], [1.42, 1.41], [1.28, 1.29]])
    effective_speedup(curve, compute=1e16, losses=[1.38, 1.39]).factor      # how much more the base needs
    gap_trend([1e15, 1e16, 1e17], gaps=[-0.03, -0.02, -0.01], errors=[0.004, 0.004, 0.004])

A speed-up is the compute that the base would need for the loss of an arm, over that which the arm took. The
base's own curve of loss against compute, its ladder, translates one into the other: by a power law with a
stated asymptote, or between its points. Deviations of the sizes from the law are the error of the law, which
more seeds do not reduce: intervals use the larger of them and of the noise between seeds, with the degrees of
freedom of the sizes. With three sizes these are one, so that intervals are wide.

C: sizes.
"""

import dataclasses
import enum
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy import optimize, stats

from slmjax.studies.statistics.samples import ROUNDING, Interval

LARGEST = 700.0  # logarithm of the largest ratios


@dataclasses.dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """log(loss - asymptote) = intercept - exponent log(compute), by least squares of the means of sizes."""

    asymptote: float
    exponent: float
    intercept: float
    compute: tuple[float, ...]  # of the sizes
    residual_variance: float | None  # of a mean, in logarithms; None with two sizes
    lack_of_fit_p: float | None  # that the means deviate as their seeds do; None without degrees of freedom

    def loss(self, compute: float) -> float:
        """Return the loss for a compute."""
        return self.asymptote + math.exp(self.intercept - self.exponent * math.log(compute))


class Coverage(enum.Enum):
    """Whether the base has an arm's loss with the compute of some of its sizes."""

    WITHIN = "within"
    BEYOND = "more than"  # with more compute than its largest size has
    BELOW = "less than"  # with less compute than its smallest size has


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speedup:
    """How much more compute the base needs to match an arm."""

    # compute of the base over that of the arm; None where the base's sizes do not reach the loss and nothing
    # is extrapolated, and where a law has it beyond all numbers
    factor: float | None
    # None where the curve is too uncertain for an interval, or has no degrees of freedom. An end is None if
    # it is open: the base's sizes do not reach a loss that the arm may have
    interval: tuple[float | None, float | None] | None
    coverage: Coverage
    limits: Interval  # compute of the base's smallest and largest size over that of the arm


def fit_power_law(
    compute: Sequence[float], losses: Sequence[Sequence[float]], *, asymptote: float = 0.0
) -> PowerLaw:
    """Fit the base's curve to the losses of each size, by seed.

    The asymptote is stated, since few sizes do not show it: state the entropy of the text where it is known,
    and look at more than one.

    Raises:
      ValueError: there are fewer than two sizes, a size has no loss, a compute or loss is out of range, or
        the loss does not fall with compute.
    """
    x = _log_compute(compute, losses)
    # Written as `not >`, so that NaN is refused.
    if not min(min(values) for values in losses) > asymptote or math.isinf(asymptote):
        raise ValueError(f"the asymptote is {asymptote}: give one below all losses, such as 0")
    logs = [np.log(np.asarray(values, np.float64) - asymptote) for values in losses]
    y = np.array([values.mean() for values in logs])
    slope = float((x - x.mean()) @ y / np.square(x - x.mean()).sum())
    # Equal means may differ in their last bits, which is no fall.
    if -slope * float(np.ptp(x)) <= ROUNDING * max(1.0, float(np.abs(y).max())):
        raise ValueError(
            "the loss of the base does not fall with compute: there is no compute to translate to"
        )
    intercept = float(y.mean() - slope * x.mean())
    residuals = y - intercept - slope * x
    degrees = len(x) - 2
    between = float(np.square(residuals).sum()) / degrees if degrees else None
    # Noise between seeds, of a mean of a size.
    seed_degrees = sum(len(values) - 1 for values in logs)
    lack_of_fit_p = None
    variance = between
    if seed_degrees and between is not None:
        within = sum(float(np.square(values - values.mean()).sum()) for values in logs) / seed_degrees
        within *= float(np.mean([1 / len(values) for values in logs]))
        variance = max(between, within)
        if within > 0:
            lack_of_fit_p = float(stats.f.sf(between / within, degrees, seed_degrees))
    return PowerLaw(
        asymptote=asymptote,
        exponent=-slope,
        intercept=intercept,
        compute=tuple(compute),
        residual_variance=variance,
        lack_of_fit_p=lack_of_fit_p,
    )


def effective_speedup(
    curve: PowerLaw, *, compute: float, losses: Sequence[float], confidence: float = 0.95
) -> Speedup:
    """Return the compute that the base needs for the mean loss of an arm, over that of the arm.

    The interval is that of inverse prediction (Draper and Smith, 1998, section 3.2): every compute with which
    the loss of the base, which deviates from its law as its sizes do, may be that of the arm. It is
    unbounded, and None, if the exponent is not distinguished from zero.

    Args:
      curve: of the base.
      compute: of the arm.
      losses: of the arm, by seed.
      confidence: of the interval.

    Raises:
      ValueError: the compute is not above 0, there is no loss, or one is not above the asymptote.
    """
    _check_arm(compute, losses, asymptote=curve.asymptote)
    y = float(np.mean(np.log(np.asarray(losses, np.float64) - curve.asymptote)))
    x = np.log(np.asarray(curve.compute))
    at = (curve.intercept - y) / curve.exponent
    interval = None
    if curve.residual_variance is not None:
        ends = _inverse_prediction(curve, y, x, confidence=confidence)
        interval = None if ends is None else (_ratio(ends[0], compute), _ratio(ends[1], compute))
    return Speedup(
        factor=_ratio(at, compute),
        interval=interval,
        coverage=Coverage.BEYOND if at > x.max() else Coverage.BELOW if at < x.min() else Coverage.WITHIN,
        limits=(min(curve.compute) / compute, max(curve.compute) / compute),
    )


def _ratio(log_compute: float, compute: float) -> float | None:
    """Return a compute over another; None beyond floating point, as by a curve that hardly falls."""
    log_ratio = log_compute - math.log(compute)
    return math.exp(log_ratio) if abs(log_ratio) < LARGEST else None


def _check_arm(compute: float, losses: Sequence[float], *, asymptote: float = -math.inf) -> None:
    if not (compute > 0 and math.isfinite(compute)):
        raise ValueError(f"the compute of the arm is {compute}: give a number above 0, such as its FLOPs")
    if not len(losses) or not np.isfinite(losses).all() or min(losses) <= asymptote:
        above = f", above the asymptote {asymptote}" if math.isfinite(asymptote) else ""
        raise ValueError(f"losses of the arm are {list(losses)}: give at least one, all finite{above}")


def _inverse_prediction(
    curve: PowerLaw, y: float, x: Float[np.ndarray, " C"], *, confidence: float
) -> Interval | None:
    """Return the interval of log compute; None if it is unbounded."""
    assert curve.residual_variance is not None
    t = float(stats.t.ppf((1 + confidence) / 2, len(x) - 2))
    bound = t**2 * curve.residual_variance
    spread = float(np.square(x - x.mean()).sum())
    # (e + exponent d)**2 <= bound (1 + 1 / C + d**2 / spread), with d the distance from the mean of x.
    e = y - (curve.intercept - curve.exponent * float(x.mean()))
    a = curve.exponent**2 - bound / spread
    b = e * curve.exponent
    c = e**2 - bound * (1 + 1 / len(x))
    if a <= 0:
        return None
    # Rounding can make a discriminant of zero negative.
    root = math.sqrt(max(b**2 - a * c, 0.0))
    center = float(x.mean())
    return center + (-b - root) / a, center + (-b + root) / a


def interpolated_speedup(
    compute: Sequence[float],
    losses: Sequence[Sequence[float]],
    *,
    arm_compute: float,
    arm_losses: Sequence[float],
    confidence: float = 0.95,
) -> Speedup:
    """Return the speed-up from the points of the base's curve alone.

    Between points, the loss is linear in log compute; means that rise with compute are averaged (isotonic
    regression). No law is assumed, so that nothing is extrapolated: where no size of the base reaches the
    arm's loss, all that is known is that the factor is above the larger of the limits, or below the smaller.
    The interval is that of the losses: from the points where the curve has the arm's mean loss, more or less
    t standard errors of the difference of two means. The noise of one run is pooled over the sizes and the
    arm. An end is open where the base does not reach it, and a limit where it is beyond that for certain.

    Raises:
      ValueError: as for `fit_power_law` and `effective_speedup`; the loss of the base may rise.
    """
    x = _log_compute(compute, losses)
    _check_arm(arm_compute, arm_losses)
    order = np.argsort(x)
    x = x[order]
    means = np.array([float(np.mean(losses[i])) for i in order])
    falling = optimize.isotonic_regression(means, increasing=False).x
    arm = float(np.mean(arm_losses))
    limits = (min(compute) / arm_compute, max(compute) / arm_compute)

    def coverage(loss: float) -> Coverage:
        return (
            Coverage.BEYOND
            if loss < falling[-1]
            else Coverage.BELOW
            if loss > falling[0]
            else Coverage.WITHIN
        )

    def factor(loss: float) -> float:
        # `interp` needs rising abscissas.
        return math.exp(float(np.interp(-loss, -falling, x))) / arm_compute

    groups = [np.asarray(values, np.float64) for values in (*losses, arm_losses)]
    degrees = sum(len(values) - 1 for values in groups)
    interval = None
    if degrees:
        within = sum(float(np.square(values - values.mean()).sum()) for values in groups) / degrees
        # Next to the arm's loss, the curve is the mean of about one size.
        error = math.sqrt(within * (1 / len(arm_losses) + 1 / min(len(values) for values in losses)))
        half_width = float(stats.t.ppf((1 + confidence) / 2, degrees)) * error
        # Outside of the sizes `factor` is the limit on that side.
        interval = (
            None if coverage(arm + half_width) is Coverage.BELOW else factor(arm + half_width),
            None if coverage(arm - half_width) is Coverage.BEYOND else factor(arm - half_width),
        )
    return Speedup(
        factor=factor(arm) if coverage(arm) is Coverage.WITHIN else None,
        interval=interval,
        coverage=coverage(arm),
        limits=limits,
    )


# Trends -----------------------------------------------------------------------------------------------------
class Direction(enum.Enum):
    """What a gap does as compute grows."""

    SHRINKS = "shrinks"  # towards zero
    GROWS = "grows"
    NOT_RESOLVED = "not resolved"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trend:
    """The gap of an arm and the base over sizes: a line in log10(compute)."""

    slope: float  # change of the gap by ten times the compute
    slope_interval: Interval | None  # None with two sizes
    p_value: float | None  # two-sided, that there is no slope
    direction: Direction
    lack_of_fit_p: float | None  # that the gaps deviate from the line as their errors allow
    center: float  # mean of log10(compute), weighted
    gap_at_center: float
    scale: float  # factor of all errors, at least 1, for gaps that deviate more than they should
    spread: float  # sum of the weights times squared distances from the center
    weight: float  # sum of the weights
    degrees: int  # of freedom

    def gap(self, compute: float, *, confidence: float = 0.95) -> tuple[float, Interval | None]:
        """Return the gap that the line has for a compute, with its interval.

        Beyond the sizes, it is an extrapolation by the line.
        """
        distance = math.log10(compute) - self.center
        value = self.gap_at_center + self.slope * distance
        if not self.degrees:
            return value, None
        error = self.scale * math.sqrt(1 / self.weight + distance**2 / self.spread)
        half_width = float(stats.t.ppf((1 + confidence) / 2, self.degrees)) * error
        return value, (value - half_width, value + half_width)


def gap_trend(
    compute: Sequence[float], *, gaps: Sequence[float], errors: Sequence[float], confidence: float = 0.95
) -> Trend:
    """Return the trend of a gap over sizes, by least squares weighted with its standard errors.

    If the gaps deviate from the line by more than their errors explain, all errors are enlarged by the root
    of chi squared over its degrees of freedom (Birge, 1932), so that intervals include the lack of fit; they
    are never reduced. Intervals have the degrees of freedom of the sizes, their number less 2.

    Args:
      compute: of each size.
      gaps: of the arm and the base at each size: the mean of paired differences.
      errors: standard errors of the gaps.
      confidence: of the interval; the direction is resolved at 1 - confidence.

    Raises:
      ValueError: the lengths differ, there are fewer than two sizes, or an error is not above 0 or not
        finite: a size whose error is not known says nothing about the trend, and is to be left out.
    """
    x = _log_compute(compute, [[gap] for gap in gaps]) / math.log(10)
    y = np.asarray(gaps, np.float64)
    if len(errors) != len(y) or not all(0 < error < math.inf for error in errors):
        raise ValueError(
            f"errors are {list(errors)}: give a finite standard error above 0 for each of the {len(y)} gaps, "
            "and leave out sizes whose error is not known"
        )
    weights = 1 / np.square(np.asarray(errors, np.float64))
    total = float(weights.sum())
    center = float(weights @ x / total)
    middle = float(weights @ y / total)
    spread = float(weights @ np.square(x - center))
    slope = float(weights @ ((x - center) * y) / spread)
    degrees = len(x) - 2
    chi2 = float(weights @ np.square(y - middle - slope * (x - center)))
    scale = max(1.0, math.sqrt(chi2 / degrees)) if degrees else 1.0
    interval = None
    p_value = None
    direction = Direction.NOT_RESOLVED
    if degrees:
        error = scale / math.sqrt(spread)
        half_width = float(stats.t.ppf((1 + confidence) / 2, degrees)) * error
        interval = (slope - half_width, slope + half_width)
        p_value = float(2 * stats.t.sf(abs(slope) / error, degrees))
        # Where the sizes are, the gap moves away from zero if it and its slope have one sign.
        if p_value <= 1 - confidence and middle:
            direction = Direction.GROWS if slope * middle > 0 else Direction.SHRINKS
    return Trend(
        slope=slope,
        slope_interval=interval,
        p_value=p_value,
        direction=direction,
        lack_of_fit_p=float(stats.chi2.sf(chi2, degrees)) if degrees else None,
        center=center,
        gap_at_center=middle,
        scale=scale,
        spread=spread,
        weight=total,
        degrees=degrees,
    )


def _log_compute(compute: Sequence[float], losses: Sequence[Sequence[float]]) -> Float[np.ndarray, " C"]:
    if len(compute) != len(losses) or len(set(compute)) < 2:
        raise ValueError(
            f"{len(set(compute))} sizes with losses of {len(losses)}: give at least two sizes, each once, "
            "and the losses of each"
        )
    is_positive = all(0 < value < math.inf for value in compute)
    if not is_positive or not all(len(values) and np.isfinite(values).all() for values in losses):
        raise ValueError(
            f"compute of the sizes is {list(compute)}: give each a finite one above 0, and at least one "
            "finite loss"
        )
    return np.log(np.asarray(compute, np.float64))
