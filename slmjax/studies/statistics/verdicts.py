"""Verdicts: paired comparisons of a table of results, judged by rules that were fixed beforehand.

    judged = judge(table, [("wide", "base")], rules)
    judged.comparisons[0].verdict                                # Verdict.BETTER

Everything here is a function of the numbers in the table. A: arms, S: seeds.
"""

import dataclasses
import enum
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

from slmjax.studies.statistics.power import seeds_for_equality, seeds_needed
from slmjax.studies.statistics.results_table import Rules, Table, VarianceRule
from slmjax.studies.statistics.samples import (
    ROUNDING,
    Interval,
    bootstrap_interval,
    holm,
    holm_with_equality,
)
from slmjax.studies.statistics.two_way import brown_forsythe, fit_two_way, noisy_arms, own_variances


class Verdict(enum.Enum):
    """Result of a comparison. "Not resolved" is not "equal": its interval may allow a large difference."""

    BETTER = "better"
    WORSE = "worse"
    EQUAL = "equal"  # within a margin that was stated beforehand
    NOT_RESOLVED = "not resolved"


def decide(mean: float, adjusted_p: float, *, lower_is_better: bool = True, level: float = 0.05) -> Verdict:
    """Return the verdict on an arm from its mean difference to another arm and the adjusted p value."""
    # Written as `not <=`, so that NaN resolves nothing.
    if not adjusted_p <= level or mean == 0:
        return Verdict.NOT_RESOLVED
    return Verdict.BETTER if (mean < 0) is lower_is_better else Verdict.WORSE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise:
    """The noise between seeds, by the two-way table arms x seeds."""

    deviation: float | None  # pooled, of one run; None where no two arms have two seeds in common
    degrees_of_freedom: int
    own: dict[str, float]  # of one run of each arm: of its residuals in the table
    noisy: tuple[str, ...]  # arms that the pooled deviation leaves out, and that are judged by their own
    equality_p: float | None  # Brown-Forsythe test that all arms are equally noisy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement:
    """One arm minus another, and what follows."""

    arm: str
    against: str
    seeds: tuple[int, ...]  # paired
    imputed: tuple[int, ...]  # of these: one arm has diverged, and the worst value stands for it
    difference: float  # mean over seeds
    standard_error: float
    degrees_of_freedom: float
    variance: str  # which deviation the standard error comes from: "own" or "pooled"
    interval: Interval  # of this comparison alone
    bootstrap_interval: Interval
    p_value: float  # two-sided, that the mean is zero
    adjusted_p: float  # over all comparisons: by Holm, or with a margin by `holm_with_equality`
    equal_p: float | None  # larger p of the two one-sided tests against the margin; None without a margin
    adjusted_equal_p: float | None  # over all comparisons
    verdict: Verdict
    seeds_needed: int | None  # to resolve what is not resolved, if the difference stays as it is


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """The comparisons of a table, with the noise that they were judged by."""

    noise: Noise
    comparisons: tuple[Judgement | None, ...]  # None for a pair with fewer than two seeds
    level: float  # significance level spent at this look
    look: int | None  # number of seeds of the look that counts; None without fixed looks


