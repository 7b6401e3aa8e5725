"""The two-way table arms x seeds: noise pooled over arms, and arms that are noisier than the others.

    pool = pool_noise(values)                # NaN for a missing cell
    pool.variance, pool.degrees_of_freedom   # of one run

A value is modelled as an effect of its arm, an effect of its seed, which all arms share, and noise. Of a
complete table the residuals have (A - 1) (S - 1) degrees of freedom; of one with missing cells, the number of
values less the rank of the model: A + S less the number of connected parts of the table.

A: arms, S: seeds.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats

from slmjax.studies.statistics.samples import ROUNDING

NAMED_LEVEL = 0.05  # probability that any arm is called noisy, if all are equally noisy
APART_LEVEL = 0.05  # the same of a single arm, for setting it apart
CAP_LEVEL = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoWayFit:
    """The additive model of arms and seeds, fitted by least squares."""

    residuals: Float[np.ndarray, "A S"]  # NaN where there is no value
    sum_of_squares: float  # of the residuals; 0 where they are rounding
    degrees_of_freedom: int

    @property
    def variance(self) -> float | None:
        """Variance of one run; None without degrees of freedom."""
        return self.sum_of_squares / self.degrees_of_freedom if self.degrees_of_freedom else None


def fit_two_way(values: Float[np.ndarray, "A S"]) -> TwoWayFit:
    """Fit the additive model to a table, in which NaN is a missing value."""
    is_present = np.isfinite(values)
    if is_present.all() and values.size:
        # Of a complete table, least squares are means.
        residuals = values - values.mean(axis=1, keepdims=True) - values.mean(axis=0) + values.mean()
        degrees = (values.shape[0] - 1) * (values.shape[1] - 1)
    else:
        residuals, degrees = _fit_incomplete(values, is_present)
    present = residuals[is_present]
    scale = float(np.abs(values[is_present]).max(initial=0.0))
    # As in samples.py: equal differences may differ in their last bits, which is no noise.
    is_rounding = not present.size or float(np.abs(present).max()) <= ROUNDING * scale
    return TwoWayFit(
        residuals=residuals,
        sum_of_squares=0.0 if is_rounding or not degrees else float(np.square(present).sum()),
        degrees_of_freedom=degrees,
    )


def _fit_incomplete(
    values: Float[np.ndarray, "A S"], is_present: Bool[np.ndarray, "A S"]
) -> tuple[Float[np.ndarray, "A S"], int]:
    rows, columns = np.nonzero(is_present)
    num_arms = values.shape[0]
    design = np.zeros((len(rows), sum(values.shape)))
    design[np.arange(len(rows)), rows] = 1
    design[np.arange(len(rows)), num_arms + columns] = 1
    residuals = np.full(values.shape, np.nan)
    if not len(rows):
        return residuals, 0
    # Centred, so that large values lose no digits.
    centred = values[is_present] - values[is_present].mean()
    # Of minimum norm: arms and seeds share a constant in each connected part of the table.
    coefficients, _, rank, _ = np.linalg.lstsq(design, centred)
    residuals[is_present] = centred - design @ coefficients
    return residuals, len(rows) - int(rank)


def own_variances(values: Float[np.ndarray, "A S"], fit: TwoWayFit) -> Float[np.ndarray, " A"]:
    """Return the variance of one run of each arm, from its residuals; NaN where they show nothing.

    The sum of squares of an arm's residuals is divided by its expectation for noise of variance 1 in every
    arm, of a complete table (A - 1) (S - 1) / A. Residuals of an arm include some of the noise of the others.
    """
    counts = np.isfinite(values).sum(axis=1)
    total = counts.sum()
    # The degrees of freedom, by the share of the values that the arm has.
    degrees = np.where(counts > 1, fit.degrees_of_freedom * counts / max(total, 1), 0)
    sums = np.nansum(np.square(fit.residuals), axis=1)
    return np.divide(sums, degrees, out=np.full(len(values), np.nan), where=degrees > 0)


def brown_forsythe(residuals: Float[np.ndarray, "A S"]) -> float | None:
    """Return p of the Brown-Forsythe test that all arms are equally noisy; None if there is nothing to test.

    It is the F test of absolute deviations from each arm's median (Brown and Forsythe, 1974), here of
    residuals. With few seeds it rejects much more seldom than its level.
    """
    groups = [row[np.isfinite(row)] for row in residuals]
    groups = [group for group in groups if len(group) > 1]
    # The residuals of two arms are each other's negative.
    if len(groups) < 3:
        return None
    deviations = [np.abs(group - np.median(group)) for group in groups]
    if all(float(np.ptp(deviation)) == 0 for deviation in deviations):
        return None
    return float(stats.f_oneway(*deviations).pvalue)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PooledNoise:
    """The noise that arms have in common."""

    variance: float | None  # of one run; None without degrees of freedom
    degrees_of_freedom: int
    is_noisy: Bool[np.ndarray, " A"]  # noisier than the others, at `NAMED_LEVEL` for all arms together
    is_apart: Bool[np.ndarray, " A"]  # these, and arms that may be, at `APART_LEVEL` for each


def pool_noise(values: Float[np.ndarray, "A S"]) -> PooledNoise:
    """Return the pooled noise of a table, and the arms that it does not describe.

    Leaving an arm out of the table lowers the sum of squares of the residuals. For equal and normal noise,
    this part and the rest are independent, and their ratio per degree of freedom has an F distribution. The
    noisiest arm, if its p is at most `NAMED_LEVEL` over the number of arms, is noisy and left out, and the
    next one is looked for among the others. Two arms remain at least, since their residuals are each other's
    negative. The Brown-Forsythe test cannot name arms: with three seeds it notices a fourfold deviation in
    1 % of studies, this test in 60 %.

    Arms are set apart because the data look so, which has two consequences. All shares are of 9 arms without
    an effect, from `benchmarks/verdicts.py`.

    A noisy arm that does not look so is judged by too small a variance. Naming few arms wrongly is the wrong
    aim here: every arm that exceeds the others at `APART_LEVEL` by itself is set apart. This costs 4 of 57 %
    of power with three seeds, and no false verdict.

    The rest looks less noisy than it is if arms of the same noise are left out for their large values. So an
    arm that is set apart counts in the pooled variance, but with no more than the upper `CAP_LEVEL` point of
    the F distribution, as large as equal noise makes it only once in a hundred tables (as in a Winsorized
    variance).

    With one arm of fourfold noise, 5 % of studies with three seeds then have a false verdict, and 2 % with
    five (7 % and 4 % by the larger variance alone). A baseline of fourfold noise, which all comparisons
    share, leaves 9 % with three seeds, 3 % with five: two degrees of freedom cannot show its noise.
    """
    everything = fit_two_way(values)
    is_noisy = _named(values)
    rest = np.flatnonzero(~is_noisy)
    is_apart = is_noisy.copy()
    # Against the arms that are not noisy, since noisy ones would hide each other.
    is_apart[rest] = excess_noise(values[rest]) <= APART_LEVEL
    if (~is_apart).sum() < 2:
        is_apart = is_noisy.copy()
    pool = fit_two_way(values[~is_apart])
    variance = pool.variance
    left_out = everything.degrees_of_freedom - pool.degrees_of_freedom
    if variance and everything.variance and left_out > 0:
        cap = float(stats.f.isf(CAP_LEVEL, left_out / is_apart.sum(), pool.degrees_of_freedom))
        capped = pool.sum_of_squares + left_out * cap * variance
        # No more than what there is.
        variance = min(capped / everything.degrees_of_freedom, everything.variance)
    return PooledNoise(
        variance=variance,
        degrees_of_freedom=pool.degrees_of_freedom,
        is_noisy=is_noisy,
        is_apart=is_apart,
    )


def _named(values: Float[np.ndarray, "A S"]) -> Bool[np.ndarray, " A"]:
    is_noisy = np.zeros(len(values), bool)
    while (remaining := np.flatnonzero(~is_noisy)).size > 2:
        p_values = excess_noise(values[remaining])
        least = int(np.argmin(p_values))
        if p_values[least] > NAMED_LEVEL / len(remaining):
            break
        is_noisy[remaining[least]] = True
    return is_noisy


def excess_noise(values: Float[np.ndarray, "A S"]) -> Float[np.ndarray, " A"]:
    """Return p of the F test that each arm is no noisier than the others; 1 where it cannot be made."""
    num = len(values)
    if num < 3:
        return np.ones(num)
    whole = fit_two_way(values)
    if np.isfinite(values).all():
        # The contrast of an arm and the mean of the others has all of its residuals.
        excess = np.square(whole.residuals).sum(axis=1) * num / (num - 1)
        degrees = np.full(num, values.shape[1] - 1)
    else:
        others = [fit_two_way(np.delete(values, arm, axis=0)) for arm in range(num)]
        excess = np.array([whole.sum_of_squares - other.sum_of_squares for other in others])
        degrees = np.array([whole.degrees_of_freedom - other.degrees_of_freedom for other in others])
    rest = whole.sum_of_squares - excess
    rest_degrees = whole.degrees_of_freedom - degrees
    # Nothing is noisier than arms whose noise is all of the noise there is, up to rounding.
    can_test = (degrees > 0) & (rest_degrees > 0) & (rest > ROUNDING * whole.sum_of_squares)
    ratio = np.divide(excess * rest_degrees, rest * degrees, out=np.zeros(num), where=can_test & (excess > 0))
    return np.where(can_test, stats.f.sf(ratio, np.maximum(degrees, 1), np.maximum(rest_degrees, 1)), 1.0)
