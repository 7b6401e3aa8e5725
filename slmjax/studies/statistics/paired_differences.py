"""Paired differences of the arms of a table, with their errors and tests.

    values = paired_values(table, "wide", "base")
    estimate = estimate_difference(values, noise, rules, by_own=False)

S: seeds that both arms have.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Float
from scipy import special

from slmjax.studies.statistics.results_table import Rules, Table, VarianceRule, VarianceSource
from slmjax.studies.statistics.samples import ROUNDING
from slmjax.studies.statistics.two_way import PooledNoise


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedValues:
    """The differences of two arms with the seeds that both have."""

    differences: Float[np.ndarray, " S"]
    seeds: tuple[int, ...]
    imputed: tuple[int, ...]  # of these: one arm has diverged
    scale: float  # largest absolute value of both arms, which determines the rounding of differences


def paired_values(table: Table, arm: str, against: str, *, lower_is_better: bool = True) -> PairedValues:
    """Return the differences of two arms by seed, with the worst value for an arm that diverged.

    The value of a diverged run is not known. The worst that either arm has with any seed stands for it: this
    is never better than the other arm's value with that seed, so that an arm does not improve by losing
    a seed. Values of further arms are not used, since one that is far worse would add noise to this pair. A
    seed with which both arms have diverged says nothing about their difference, and is left out.
    """
    rows = [table.arms.index(name) for name in (arm, against)]
    both = table.values[rows]
    diverged = table.diverged[rows]
    observed = both[np.isfinite(both)]
    if observed.size:
        worst = observed.max() if lower_is_better else observed.min()
        both = np.where(diverged & ~diverged.all(axis=0), worst, both)
    used = np.flatnonzero(np.isfinite(both).all(axis=0)).tolist()
    return PairedValues(
        differences=both[0, used] - both[1, used],
        seeds=tuple(table.seeds[i] for i in used),
        imputed=tuple(table.seeds[i] for i in used if diverged[:, i].any()),
        scale=float(np.abs(observed).max(initial=0.0)),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean difference and its error."""

    values: PairedValues
    mean: float
    error: float  # standard error of the mean; 0 if the noise is not known
    degrees: int  # of freedom, of the error
    variance: VarianceSource  # what the error comes from
    pooled_arms: int  # whose noise the degrees of freedom come from; 2 for the pair's own

    @property
    def deviation(self) -> float:
        """Standard deviation of one pair's difference."""
        return self.error * math.sqrt(len(self.values.differences))


def estimate_difference(
    values: PairedValues, noise: PooledNoise, rules: Rules, *, by_own: bool
) -> Estimate | None:
    """Return the mean difference with its error by `rules.variance`; None with fewer than two seeds.

    The pooled variance of a difference is twice that of one run. `by_own` is for pairs with an arm that the
    pooled noise does not describe. If all differences are equal up to rounding, the noise is not known
    rather than zero, and neither is the error.
    """
    num = len(values.differences)
    if num < 2:
        return None
    mean = float(values.differences.mean())
    # As in `paired_difference`.
    own = float(values.differences.var(ddof=1))
    source = VarianceSource.OWN_UNEQUAL if by_own else VarianceSource.OWN
    if float(np.ptp(values.differences)) <= ROUNDING * values.scale:
        own = 0.0
    elif not by_own and rules.variance is not VarianceRule.OWN and noise.variance:
        return _by_pooled(values, 2 * noise.variance, noise, rules, own=own)
    return Estimate(
        values=values,
        mean=mean,
        error=math.sqrt(own / num),
        degrees=num - 1,
        variance=source,
        pooled_arms=2,
    )


def _by_pooled(
    values: PairedValues, pooled: float, noise: PooledNoise, rules: Rules, *, own: float
) -> Estimate:
    """Return the estimate by the pooled variance of a difference, or by the larger of that and the own."""
    num = len(values.differences)
    # Of two arms alone the residuals are their differences, and both variances one, up to rounding.
    is_same = noise.degrees_of_freedom == num - 1 and math.isclose(own, pooled, rel_tol=1e-9)
    if is_same:
        source = VarianceSource.OWN
    elif rules.variance is VarianceRule.POOLED or own <= pooled:
        source = VarianceSource.POOLED
    else:
        source = VarianceSource.OWN_LARGER
    return Estimate(
        values=values,
        mean=float(values.differences.mean()),
        error=math.sqrt((pooled if source is VarianceSource.POOLED else own) / num),
        degrees=noise.degrees_of_freedom,
        variance=source,
        pooled_arms=max(2, int((~noise.is_apart).sum())),
    )


def difference_p(estimate: Estimate | None) -> float:
    """Return p of the two-sided t test that the mean is zero; 1 if it cannot be made."""
    if estimate is None or estimate.error == 0:
        return 1.0
    return float(2 * special.stdtr(estimate.degrees, -abs(estimate.mean) / estimate.error))


def equality_p(estimate: Estimate | None, margin: float | None) -> float:
    """Return the larger p of two one-sided t tests that the difference is the margin or more, else 1.

    Schuirmann (1987). A run that diverged is worse by an unknown amount than the value that stands for it,
    which therefore shows no equality.
    """
    if estimate is None or margin is None or estimate.error == 0 or estimate.values.imputed:
        return 1.0
    return float(special.stdtr(estimate.degrees, (abs(estimate.mean) - margin) / estimate.error))