def judge(table: Table, pairs: Sequence[tuple[str, str]], rules: Rules) -> Judged:
    """Judge comparisons of arms by paired t tests with a common noise.

    The variance of a pair's difference is `rules.variance` of the pair's own and that of the residuals of the
    two-way table arms x seeds, pooled over the arms of `pairs`. Arms that are noisier than the others are
    left out of the pool, and their pairs are judged by their own differences alone. The p values of all pairs
    are one family, with p = 1 for those that cannot be judged.

    A seed with which one arm of a pair has diverged counts with the worst value of both arms for that arm, so
    that an arm does not improve by losing a seed. A seed with which both have diverged says nothing about the
    difference of their losses.

    A pair has no verdict if it has fewer than two seeds, or if its differences are all equal up to rounding:
    its noise is then unknown.

    Args:
      table: one metric; NaN where there is no value.
      pairs: (arm, the arm that it is compared with).
      rules: fixed beforehand.

    Raises:
      ValueError: the table has no arm of a name, or a pair has the same arm twice.
    """
    level = 1 - rules.confidence
    arms = _arms_of(table, pairs)
    values = table.values[arms]
    noise, is_noisy = _noise([table.arms[i] for i in arms], values)
    position = {table.arms[arm]: i for i, arm in enumerate(arms)}
    estimates = []
    for arm, against in pairs:
        own_only = bool(is_noisy[[position[arm], position[against]]].any())
        differences = paired_values(table, arm, against, lower_is_better=rules.lower_is_better)
        estimates.append(_estimate(differences, noise, rules, own_only=own_only))
    p_values = [_p_value(estimate) for estimate in estimates]
    equal_p = [_equal_p(estimate, rules.equal_within) for estimate in estimates]
    if rules.equal_within is None:
        adjusted = holm(p_values)
        adjusted_equal = (1.0,) * len(pairs)
    else:
        adjusted, adjusted_equal = holm_with_equality(p_values, equal_p)
    comparisons = tuple(
        None
        if estimate is None
        else _judgement(
            pair,
            estimate,
            rules,
            p_value=p_values[i],
            adjusted_p=adjusted[i],
            equal_p=equal_p[i],
            adjusted_equal=adjusted_equal[i],
            comparisons=len(pairs),
            arms=len(arms) - len(noise.noisy),
            level=level,
        )
        for i, (pair, estimate) in enumerate(zip(pairs, estimates, strict=True))
    )
    return Judged(noise=noise, comparisons=comparisons, level=level, look=None)


# Noise and differences --------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedValues:
    """The differences of two arms with the seeds that both have."""

    differences: Float[np.ndarray, " S"]
    seeds: tuple[int, ...]
    imputed: tuple[int, ...]
    scale: float  # largest value, which determines the rounding of the differences


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Estimate:
    """A mean difference and its error."""

    values: PairedValues
    mean: float
    error: float  # 0 if the noise is unknown
    degrees: float
    variance: str


def paired_values(table: Table, arm: str, against: str, *, lower_is_better: bool = True) -> PairedValues:
    """Return the differences of two arms by seed, with the worst value of both for an arm that diverged.

    Any value that the diverged run could have had is unknown. The worst that either arm has in the table is
    never better than the value of the other arm with that seed, and it stays in the range of the pair:
    values of other arms, which may be far worse, are not used.
    """
    first = table.row(arm)
    second = table.row(against)
    both = np.stack([first, second])
    diverged = np.stack([table.diverged[table.arms.index(name)] for name in (arm, against)])
    observed = both[np.isfinite(both)]
    if observed.size:
        worst = observed.max() if lower_is_better else observed.min()
        # If both have diverged, neither is the worse one.
        both = np.where(diverged & ~diverged.all(axis=0), worst, both)
    used = np.flatnonzero(np.isfinite(both).all(axis=0)).tolist()
    return PairedValues(
        differences=both[0, used] - both[1, used],
        seeds=tuple(table.seeds[i] for i in used),
        imputed=tuple(table.seeds[i] for i in used if diverged[:, i].any()),
        scale=float(np.abs(observed).max(initial=0.0)),
    )


def _arms_of(table: Table, pairs: Sequence[tuple[str, str]]) -> Int[np.ndarray, " A"]:
    """Return the rows of the arms that are compared; others do not add to the noise."""
    for pair in pairs:
        for arm in pair:
            if arm not in table.arms:
                raise ValueError(f"{arm!r} is no arm of the table: name one of {', '.join(table.arms)}")
        if pair[0] == pair[1]:
            raise ValueError(f"{pair[0]!r} cannot be compared with itself: name two arms")
    compared = {arm for pair in pairs for arm in pair}
    return np.array([i for i, arm in enumerate(table.arms) if arm in compared], dtype=np.int64)


def _noise(names: Sequence[str], values: Float[np.ndarray, "A S"]) -> tuple[Noise, Bool[np.ndarray, " A"]]:
    is_noisy = noisy_arms(values)
    everything = fit_two_way(values)
    pool = fit_two_way(values[~is_noisy])
    own = own_variances(values, everything)
    return Noise(
        deviation=None if pool.variance is None else math.sqrt(pool.variance),
        degrees_of_freedom=pool.degrees_of_freedom,
        own={name: math.sqrt(value) for name, value in zip(names, own, strict=True) if not math.isnan(value)},
        noisy=tuple(name for name, flag in zip(names, is_noisy, strict=True) if flag),
        equality_p=brown_forsythe(everything.residuals),
    ), is_noisy


