"""Samples of few seeds: summaries, paired differences with intervals, Holm's correction.

    difference = paired_difference([1.41, 1.43, 1.40], [1.45, 1.46, 1.45])   # an arm minus the other
    (adjusted,) = holm([difference.p_value])

Seeds are paired: both arms of a pair have the same initial random key and the same order of the data, and
what they have in common cancels in the difference. All values are float64; intervals are of a single
comparison.

N: values, one for each seed.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

MAX_ENUMERATED = 50_000  # resamples: up to 6 pairs, 6**6 = 46,656
NUM_DRAWS = 10_000
# relative to the values: differences that agree to this are equal
ROUNDING = 16 * float(np.finfo(np.float64).eps)

Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """Mean and spread of a metric of one arm over its seeds."""

    num_values: int
    mean: float
    standard_deviation: float | None  # of one seed, with denominator n - 1; None for a single seed
    standard_error: float | None  # of the mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """One arm minus another, seed by seed."""

    num_pairs: int
    mean: float
    standard_deviation: float  # of one pair's difference, with denominator n - 1
    standard_error: float  # of the mean
    p_value: float  # two-sided, of the paired t test that the mean is zero
    t_interval: Interval
    bootstrap_interval: Interval

    @property
    def has_noise(self) -> bool:
        """Whether the differences vary: if not, the seeds have no effect, and no test is possible."""
        return self.standard_error > 0


def summarize(values: Sequence[float]) -> Summary:
    """Return mean and spread of values, one for each seed.

    Raises:
      ValueError: there is none, or one is not finite.
    """
    array = _finite(values)
    if not len(array):
        raise ValueError("there is no value to summarize: at least one seed must have finished")
    if len(array) == 1:
        return Summary(num_values=1, mean=float(array[0]), standard_deviation=None, standard_error=None)
    # The scale is that of the values: it determines the rounding of their differences.
    deviation = _deviation(array, scale=float(np.abs(array).max()))
    return Summary(
        num_values=len(array),
        mean=float(array.mean()),
        standard_deviation=deviation,
        standard_error=deviation / math.sqrt(len(array)),
    )


def paired_difference(
    values: Sequence[float], others: Sequence[float], *, confidence: float = 0.95, seed: int = 0
) -> PairedDifference:
    """Return the mean of `values` minus `others`, with its noise; element i of both has the same seed.

    The t interval and the p value assume that the differences are about normal; the bootstrap interval does
    not (`bootstrap_interval`). If all differences are equal, up to rounding, the noise is unknown rather than
    zero: intervals then have no width, and p is 1 whatever the mean, so that no verdict follows.

    Args:
      values: metric of an arm.
      others: metric of the arm that it is compared with.
      confidence: fraction of such intervals that contain the true mean.
      seed: of the bootstrap, if there are too many resamples to enumerate.

    Raises:
      ValueError: the lengths differ, there are fewer than two pairs, or a value is not finite.
    """
    first = _finite(values)
    second = _finite(others)
    if len(first) != len(second):
        raise ValueError(
            f"{len(first)} and {len(second)} values do not make pairs: give one of each arm for every seed"
        )
    num_pairs = len(first)
    if num_pairs < 2:
        raise ValueError(f"{num_pairs} pairs do not show the noise: train at least 2 seeds of both arms")
    _check_confidence(confidence)
    # Paired, so that the variation between seeds that both arms share cancels.
    differences = first - second
    mean = float(differences.mean())
    deviation = _deviation(differences, scale=float(np.abs([first, second]).max()))
    error = deviation / math.sqrt(num_pairs)
    # A t statistic would be infinite, and any difference certain.
    if error == 0:
        return PairedDifference(
            num_pairs=num_pairs,
            mean=mean,
            standard_deviation=0.0,
            standard_error=0.0,
            p_value=1.0,
            t_interval=(mean, mean),
            bootstrap_interval=(mean, mean),
        )
    # Student's t, since the deviation is estimated from the same few values.
    half_width = float(stats.t.ppf((1 + confidence) / 2, num_pairs - 1)) * error
    return PairedDifference(
        num_pairs=num_pairs,
        mean=mean,
        standard_deviation=deviation,
        standard_error=error,
        # The survival function: 1 - cdf would lose all digits of small p values.
        p_value=float(2 * stats.t.sf(abs(mean) / error, num_pairs - 1)),
        t_interval=(mean - half_width, mean + half_width),
        bootstrap_interval=bootstrap_interval(differences.tolist(), confidence=confidence, seed=seed),
    )


def bootstrap_interval(values: Sequence[float], *, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Return the percentile bootstrap interval of the mean (Efron, 1979).

    Its ends are quantiles of the means of resamples with replacement. Up to 6 values, all n**n resamples are
    enumerated, so that the result is exact; above, there are 10,000 draws of a seeded generator. Percentiles
    were chosen over BCa, whose two corrections are estimated from the same few values: for three, they are
    noise.

    With few values the interval is too narrow, and only indicative. For 3 values, the lowest of 27 resamples
    (the smallest value three times) has more than 2.5% of the weight: the 95% interval is from the smallest
    value to the largest, and contains the centre of a symmetric distribution three times in four.

    Raises:
      ValueError: there are fewer than two values, or one is not finite.
    """
    array = _finite(values)
    if (num := len(array)) < 2:
        raise ValueError(f"{num} values cannot be resampled: give at least 2")
    _check_confidence(confidence)
    return percentile_interval(array[resamples(num, seed=seed)].mean(axis=1), confidence=confidence)


