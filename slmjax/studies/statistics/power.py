"""Power of paired comparisons: effects that a number of seeds resolves, and seeds that an effect takes.

    smallest_resolved(0.004, seeds=3, comparisons=8, degrees_of_freedom=16)      # 4 times in 5
    seeds_needed(0.01, 0.004, comparisons=8, arms=9)

The first of m comparisons that Holm's correction tests must reach level / m, and this worst case is what is
planned for: it is also the level of every comparison while no other has been resolved.

All deviations are of one pair's difference: for two arms of equal and independent noise, sqrt(2) times the
deviation of one run. Under `VarianceRule.LARGER`, the variance is the larger of the pair's own and the pooled
one, of which the pair is a part. With U the pair's own sum of squares, of n - 1 degrees of freedom, and W
that of all other contrasts of the arms, of f - (n - 1) degrees of freedom, it is the larger of U / (n - 1)
and (U + W) / f. U, W and the mean are independent if the noise is normal and equal for all arms, so that the
power is an average over both, computed by a quadrature of their quantiles. One pair in ten has an arm that is
set apart although it is as noisy as the others (`pool_noise`), and is judged by its own differences: the
power is the weighted mean of both, within 2 % of that of verdicts (`benchmarks/verdicts.py`).

Q: nodes of the quadrature.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from scipy import optimize, special, stats

from slmjax.studies.statistics.results_table import VarianceRule
from slmjax.studies.statistics.two_way import APART_LEVEL

LEVEL = 0.05
POWER = 0.8  # 4 times in 5
MAX_SEEDS = 1000  # more are not searched
APART = 1 - (1 - APART_LEVEL) ** 2  # pairs with an arm set apart, of equally noisy arms
NODES = 24  # in each of two dimensions; the power is that of 400 within 5e-4
FAR = 30.0  # noncentrality above which a mean is averaged over instead of a variance


def power_of_difference(
    effect: float,
    deviation: float,
    seeds: int,
    comparisons: int = 1,
    degrees_of_freedom: float | None = None,
    level: float = LEVEL,
    *,
    variance: VarianceRule = VarianceRule.LARGER,
) -> float:
    """Return the probability that a comparison is resolved, by a two-sided paired t test.

    Args:
      effect: true mean difference.
      deviation: true standard deviation of one pair's difference.
      seeds: number of pairs.
      comparisons: number that Holm's correction is for.
      degrees_of_freedom: of the pooled variance, (A - 1) (S - 1) for A arms and S seeds; None for the pair's
        own, seeds - 1.
      level: probability of any false verdict.
      variance: the variance of a comparison.

    Raises:
      ValueError: there are fewer than two seeds or no comparison, or a number is out of its range.
    """
    pooled = _check(deviation, seeds, comparisons, degrees_of_freedom, level)
    noncentrality = abs(effect) * math.sqrt(seeds) / deviation
    tail = level / comparisons / 2
    if variance is VarianceRule.OWN:
        return _t_power(noncentrality, tail, seeds - 1)
    if variance is VarianceRule.POOLED or pooled <= seeds - 1:
        return _t_power(noncentrality, tail, pooled)
    critical = float(stats.t.isf(tail, pooled)) * np.sqrt(_larger_variance(seeds - 1, pooled))
    # Given the variance, the mean is normal.
    reached = special.ndtr(noncentrality - critical) + special.ndtr(-noncentrality - critical)
    together = float(_weights() @ reached @ _weights())
    return (1 - APART) * together + APART * _t_power(noncentrality, tail, seeds - 1)


def smallest_resolved(
    deviation: float,
    seeds: int,
    comparisons: int = 1,
    degrees_of_freedom: float | None = None,
    level: float = LEVEL,
    power: float = POWER,
    *,
    variance: VarianceRule = VarianceRule.LARGER,
) -> float:
    """Return the smallest true difference that is resolved with a probability of `power`.

    The other arguments are those of `power_of_difference`, which is solved for the effect.

    Raises:
      ValueError: as for `power_of_difference`; or the probability is not between the level and 1.
    """
    _check(deviation, seeds, comparisons, degrees_of_freedom, level)
    _check_power(power, level)
    return deviation * _smallest(
        lambda effect: power_of_difference(
            effect, 1.0, seeds, comparisons, degrees_of_freedom, level, variance=variance
        ),
        power,
    )


def seeds_needed(
    effect: float,
    deviation: float,
    *,
    comparisons: int = 1,
    arms: int = 2,
    level: float = LEVEL,
    power: float = POWER,
    variance: VarianceRule = VarianceRule.LARGER,
) -> int | None:
    """Return the number of seeds that resolve an effect with a probability of `power`.

    `arms` are those whose residuals are pooled, the degrees of freedom being (arms - 1) (seeds - 1); 2 for a
    pair judged by its own differences. None if more than 1,000 seeds are needed, or if there is no effect.
    """
    _check_power(power, level)
    if effect == 0:
        return None

    return _first(
        lambda seeds: power_of_difference(
            effect, deviation, seeds, comparisons, (arms - 1) * (seeds - 1), level, variance=variance
        ),
        power,
    )


# Equality ---------------------------------------------------------------------------------------------------
def power_of_equality(
    margin: float,
    deviation: float,
    seeds: int,
    comparisons: int = 1,
    degrees_of_freedom: float | None = None,
    level: float = LEVEL,
    *,
    effect: float = 0.0,
    variance: VarianceRule = VarianceRule.LARGER,
) -> float:
    """Return the probability that two one-sided t tests find a difference within the margin.

    Both tests reject if the mean is more than t standard errors inside of both ends (Schuirmann, 1987). Given
    the standard error, the mean is normal, and the probability is averaged over the standard error. The other
    arguments are those of `power_of_difference`; `effect` is the true difference.

    Raises:
      ValueError: the margin is not above 0; or as for `power_of_difference`.
    """
    pooled = _check(deviation, seeds, comparisons, degrees_of_freedom, level)
    if not margin > 0:
        raise ValueError(f"the margin is {margin}: give the largest difference that counts as none, above 0")
    scale = math.sqrt(seeds) / deviation
    degrees = seeds - 1 if variance is VarianceRule.OWN else pooled

    def average(errors: np.ndarray, weights: np.ndarray, degrees: float) -> float:
        # Half the length of the means that both tests accept; none with too large an error.
        half = margin * scale - float(stats.t.isf(level / comparisons, degrees)) * errors
        inside = special.ndtr(half - effect * scale) - special.ndtr(-half - effect * scale)
        return float((weights * np.maximum(inside, 0.0)).sum())

    if variance is not VarianceRule.LARGER or pooled <= seeds - 1:
        return average(_errors(degrees), _weights(), degrees)
    larger = np.sqrt(_larger_variance(seeds - 1, pooled))
    together = average(larger, np.outer(_weights(), _weights()), pooled)
    return (1 - APART) * together + APART * average(_errors(seeds - 1), _weights(), seeds - 1)


def smallest_equal(
    deviation: float,
    seeds: int,
    comparisons: int = 1,
    degrees_of_freedom: float | None = None,
    level: float = LEVEL,
    power: float = POWER,
    *,
    variance: VarianceRule = VarianceRule.LARGER,
) -> float:
    """Return the smallest margin within which equal arms are called equal with a probability of `power`."""
    _check(deviation, seeds, comparisons, degrees_of_freedom, level)
    _check_power(power, level)

    return deviation * _smallest(
        lambda margin: power_of_equality(
            margin, 1.0, seeds, comparisons, degrees_of_freedom, level, variance=variance
        ),
        power,
    )


def seeds_for_equality(
    margin: float,
    deviation: float,
    *,
    effect: float = 0.0,
    comparisons: int = 1,
    arms: int = 2,
    level: float = LEVEL,
    power: float = POWER,
    variance: VarianceRule = VarianceRule.LARGER,
) -> int | None:
    """Return the number of seeds that call arms equal with a probability of `power`.

    None if more than 1,000 are needed, or if the true difference is not within the margin.
    """
    _check_power(power, level)
    if abs(effect) >= margin:
        return None

    return _first(
        lambda seeds: power_of_equality(
            margin,
            deviation,
            seeds,
            comparisons,
            (arms - 1) * (seeds - 1),
            level,
            effect=effect,
            variance=variance,
        ),
        power,
    )


# Computation ------------------------------------------------------------------------------------------------
def _t_power(noncentrality: float, tail: float, degrees: float) -> float:
    """Return the probability of |t| above its critical value, of the noncentral t distribution."""
    critical = float(stats.t.isf(tail, degrees))
    if noncentrality > FAR:
        # The series of the library do not end there, as with two seeds at an early look.
        nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
        reached = special.gammainc(degrees / 2, degrees / 2 * np.square((noncentrality + nodes) / critical))
        return float(weights @ reached) / math.sqrt(2 * math.pi)
    above = float(stats.nct.sf(critical, degrees, noncentrality))
    below = float(stats.nct.cdf(-critical, degrees, noncentrality))
    # Far in a tail, the library returns NaN for probabilities that round to 0 or 1.
    if math.isnan(above):
        above = float(noncentrality > critical)
    return above + (0.0 if math.isnan(below) else below)


@functools.lru_cache(maxsize=256)
def _larger_variance(own: float, pooled: float) -> Float[np.ndarray, "Q Q"]:
    """Return the larger variance at the nodes, as a multiple of the true variance."""
    u = stats.chi2.ppf(_nodes(), own)[:, None]
    w = stats.chi2.ppf(_nodes(), pooled - own)[None, :]
    return np.maximum(u / own, (u + w) / pooled)


def _errors(degrees: float) -> Float[np.ndarray, " Q"]:
    """Return standard errors at the nodes, as multiples of the true one."""
    return np.sqrt(stats.chi2.ppf(_nodes(), degrees) / degrees)


@functools.cache
def _quadrature() -> tuple[Float[np.ndarray, " Q"], Float[np.ndarray, " Q"]]:
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    return (nodes + 1) / 2, weights / 2


def _nodes() -> Float[np.ndarray, " Q"]:
    return _quadrature()[0]


def _weights() -> Float[np.ndarray, " Q"]:
    return _quadrature()[1]


def _smallest(power_of: Callable[[float], float], power: float) -> float:
    """Return the effect or margin, in deviations, at which the power, which grows with it, is `power`."""

    def excess(size: float) -> float:
        return power_of(size) - power

    low = 1e-9
    high = 1.0
    # Two seeds and many comparisons need very large effects.
    while excess(high) < 0:
        high *= 2
    return optimize.root_scalar(excess, bracket=(low, high), xtol=1e-10).root


def _first(power_of: Callable[[int], float], power: float) -> int | None:
    """Return the smallest number of seeds with at least this power, by bisection; None above 1,000."""
    low = 1
    high = 2
    while power_of(high) < power:
        if high >= MAX_SEEDS:
            return None
        low = high
        high = min(2 * high, MAX_SEEDS)
    while high - low > 1:
        middle = (low + high) // 2
        if power_of(middle) >= power:
            high = middle
        else:
            low = middle
    return high


def _check(
    deviation: float, seeds: int, comparisons: int, degrees_of_freedom: float | None, level: float
) -> float:
    """Check the arguments, and return the degrees of freedom."""
    if not deviation > 0:
        raise ValueError(
            f"the deviation is {deviation}: give the standard deviation of a pair's difference, above 0"
        )
    if seeds < 2:
        raise ValueError(f"{seeds} seeds do not show the noise: give at least 2")
    if comparisons < 1:
        raise ValueError(f"{comparisons} comparisons resolve nothing: give at least 1")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}: give a probability between 0 and 1, such as 0.05")
    if degrees_of_freedom is None:
        return seeds - 1
    if not degrees_of_freedom > 0:
        raise ValueError(
            f"there are {degrees_of_freedom} degrees of freedom: give (arms - 1) * (seeds - 1), or none for "
            "those of the pair"
        )
    return degrees_of_freedom


def _check_power(power: float, level: float) -> None:
    if not level < power < 1:
        raise ValueError(f"power is {power}: give a probability between the level, {level}, and 1")
