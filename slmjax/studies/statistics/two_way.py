"""The two-way table arms x seeds: noise pooled over arms, and arms that are noisier than the others.

    fit = fit_two_way(values)              # NaN for a missing cell
    fit.variance, fit.degrees_of_freedom   # of one run

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

NOISY_LEVEL = 0.05  # of the tests that name noisy arms, over all arms


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


def noisy_arms(values: Float[np.ndarray, "A S"], *, level: float = NOISY_LEVEL) -> Bool[np.ndarray, " A"]:
    """Return which arms are noisier than the others.

    Leaving an arm out of the table lowers the sum of squares of the residuals. For equal and normal noise,
    this part and the rest are independent, and their ratio per degree of freedom has an F distribution. The
    arm with the smallest p, if that is at most `level` over the number of arms, is named and left out, and
    the next one is looked for among the others. With fewer than three arms there is no rest to compare with.
    """
    is_noisy = np.zeros(len(values), bool)
    while (remaining := np.flatnonzero(~is_noisy)).size > 2:
        p_values = _excess_noise(values[remaining])
        least = int(np.argmin(p_values))
        if not p_values[least] <= level / len(remaining):
            break
        is_noisy[remaining[least]] = True
    return is_noisy


def _excess_noise(values: Float[np.ndarray, "A S"]) -> Float[np.ndarray, " A"]:
    """Return p of the F test that each arm is no noisier than the others; 1 where it cannot be made."""
    whole = fit_two_way(values)
    p_values = np.ones(len(values))
    for arm in range(len(values)):
        rest = fit_two_way(np.delete(values, arm, axis=0))
        degrees = whole.degrees_of_freedom - rest.degrees_of_freedom
        excess = whole.sum_of_squares - rest.sum_of_squares
        if rest.sum_of_squares > 0 and degrees > 0 and excess > 0:
            ratio = excess / degrees / (rest.sum_of_squares / rest.degrees_of_freedom)
            p_values[arm] = stats.f.sf(ratio, degrees, rest.degrees_of_freedom)
    return p_values