def resamples(num: int, *, seed: int = 0) -> Int[np.ndarray, "R N"]:
    """Return the indices of R samples with replacement from N values: all up to N = 6, else 10,000 draws."""
    if num**num <= MAX_ENUMERATED:
        return np.indices((num,) * num).reshape(num, -1).T
    return np.random.default_rng(seed).integers(num, size=(NUM_DRAWS, num))


def percentile_interval(values: Float[np.ndarray, " R"], *, confidence: float) -> Interval:
    """Return the quantiles with half of 1 - confidence below and above them."""
    tail = (1 - confidence) / 2
    # Both ends are the quantile of a step function from their side: negated values give the negated interval.
    low = np.quantile(values, tail, method="inverted_cdf")
    high = -np.quantile(-values, tail, method="inverted_cdf")
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Return the adjusted p values of a family of tests, in the given order (Holm, 1979).

    Rejecting those up to 0.05 limits the probability of any false rejection in the family to 0.05, however
    the tests depend on each other. The smallest of m is multiplied by m, the next by m - 1, and so on; none
    is below the one before it, nor above 1.

    Raises:
      ValueError: a p value is not between 0 and 1.
    """
    for value in p_values:
        if not 0 <= value <= 1:
            raise ValueError(f"{value} is not a p value: it must be between 0 and 1")
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    # Step-down: from the smallest, each is multiplied by the number of tests that are left.
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return tuple(adjusted)


def holm_with_equality(
    p_values: Sequence[float], equal_p: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the adjusted p values of comparisons that are tested for a difference and for equality.

    Each comparison has two hypotheses, that the arms do not differ and that they differ by the margin or
    more, of which at most one is true. Rejecting those with an adjusted p up to 0.05 limits the probability
    of any false rejection of either kind to 0.05. It is the closed test (Marcus, Peritz and Gabriel, 1976) by
    Bonferroni's inequality over all sets of hypotheses that can be true together: those with k comparisons
    count k. A comparison gives up its share only if both of its hypotheses are rejected, so that most p
    values are multiplied by the number of comparisons. Holm's correction of both kinds apart would allow
    0.05 for each.

    Args:
      p_values: of the tests for a difference.
      equal_p: of the two one-sided tests for equality, in the same order.

    Raises:
      ValueError: the lengths differ, or a p value is not between 0 and 1.
    """
    if len(p_values) != len(equal_p):
        raise ValueError(f"{len(p_values)} and {len(equal_p)} p values: give two for each comparison")
    for value in (*p_values, *equal_p):
        if not 0 <= value <= 1:
            raise ValueError(f"{value} is not a p value: it must be between 0 and 1")
    # Of another comparison, whichever hypothesis is true, its p value is at most the larger one.
    larger = [max(pair) for pair in zip(p_values, equal_p, strict=True)]

    def adjusted(own: float, i: int) -> float:
        others = sorted((value for j, value in enumerate(larger) if j != i), reverse=True)
        # The set of k comparisons that is the hardest to reject has the largest of the others.
        hardest = [own, *(min(own, value) for value in others)]
        return min(1.0, max((k + 1) * value for k, value in enumerate(hardest)))

    return (
        tuple(adjusted(value, i) for i, value in enumerate(p_values)),
        tuple(adjusted(value, i) for i, value in enumerate(equal_p)),
    )


def _finite(values: Sequence[float]) -> Float[np.ndarray, " N"]:
    array = np.asarray(values, dtype=np.float64).reshape(-1)
    if not np.isfinite(array).all():
        raise ValueError(f"{list(values)} are not all finite: leave out the seeds of runs that diverged")
    return array


def _deviation(values: Float[np.ndarray, " N"], *, scale: float) -> float:
    """Return the standard deviation; 0 if the values agree up to the rounding of values of this size."""
    # Equal differences may differ in their last bits, and would then look like significant ones.
    return 0.0 if float(np.ptp(values)) <= ROUNDING * scale else float(values.std(ddof=1))


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: give a fraction between 0 and 1, such as 0.95")