def _estimate(values: PairedValues, noise: Noise, rules: Rules, *, own_only: bool) -> _Estimate | None:
    """Return the mean difference with its error by the rule; None with fewer than two seeds."""
    num = len(values.differences)
    if num < 2:
        return None
    has_noise = float(np.ptp(values.differences)) > ROUNDING * values.scale
    own = float(values.differences.var(ddof=1)) if has_noise else 0.0
    pooled = 2 * noise.deviation**2 if noise.deviation is not None else 0.0
    variance = own
    degrees = num - 1
    # A pair in which no noise shows stays without a verdict, whatever the noise of the others.
    if has_noise and not own_only and rules.variance is not VarianceRule.OWN and pooled > 0:
        degrees = noise.degrees_of_freedom
        variance = pooled if rules.variance is VarianceRule.POOLED else max(own, pooled)
    return _Estimate(
        values=values,
        mean=float(values.differences.mean()),
        error=math.sqrt(variance / num),
        degrees=degrees,
        variance="own" if variance == own else "pooled",
    )


# Tests ------------------------------------------------------------------------------------------------------
def _p_value(estimate: _Estimate | None) -> float:
    """Return the two-sided p of a mean of zero."""
    if estimate is None or estimate.error == 0:
        return 1.0
    return float(2 * stats.t.sf(abs(estimate.mean) / estimate.error, estimate.degrees))


def _equal_p(estimate: _Estimate | None, margin: float | None) -> float:
    """Return the larger p of the two one-sided tests that the difference is at least the margin."""
    if estimate is None or margin is None or estimate.error == 0:
        return 1.0
    return float(stats.t.sf((margin - abs(estimate.mean)) / estimate.error, estimate.degrees))


def _judgement(
    pair: tuple[str, str],
    estimate: _Estimate,
    rules: Rules,
    *,
    p_value: float,
    adjusted_p: float,
    equal_p: float,
    adjusted_equal: float,
    comparisons: int,
    arms: int,
    level: float,
) -> Judgement:
    if adjusted_equal <= level:
        # A difference within the margin counts as none, also where it is not zero.
        verdict = Verdict.EQUAL
    else:
        verdict = decide(estimate.mean, adjusted_p, lower_is_better=rules.lower_is_better, level=level)
    half_width = float(stats.t.isf(level / 2, estimate.degrees)) * estimate.error
    pooled_arms = arms if estimate.degrees > len(estimate.values.differences) - 1 else 2
    return Judgement(
        arm=pair[0],
        against=pair[1],
        seeds=estimate.values.seeds,
        imputed=estimate.values.imputed,
        difference=estimate.mean,
        standard_error=estimate.error,
        degrees_of_freedom=estimate.degrees,
        variance=estimate.variance,
        interval=(estimate.mean - half_width, estimate.mean + half_width),
        bootstrap_interval=bootstrap_interval(
            estimate.values.differences.tolist(), confidence=rules.confidence
        ),
        p_value=p_value,
        adjusted_p=adjusted_p,
        equal_p=None if rules.equal_within is None else equal_p,
        adjusted_equal_p=None if rules.equal_within is None else adjusted_equal,
        verdict=verdict,
        seeds_needed=_seeds_needed(estimate, rules, comparisons=comparisons, arms=pooled_arms, level=level)
        if verdict is Verdict.NOT_RESOLVED
        else None,
    )


def _seeds_needed(
    estimate: _Estimate, rules: Rules, *, comparisons: int, arms: int, level: float
) -> int | None:
    """Return the seeds that would resolve the difference as it is, or show that it is within the margin."""
    if estimate.error == 0:
        return None
    deviation = estimate.error * math.sqrt(len(estimate.values.differences))
    effect = abs(estimate.mean)
    needed = [seeds_needed(effect, deviation, comparisons=comparisons, arms=arms, level=level)]
    if rules.equal_within is not None:
        needed.append(
            seeds_for_equality(
                rules.equal_within,
                deviation,
                effect=effect,
                comparisons=comparisons,
                arms=arms,
                level=level,
            )
        )
    known = [num for num in needed if num is not None]
    return min(known) if known else None
