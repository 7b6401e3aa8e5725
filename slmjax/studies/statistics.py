"""Statistics of few seeds: summaries, paired differences with intervals, Holm's correction, verdicts.

    difference = paired_difference([1.41, 1.43, 1.40], [1.45, 1.46, 1.45])   # an arm minus the other
    (adjusted,) = holm([difference.p_value])
    verdict = decide(difference.mean, adjusted)                              # Verdict.BETTER

Seeds are paired: both arms of a pair have had the same initial random key and the same order of the data, and
what the pair shares drops out of the difference. All figures are float64; intervals are of one comparison, by
itself. N: values, one for each seed.
"""

import dataclasses
import enum
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

MAX_ENUMERATED = 50_000  # resamples: up to 6 pairs, 6**6 = 46,656
NUM_DRAWS = 10_000
# relative to the figures: differences that agree to this are equal
ROUNDING = 16 * float(np.finfo(np.float64).eps)

Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """Figures of one arm over its seeds."""

    num_values: int
    mean: float
    standard_deviation: float | None  # of one seed, with n - 1 below; None where there is but one
    standard_error: float | None  # of the mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """One arm minus another, seed by seed."""

    num_pairs: int
    mean: float
    standard_deviation: float  # of one pair's difference, with n - 1 below
    standard_error: float  # of the mean
    p_value: float  # two-sided, of the paired t test that the mean is zero
    t_interval: Interval
    bootstrap_interval: Interval

    @property
    def has_noise(self) -> bool:
        """Whether the differences differ at all: if not, the seeds changed nothing, and no test can be
        made.
        """
        return self.standard_error > 0


def summarize(values: Sequence[float]) -> Summary:
    """Mean and spread of figures, one for each seed.

    Raises:
      ValueError: there is none, or one is not finite.
    """
    array = _finite(values)
    if not len(array):
        raise ValueError("there is no figure to summarize: at least one seed must have finished")
    if len(array) == 1:
        return Summary(num_values=1, mean=float(array[0]), standard_deviation=None, standard_error=None)
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
    """The mean of `values` minus `others`, with its noise; element i of both is of the same seed.

    The t interval and the p value take the differences to be about normal. The bootstrap interval does not
    (`bootstrap_interval`).
    Where all differences are equal, up to rounding, the noise is unknown rather than nought: intervals then
    have no width and p is 1, whatever the mean, so that no verdict comes of it.

    Args:
      values: figures of an arm.
      others: figures of the arm that it is compared with.
      confidence: what share of such intervals holds the true mean.
      seed: of the bootstrap's draws, where resamples are too many to enumerate.

    Raises:
      ValueError: the lengths differ, there are fewer than two pairs, or a figure is not finite.
    """
    first = _finite(values)
    second = _finite(others)
    if len(first) != len(second):
        raise ValueError(
            f"{len(first)} and {len(second)} figures do not make pairs: give one of each arm for every seed"
        )
    num_pairs = len(first)
    if num_pairs < 2:
        raise ValueError(f"{num_pairs} pairs say nothing of the noise: train at least 2 seeds of both arms")
    _check_confidence(confidence)
    differences = first - second
    mean = float(differences.mean())
    deviation = _deviation(differences, scale=float(np.abs([first, second]).max()))
    error = deviation / math.sqrt(num_pairs)
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
    reach = float(stats.t.ppf((1 + confidence) / 2, num_pairs - 1)) * error
    return PairedDifference(
        num_pairs=num_pairs,
        mean=mean,
        standard_deviation=deviation,
        standard_error=error,
        p_value=float(2 * stats.t.sf(abs(mean) / error, num_pairs - 1)),
        t_interval=(mean - reach, mean + reach),
        bootstrap_interval=bootstrap_interval(differences.tolist(), confidence=confidence, seed=seed),
    )


def bootstrap_interval(values: Sequence[float], *, confidence: float = 0.95, seed: int = 0) -> Interval:
    """The percentile bootstrap interval of the mean: quantiles of the means of resamples with replacement
    (Efron, 1979).

    Up to 6 values, all n**n resamples are enumerated and nothing is left to chance; above, there are 10,000
    draws of a seeded generator.
    Percentiles were taken over BCa, whose two corrections are estimated from the same few values: with three,
    they are noise.

    With few values the interval is too narrow, and only indicative. Of 3 values, the lowest of 27 resamples,
    all three the smallest, has more than 2.5% of the weight: the 95% interval goes from the smallest value to
    the largest, and holds the centre of a symmetric distribution three times in four.

    Raises:
      ValueError: there are fewer than two values, or one is not finite.
    """
    array = _finite(values)
    if (num := len(array)) < 2:
        raise ValueError(f"{num} values cannot be resampled: give at least 2")
    _check_confidence(confidence)
    return percentile_interval(array[resamples(num, seed=seed)].mean(axis=1), confidence=confidence)


def resamples(num: int, *, seed: int = 0) -> Int[np.ndarray, "R N"]:
    """R samples with replacement from N values, by place: all n**n of them up to 6 values, above 10,000 draws
    of a seeded generator.
    """
    if num**num <= MAX_ENUMERATED:
        return np.indices((num,) * num).reshape(num, -1).T
    return np.random.default_rng(seed).integers(num, size=(NUM_DRAWS, num))


def percentile_interval(values: Float[np.ndarray, " R"], *, confidence: float) -> Interval:
    """From the quantile that leaves half of 1 - confidence below it to the one that leaves as much above."""
    tail = (1 - confidence) / 2
    # The quantile of a step function, taken from both ends alike: turning the values over turns the interval
    # over.
    low = np.quantile(values, tail, method="inverted_cdf")
    high = -np.quantile(-values, tail, method="inverted_cdf")
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Adjusted p values of a family of tests, in the order given (Holm, 1979).

    Rejecting those up to 0.05 keeps the chance of one false rejection or more, in the whole family, at 0.05
    at most, however the tests depend on each other. The smallest of m is multiplied by m, the next by m - 1,
    and so on; none is below one before it, nor above 1.

    Raises:
      ValueError: a p value is not between 0 and 1.
    """
    for value in p_values:
        if not 0 <= value <= 1:
            raise ValueError(f"{value} is no p value: it must be between 0 and 1")
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for place, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[i]))
        adjusted[i] = largest
    return tuple(adjusted)


class Verdict(enum.Enum):
    """What a comparison has shown. "Not resolved" is not "equal": the difference may be as large as its
    interval allows.
    """

    BETTER = "better"
    WORSE = "worse"
    NOT_RESOLVED = "not resolved"


def decide(mean: float, adjusted_p: float, *, lower_is_better: bool = True, level: float = 0.05) -> Verdict:
    """The verdict on an arm from the mean of its difference to another arm and the adjusted p value of that
    difference.
    """
    if not adjusted_p <= level or mean == 0:
        return Verdict.NOT_RESOLVED
    return Verdict.BETTER if (mean < 0) is lower_is_better else Verdict.WORSE


def _finite(values: Sequence[float]) -> Float[np.ndarray, " N"]:
    array = np.asarray(values, dtype=np.float64).reshape(-1)
    if not np.isfinite(array).all():
        raise ValueError(f"{list(values)} are not all finite: leave out the seeds of runs that diverged")
    return array


def _deviation(values: Float[np.ndarray, " N"], *, scale: float) -> float:
    """The standard deviation; 0 where the values agree up to the rounding of figures of this size."""
    return 0.0 if float(np.ptp(values)) <= ROUNDING * scale else float(values.std(ddof=1))


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: give a share between 0 and 1, such as 0.95")
