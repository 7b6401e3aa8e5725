"""Verdicts: paired comparisons of a table of results, judged by rules that were fixed beforehand.

    judged = judge(table, [("wide", "base")], rules)
    judged.comparisons[0].verdict                                # Verdict.BETTER

Everything here is a function of the numbers in the table. A: arms, S: seeds.
"""

import dataclasses
import enum
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from scipy import stats

from slmjax.config import added_field
from slmjax.studies.statistics.paired_differences import (
    Estimate,
    difference_p,
    equality_p,
    estimate_difference,
    paired_values,
)
from slmjax.studies.statistics.power import smallest_resolved
from slmjax.studies.statistics.power_of_rules import (
    level_of_test,
    seeds_that_resolve,
    seeds_that_show_equality,
)
from slmjax.studies.statistics.results_table import Correction, Rules, Table, VarianceSource
from slmjax.studies.statistics.samples import (
    Interval,
    bootstrap_interval,
    holm,
    holm_with_equality,
)
from slmjax.studies.statistics.sequential import nominal_levels, sequential_p_value
from slmjax.studies.statistics.two_way import (
    PooledNoise,
    brown_forsythe,
    fit_two_way,
    own_variances,
    pool_noise,
)


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
    noisy: tuple[str, ...]  # noisier than the others; 5 % of tables with equal noise have any such arm
    equality_p: float | None  # Brown-Forsythe test that all arms are equally noisy
    apart: tuple[str, ...] = ()  # noisy arms, and those that may be: judged by their own differences


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement:
    """One arm minus another, and what follows."""

    arm: str
    against: str
    seeds: tuple[int, ...]  # paired
    imputed: tuple[int, ...]  # of these: one arm has diverged, and the worst value stands for it
    difference: float  # mean over seeds
    standard_error: float
    degrees_of_freedom: float  # of the test
    variance: VarianceSource  # what the standard error comes from
    interval: Interval  # of this comparison alone
    bootstrap_interval: Interval
    p_value: float  # two-sided, that the mean is zero, at this look
    # of the difference, over all comparisons by `Rules.correction`, and over all looks so far
    adjusted_p: float
    # of equality: the larger p of the two one-sided tests against the margin; None without a margin
    equal_p: float | None
    adjusted_equal_p: float | None  # of equality, over all comparisons and looks, as `adjusted_p`
    verdict: Verdict
    # that resolve what is not resolved, 4 times in 5, if the difference stays as it is; of fixed looks the
    # first that does. None if over 1,000, if no look is left that does, or if the noise is not known
    seeds_needed: int | None
    # true difference that these seeds resolve 4 times in 5; None if the noise is not known, and before the
    # first look
    smallest_resolved: float | None = added_field(None, before=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """The comparisons of a table, with the noise that they were judged by."""

    noise: Noise
    comparisons: tuple[Judgement | None, ...]  # None for a pair with fewer than two seeds
    level: float  # of a single test at this look (before the first, at that); without looks 1 - confidence
    look: int | None  # number of seeds of the latest look, 0 before the first; None without fixed looks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assessed:
    """The tests of all comparisons, and their verdicts."""

    table: Table  # of the look
    pool: PooledNoise
    level: float
    look: int | None
    estimates: tuple[Estimate | None, ...]
    p_values: tuple[float, ...]
    equal_p: tuple[float, ...]  # 1 without a margin
    adjusted: tuple[float, ...]
    adjusted_equal: tuple[float, ...]
    verdicts: tuple[Verdict, ...]


def judge(table: Table, pairs: Sequence[tuple[str, str]], rules: Rules) -> Judged:
    """Judge comparisons of arms by paired t tests with a common noise.

    The variance of a pair's difference is `rules.variance` of the pair's own and that of the residuals of the
    two-way table arms x seeds, pooled over the arms of `pairs`. Pairs with an arm that is noisier than the
    others, or may be, are judged by their own differences alone (`pool_noise`). The p values of all pairs are
    one family, with p = 1 for those that cannot be judged: the probability of any false verdict is at most
    1 - confidence.

    A seed with which one arm of a pair has diverged counts with the worst value of both arms for that arm
    (`paired_values`), and the pair is not called equal. A pair has no verdict if it has fewer than two seeds,
    or if its differences are all equal up to rounding: its noise is then not known.

    With fixed looks, only the first seeds count, as many as the latest look has, of those with which every
    arm has a value or has diverged. A verdict of an earlier look stands (`sequential_p_value`), unless the
    difference has changed its sign since. Intervals are repeated ones, of the level at the look. An arm that
    has neither values nor divergence is not waited for.

    Args:
      table: one metric; NaN where there is no value.
      pairs: (arm, the arm that it is compared with).
      rules: fixed beforehand.

    Raises:
      ValueError: the table has no arm of a name, or a pair has the same arm twice.
    """
    assessed = assess(table, pairs, rules)
    return Judged(
        noise=_noise(assessed.table, assessed.pool),
        comparisons=tuple(
            None if estimate is None else _judgement(assessed, i, estimate, pairs, rules)
            for i, estimate in enumerate(assessed.estimates)
        ),
        level=assessed.level,
        look=assessed.look,
    )


def assess(table: Table, pairs: Sequence[tuple[str, str]], rules: Rules) -> Assessed:
    """Test and judge comparisons as `judge` does, without intervals and what further seeds would show."""
    arms = _arms_of(table, pairs)
    compared = _part(table, arms, range(len(table.seeds)))
    if not rules.looks:
        return _assess_look(compared, pairs, rules)
    complete = _complete_seeds(compared)
    reached = [look for look in rules.looks if look <= len(complete)]
    # The values so far are shown, but nothing may be concluded from them.
    if not reached:
        early = _assess_look(compared, pairs, rules)
        ones = (1.0,) * len(pairs)
        return dataclasses.replace(
            early,
            level=_nominal(rules)[0],
            look=0,
            adjusted=ones,
            adjusted_equal=ones,
            verdicts=(Verdict.NOT_RESOLVED,) * len(pairs),
        )
    everything = range(len(compared.arms))
    looks = [_assess_look(_part(compared, everything, complete[:look]), pairs, rules) for look in reached]
    return _assess_looks(looks, rules)


def _assess_look(table: Table, pairs: Sequence[tuple[str, str]], rules: Rules) -> Assessed:
    pool = pool_noise(table.values)
    apart = {arm for arm, flag in zip(table.arms, pool.is_apart.tolist(), strict=True) if flag}
    estimates = [
        estimate_difference(
            paired_values(table, arm, against, lower_is_better=rules.lower_is_better),
            pool,
            rules,
            by_own=arm in apart or against in apart,
        )
        for arm, against in pairs
    ]
    return _with_verdicts(
        table,
        pool,
        tuple(estimates),
        rules,
        p_values=[difference_p(estimate) for estimate in estimates],
        equal_p=[equality_p(estimate, rules.equal_within) for estimate in estimates],
    )


def _assess_looks(looks: Sequence[Assessed], rules: Rules) -> Assessed:
    """Combine the looks so far: p values of the whole design, and estimates of the latest look."""
    latest = looks[-1]
    sequential = []
    sequential_equal = []
    for i, estimate in enumerate(latest.estimates):
        # Looks whose difference had another sign do not speak for the one there is now.
        sign = 0.0 if estimate is None else math.copysign(1.0, estimate.mean)
        agreeing = [
            1.0 if (then := look.estimates[i]) is None or then.mean * sign < 0 else look.p_values[i]
            for look in looks
        ]
        sequential.append(sequential_p_value(agreeing, rules.looks, spending=rules.spending))
        # Levels are two-sided, twice those of one-sided tests.
        doubled = [min(1.0, 2 * look.equal_p[i]) for look in looks]
        is_within = (
            estimate is not None
            and rules.equal_within is not None
            and abs(estimate.mean) < rules.equal_within
        )
        overall = sequential_p_value(doubled, rules.looks, spending=rules.spending) if is_within else 2.0
        sequential_equal.append(overall / 2)
    combined = _with_verdicts(
        latest.table, latest.pool, latest.estimates, rules, p_values=sequential, equal_p=sequential_equal
    )
    return dataclasses.replace(
        combined,
        level=_nominal(rules)[len(looks) - 1],
        look=rules.looks[len(looks) - 1],
        # Those of this look; the looks together are in the adjusted ones.
        p_values=latest.p_values,
        equal_p=latest.equal_p,
    )


def _nominal(rules: Rules) -> tuple[float, ...]:
    return nominal_levels(rules.looks, level=1 - rules.confidence, spending=rules.spending)


def _with_verdicts(
    table: Table,
    pool: PooledNoise,
    estimates: tuple[Estimate | None, ...],
    rules: Rules,
    *,
    p_values: Sequence[float],
    equal_p: Sequence[float],
) -> Assessed:
    level = 1 - rules.confidence
    adjusted_equal = (1.0,) * len(estimates)
    if rules.correction is Correction.HOLM:
        adjusted = holm(p_values)
    else:
        adjusted, adjusted_equal = holm_with_equality(p_values, equal_p)
    return Assessed(
        table=table,
        pool=pool,
        level=level,
        look=None,
        estimates=estimates,
        p_values=tuple(p_values),
        equal_p=tuple(equal_p),
        adjusted=adjusted,
        adjusted_equal=adjusted_equal,
        verdicts=tuple(
            # A difference within the margin counts as none, also where it is not zero.
            Verdict.EQUAL
            if adjusted_equal[i] <= level
            else decide(
                0.0 if estimate is None else estimate.mean,
                adjusted[i],
                lower_is_better=rules.lower_is_better,
                level=level,
            )
            for i, estimate in enumerate(estimates)
        ),
    )


# Noise ------------------------------------------------------------------------------------------------------
def _noise(table: Table, pool: PooledNoise) -> Noise:
    everything = fit_two_way(table.values)
    own = np.sqrt(own_variances(table.values, everything)).tolist()

    def named(flags: Bool[np.ndarray, " A"]) -> tuple[str, ...]:
        return tuple(arm for arm, flag in zip(table.arms, flags.tolist(), strict=True) if flag)

    return Noise(
        deviation=None if pool.variance is None else math.sqrt(pool.variance),
        degrees_of_freedom=pool.degrees_of_freedom,
        own={arm: value for arm, value in zip(table.arms, own, strict=True) if not math.isnan(value)},
        noisy=named(pool.is_noisy),
        apart=named(pool.is_apart),
        equality_p=brown_forsythe(everything.residuals),
    )


# Tables -----------------------------------------------------------------------------------------------------
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


def _part(table: Table, arms: Sequence[int] | np.ndarray, seeds: Sequence[int]) -> Table:
    chosen = np.ix_(np.asarray(arms, dtype=np.int64), np.asarray(seeds, dtype=np.int64))
    return Table(
        arms=tuple(table.arms[i] for i in arms),
        seeds=tuple(table.seeds[i] for i in seeds),
        values=table.values[chosen],
        diverged=table.diverged[chosen],
    )


def _complete_seeds(table: Table) -> list[int]:
    """Return the positions of seeds with which every arm has an outcome, of arms that have any."""
    has_outcome = np.isfinite(table.values) | table.diverged
    return np.flatnonzero(has_outcome[has_outcome.any(axis=1)].all(axis=0)).tolist()


# Judgements -------------------------------------------------------------------------------------------------
def _judgement(
    assessed: Assessed, i: int, estimate: Estimate, pairs: Sequence[tuple[str, str]], rules: Rules
) -> Judgement:
    verdict = assessed.verdicts[i]
    has_margin = rules.equal_within is not None
    half_width = float(stats.t.isf(assessed.level / 2, estimate.degrees)) * estimate.error
    return Judgement(
        arm=pairs[i][0],
        against=pairs[i][1],
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
        p_value=assessed.p_values[i],
        adjusted_p=assessed.adjusted[i],
        equal_p=assessed.equal_p[i] if has_margin else None,
        adjusted_equal_p=assessed.adjusted_equal[i] if has_margin else None,
        verdict=verdict,
        seeds_needed=_seeds_needed(assessed, estimate, rules, comparisons=len(pairs))
        if verdict is Verdict.NOT_RESOLVED
        else None,
        smallest_resolved=_smallest_resolved(assessed, estimate, rules, comparisons=len(pairs)),
    )


def _seeds_needed(assessed: Assessed, estimate: Estimate, rules: Rules, *, comparisons: int) -> int | None:
    """Return the seeds that would resolve the difference as it is, or show that it is within the margin."""
    if estimate.error == 0:
        return None
    effect = abs(estimate.mean)
    of_study: dict[str, Any] = {
        "comparisons": comparisons,
        "arms": estimate.pooled_arms,
        "after": assessed.look or 0,
    }
    needed = [seeds_that_resolve(effect, estimate.deviation, rules, **of_study)]
    if rules.equal_within is not None and not estimate.values.imputed:
        needed.append(
            seeds_that_show_equality(rules.equal_within, estimate.deviation, rules, effect=effect, **of_study)
        )
    return min((num for num in needed if num is not None), default=None)


def _smallest_resolved(
    assessed: Assessed, estimate: Estimate, rules: Rules, *, comparisons: int
) -> float | None:
    # Before the first look nothing is resolved, however large it is.
    if estimate.error == 0 or assessed.look == 0:
        return None
    num = len(estimate.values.differences)
    # At a look, pairs that both diverged may leave fewer than it has.
    level = level_of_test(rules, assessed.look or num, comparisons=comparisons)
    return smallest_resolved(estimate.deviation, num, 1, estimate.degrees, level, variance=rules.variance)
