"""Verdicts of tables, against scipy and numbers worked by hand."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.weightstats import ttost_paired

from slmjax.studies.statistics.power import power_of_difference, seeds_needed, smallest_resolved
from slmjax.studies.statistics.results_table import Rules, Table, VarianceRule, VarianceSource
from slmjax.studies.statistics.samples import holm, holm_with_equality
from slmjax.studies.statistics.sequential import nominal_levels
from slmjax.studies.statistics.verdicts import Judgement, Verdict, assess, judge
from tests.studies.statistics.tables import against_first, table

# Three arms and three seeds without a pattern; b is 3 above a.
VALUES = [[1.0, 2.0, 3.0], [4.0, 5.5, 5.5], [0.0, 3.0, 0.0]]


def only(results: Table, rules: Rules | None = None) -> Judgement:
    """Return the judgement on b against a, as the only comparison."""
    (judgement,) = judge(results, [("b", "a")], rules or Rules()).comparisons
    assert judgement is not None
    return judgement


# Differences ------------------------------------------------------------------------------------------------
def test_two_arms_are_judged_by_the_paired_t_test() -> None:
    rows = np.random.default_rng(0).normal(size=(2, 4)) + [[0.0], [2.0]]
    judgement = only(table(rows))
    expected = stats.ttest_rel(rows[1], rows[0])
    assert judgement.p_value == judgement.adjusted_p == pytest.approx(expected.pvalue)
    assert judgement.interval == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert judgement.degrees_of_freedom == 3


@pytest.mark.parametrize("rule", VarianceRule)
def test_the_variance_by_hand(rule: VarianceRule) -> None:
    array = np.array(VALUES)
    residuals = array - array.mean(1, keepdims=True) - array.mean(0) + array.mean()
    pooled = float(np.square(residuals).sum()) / 4
    own = float(np.var(array[1] - array[0], ddof=1))
    variance = {"own": own, "pooled": 2 * pooled, "larger": max(own, 2 * pooled)}[rule.value]
    degrees = 2 if rule is VarianceRule.OWN else 4
    judged = judge(table(VALUES), against_first(3), Rules(variance=rule))
    judgement = judged.comparisons[0]
    assert judgement is not None and judged.noise.deviation == pytest.approx(math.sqrt(pooled))
    assert judgement.difference == pytest.approx(3) and judgement.degrees_of_freedom == degrees
    assert judgement.standard_error == pytest.approx(math.sqrt(variance / 3))
    assert judgement.p_value == pytest.approx(2 * stats.t.sf(3 / math.sqrt(variance / 3), degrees))
    assert judgement.variance.value == ("own" if rule is VarianceRule.OWN else "pooled")


def test_the_larger_variance_is_the_pairs_own_where_that_is_larger() -> None:
    values = np.random.default_rng(5).normal(size=(8, 6))
    judged = judge(table(values), against_first(8), Rules())
    assert judged.noise.apart == ()
    for judgement in judged.comparisons:
        assert judgement is not None and judged.noise.deviation is not None
        differences = values["abcdefgh".index(judgement.arm)] - values[0]
        own = float(differences.var(ddof=1))
        assert judgement.standard_error**2 * 6 == pytest.approx(max(own, 2 * judged.noise.deviation**2))
        is_own = judgement.variance is VarianceSource.OWN_LARGER
        assert is_own == (own > 2 * judged.noise.deviation**2)
        # The rule has the pooled degrees of freedom in both cases.
        assert judgement.degrees_of_freedom == judged.noise.degrees_of_freedom == 35
    sources = {judgement.variance for judgement in judged.comparisons if judgement}
    assert sources == {VarianceSource.OWN_LARGER, VarianceSource.POOLED}


def test_the_variance_is_named_with_its_degrees_of_freedom() -> None:
    draws = np.random.default_rng(0)
    # Of two arms alone, own and pooled are one.
    pair = only(table(draws.normal(size=(2, 4))))
    assert (pair.variance, pair.degrees_of_freedom) == (VarianceSource.OWN, 3)
    values = draws.normal(size=(6, 5))
    values[1] *= 8
    judged = judge(table(values), against_first(6), Rules())
    assert judged.noise.noisy == ("b",)
    noisy, usual = judged.comparisons[:2]
    assert noisy is not None and usual is not None
    assert (noisy.variance, noisy.degrees_of_freedom) == (VarianceSource.OWN_UNEQUAL, 4)
    assert usual.degrees_of_freedom == judged.noise.degrees_of_freedom == 16
    assert usual.variance in (VarianceSource.POOLED, VarianceSource.OWN_LARGER)


def test_all_comparisons_are_one_family() -> None:
    """One that cannot be made has p = 1, and still counts."""
    values = np.random.default_rng(1).normal(size=(4, 5))
    values[1] += 1.5
    values[3, 1:] = np.nan
    judgements = judge(table(values), against_first(4), Rules()).comparisons
    assert judgements[2] is None
    known = [judgement for judgement in judgements if judgement is not None]
    expected = holm([*(judgement.p_value for judgement in known), 1.0])
    assert [judgement.adjusted_p for judgement in known] == pytest.approx(expected[:2])


def test_arms_that_are_not_compared_do_not_count() -> None:
    values = np.array([*VALUES, [0.0, 50.0, -7.0]])
    pairs = [("b", "a"), ("c", "a")]
    assert judge(table(values), pairs, Rules()) == judge(table(VALUES), pairs, Rules())


def test_verdicts_follow_the_direction_of_the_metric() -> None:
    noise = np.random.default_rng(0).normal(size=(3, 5)) * 0.01
    values = noise + [[0.0], [1.0], [-1.0]]
    for lower_is_better, expected in ((True, ["worse", "better"]), (False, ["better", "worse"])):
        judged = judge(table(values), against_first(3), Rules(lower_is_better=lower_is_better))
        assert [judgement.verdict.value for judgement in judged.comparisons if judgement] == expected
        assert all(judgement is None or judgement.seeds_needed is None for judgement in judged.comparisons)


def test_too_little_resolves_nothing() -> None:
    # A single seed.
    assert judge(table([[1.0], [2.0]]), [("b", "a")], Rules()).comparisons == (None,)
    # Differences that are equal up to rounding, whatever the noise of others.
    equal = only(table([[1.1, 1.3, 1.7], [1.2, 1.4, 1.8]]))
    assert equal.verdict is Verdict.NOT_RESOLVED and equal.p_value == 1 and equal.seeds_needed is None
    (judgement, _) = judge(
        table([[1.1, 1.3, 1.7], [1.2, 1.4, 1.8], [5.0, 1.0, 3.0]]), against_first(3), Rules(equal_within=9.0)
    ).comparisons
    assert judgement is not None and judgement.verdict is Verdict.NOT_RESOLVED
    assert judgement.standard_error == 0 and judgement.interval == pytest.approx((0.1, 0.1))


def test_pairs_need_two_arms_of_the_table() -> None:
    with pytest.raises(ValueError, match="'z' is no arm of the table: name one of a, b, c"):
        judge(table(VALUES), [("z", "a")], Rules())
    with pytest.raises(ValueError, match="'a' cannot be compared with itself"):
        judge(table(VALUES), [("a", "a")], Rules())


def test_more_seeds_are_needed_for_smaller_differences() -> None:
    noise = np.array([[0.0, 0.0, 0.0, 0.0], [1.0, -0.9, 0.5, -0.6]])
    judgements = [only(table(noise + [[0.0], [shift]])) for shift in (0.5, 0.1)]
    assert all(judgement.verdict is Verdict.NOT_RESOLVED for judgement in judgements)
    needed = [judgement.seeds_needed for judgement in judgements]
    assert needed[0] is not None and needed[1] is not None and 4 < needed[0] < needed[1]
    # By the power of its own pairs, of which there are no others.
    assert needed[0] == seeds_needed(0.5, float(noise[1].std(ddof=1)))
    # With a margin, equality may be nearer.
    with_margin = only(table(noise), Rules(equal_within=0.9)).seeds_needed
    assert with_margin is not None and with_margin < 20 and only(table(noise)).seeds_needed is None


def test_seeds_that_are_needed_are_judged_by_the_rules_of_the_study() -> None:
    """Of fixed looks, the first one left whose own level is reached 4 times in 5."""
    values = np.random.default_rng(2).normal(size=(3, 3)) + [[0.0], [3.0], [0.0]]
    rules = Rules(looks=(3, 5, 8, 12), equal_within=0.5)
    judgement = judge(table(values), against_first(3), rules).comparisons[0]
    assert judgement is not None and judgement.verdict is Verdict.NOT_RESOLVED
    deviation = judgement.standard_error * math.sqrt(3)
    effect = abs(judgement.difference)
    powers = {}
    for i, look in enumerate(rules.looks):
        # Two comparisons: the looks of each have half of the level to spend.
        level = nominal_levels(rules.looks, level=0.025)[i]
        powers[look] = power_of_difference(effect, deviation, look, 1, 2 * (look - 1), level)
    assert judgement.seeds_needed == next(look for look in (5, 8, 12) if powers[look] >= 0.8) == 12
    # Without looks the same number as that of an earlier look, which has less of the level.
    without = judge(table(values), against_first(3), Rules()).comparisons[0]
    assert without is not None and without.seeds_needed == 8 and powers[8] < 0.8
    # At the last look nothing is left.
    last = judge(table(values), against_first(3), Rules(looks=(2, 3))).comparisons[0]
    assert last is not None and last.verdict is Verdict.NOT_RESOLVED and last.seeds_needed is None
    # The rule of the variance counts.
    by_own = judge(table(values), against_first(3), Rules(variance=VarianceRule.OWN)).comparisons[0]
    assert by_own is not None
    own = float((values[1] - values[0]).std(ddof=1))
    expected = seeds_needed(effect, own, comparisons=2, arms=2, variance=VarianceRule.OWN)
    assert by_own.seeds_needed == expected
    by_pool = judge(table(values), against_first(3), Rules(variance=VarianceRule.POOLED)).comparisons[0]
    assert by_pool is not None and by_pool.standard_error > 0
    deviation = by_pool.standard_error * math.sqrt(3)
    expected = seeds_needed(effect, deviation, comparisons=2, arms=3, variance=VarianceRule.POOLED)
    assert by_pool.seeds_needed == expected


def test_the_difference_that_a_comparison_resolves() -> None:
    values = np.random.default_rng(0).normal(size=(6, 5))
    values[1] *= 8
    judged = judge(table(values), against_first(6), Rules())
    noisy, usual = judged.comparisons[:2]
    assert noisy is not None and usual is not None
    # By the error, the degrees of freedom and the level of its own test.
    for judgement, degrees in ((noisy, 4), (usual, 16)):
        expected = smallest_resolved(judgement.standard_error * math.sqrt(5), 5, 5, degrees)
        assert judgement.smallest_resolved == pytest.approx(expected)
    at_look = judge(table(values), against_first(6), LOOKS).comparisons[1]
    assert at_look is not None and at_look.smallest_resolved is not None
    assert usual.smallest_resolved is not None and at_look.smallest_resolved > usual.smallest_resolved
    early = judge(table(values[:, :2]), against_first(6), LOOKS).comparisons[1]
    assert early is not None and early.smallest_resolved is None


CELL = st.sampled_from(["value", "value", "value", "missing", "diverged"])


@settings(deadline=None, max_examples=25)
@given(
    st.lists(CELL, min_size=20, max_size=20),
    st.integers(0, 1000),
    st.sampled_from([(), (2, 4)]),
    st.sampled_from([None, 0.8]),
)
def test_any_table_is_judged(
    cells: list[str], seed: int, looks: tuple[int, ...], equal_within: float | None
) -> None:
    """Whatever is missing, verdicts do not depend on the order of a pair nor on the unit of the metric."""
    values = np.random.default_rng(seed).normal(size=(4, 5)) + [[0.0], [0.0], [2.0], [4.0]]
    is_diverged = np.reshape([cell == "diverged" for cell in cells], (4, 5))
    values[np.reshape([cell != "value" for cell in cells], (4, 5))] = np.nan
    results = Table(arms=("a", "b", "c", "d"), seeds=(0, 1, 2, 3, 4), values=values, diverged=is_diverged)
    rules = Rules(looks=looks, equal_within=equal_within)
    judged = assess(results, against_first(4), rules)
    turned = assess(results, [(second, first) for first, second in against_first(4)], rules)
    margin = None if equal_within is None else 16 * equal_within
    scaled = assess(
        dataclasses.replace(results, values=16 * values),
        against_first(4),
        dataclasses.replace(rules, equal_within=margin),
    )
    opposite = {"better": "worse", "worse": "better"}
    for i, verdict in enumerate(judged.verdicts):
        assert turned.verdicts[i].value == opposite.get(verdict.value, verdict.value)
        assert scaled.verdicts[i] is verdict
        assert scaled.adjusted[i] == pytest.approx(judged.adjusted[i])
        assert 0 <= judged.p_values[i] <= judged.adjusted[i] <= 1 or looks
        first = judged.estimates[i]
        second = turned.estimates[i]
        assert (first is None) == (second is None) == (scaled.estimates[i] is None)
        assert first is None or second is None or second.mean == -first.mean


# Divergence -------------------------------------------------------------------------------------------------
def test_a_diverged_seed_counts_with_the_worst_value_of_the_pair() -> None:
    values = [[1.0, 1.1, 1.4], [0.9, 1.2, 9.0], [7.0, 8.0, 9.0]]
    results = table(values, diverged=[(1, 2)])
    judgement = only(results)
    assert judgement.seeds == (0, 1, 2) and judgement.imputed == (2,)
    # b has 1.4 for its third seed: the worst of both arms, and not that of c.
    assert judgement.difference == pytest.approx((-0.1 + 0.1 + 0.0) / 3)
    # Where higher is better, the worst is the lowest.
    upside_down = only(results, Rules(lower_is_better=False))
    assert upside_down.difference == pytest.approx((-0.1 + 0.1 + (0.9 - 1.4)) / 3)


def test_an_arm_that_diverged_is_not_equal() -> None:
    """Its values stand for losses without limit, so that no margin holds them."""
    values = [[1.0, 1.01, 1.02, 0.99, 1.0], [1.0, 1.01, 1.02, 0.995, 1.005]]
    rules = Rules(equal_within=0.1)
    assert only(table(values), rules).verdict is Verdict.EQUAL
    for cells in ([(1, 0)], [(0, 0)], [(1, 0), (1, 1), (1, 2), (1, 3)]):
        judgement = only(table(values, diverged=cells), rules)
        assert judgement.equal_p == 1.0 and judgement.verdict is not Verdict.EQUAL
    # With both arms, it says nothing about their difference.
    assert only(table(values, diverged=[(0, 0), (1, 0)]), rules).verdict is Verdict.EQUAL


def test_a_seed_that_both_lose_is_left_out() -> None:
    judgement = only(table([[1.0, 1.1, 1.4], [0.9, 1.2, 9.0]], diverged=[(0, 2), (1, 2)]))
    assert judgement.seeds == (0, 1) and judgement.imputed == ()


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000))
def test_losing_a_seed_is_no_help_to_an_arm(seed: int) -> None:
    draws = np.random.default_rng(seed)
    values = draws.normal(size=(3, 5)) - [[0.0], [draws.uniform(0, 4)], [0.0]]
    worst = int(values[1].argmax())
    pairs = against_first(3)
    lost = assess(table(values, diverged=[(1, worst)]), pairs, Rules())
    left_out = assess(table(np.delete(values, worst, axis=1)), pairs, Rules())
    estimates = [assessed.estimates[0] for assessed in (lost, left_out)]
    assert estimates[0] is not None and estimates[1] is not None
    assert estimates[0].values.imputed == (worst,)
    # The arm has lost its worst value, and stands no better than without that seed.
    assert estimates[0].mean >= min(0.8 * estimates[1].mean, 0.0)
    if lost.verdicts[0] is Verdict.BETTER:
        assert left_out.verdicts[0] is Verdict.BETTER


# Equality ---------------------------------------------------------------------------------------------------
def test_equality_is_two_one_sided_tests() -> None:
    rows = np.random.default_rng(0).normal(size=(2, 6)) * 0.1
    judgement = only(table(rows), Rules(equal_within=0.2))
    expected, _, _ = ttost_paired(rows[1], rows[0], -0.2, 0.2)
    assert judgement.equal_p == judgement.adjusted_equal_p == pytest.approx(expected)
    assert judgement.verdict is Verdict.EQUAL
    assert only(table(rows), Rules(equal_within=0.01)).verdict is Verdict.NOT_RESOLVED
    assert only(table(rows)).equal_p is None


def test_a_small_difference_within_the_margin_is_equal() -> None:
    rows = np.random.default_rng(0).normal(size=(2, 6)) * 0.01 + [[0.0], [0.1]]
    judgement = only(table(rows), Rules(equal_within=0.5))
    assert judgement.adjusted_p < 0.01 and judgement.verdict is Verdict.EQUAL
    assert only(table(rows)).verdict is Verdict.WORSE


P_VALUES = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=4)


@settings(deadline=None)
@given(P_VALUES)
def test_adjusted_values_of_differences_and_equality_are_those_of_the_closed_test(
    families: list[tuple[float, float]],
) -> None:
    """Against the definition: a hypothesis is rejected if all intersections that have it are."""
    adjusted = holm_with_equality([pair[0] for pair in families], [pair[1] for pair in families])
    num = len(families)
    # Per comparison: its hypothesis is not in the intersection, or the first, or the second.
    intersections = list(itertools.product((None, 0, 1), repeat=num))
    for i, kind in itertools.product(range(num), (0, 1)):
        levels = [
            min(families[j][chosen] for j, chosen in enumerate(choice) if chosen is not None)
            * sum(chosen is not None for chosen in choice)
            for choice in intersections
            if choice[i] == kind
        ]
        assert adjusted[kind][i] == pytest.approx(min(1.0, max(levels)))
    # Without equality it is Holm's correction.
    first = [pair[0] for pair in families]
    assert holm_with_equality(first, [0.0] * num)[0] == pytest.approx(holm(first))


def test_p_values_of_pairs_are_needed() -> None:
    with pytest.raises(ValueError, match="give two for each comparison"):
        holm_with_equality([0.1], [])
    with pytest.raises(ValueError, match="is not a p value"):
        holm_with_equality([0.1], [2.0])


# Fixed looks ------------------------------------------------------------------------------------------------
LOOKS = Rules(looks=(3, 5, 8))


def test_a_look_has_its_first_seeds() -> None:
    values = np.random.default_rng(0).normal(size=(3, 7))
    judged = judge(table(values), against_first(3), LOOKS)
    fixed = judge(table(values[:, :5]), against_first(3), Rules())
    assert judged.look == 5 and judged.level == pytest.approx(0.0089897, rel=1e-4)
    for judgement, expected in zip(judged.comparisons, fixed.comparisons, strict=True):
        assert judgement is not None and expected is not None
        assert judgement.p_value == expected.p_value and judgement.seeds == (0, 1, 2, 3, 4)
        # Repeated intervals are wider.
        half_width = float(stats.t.isf(judged.level / 2, judgement.degrees_of_freedom))
        assert judgement.interval[1] - judgement.difference == pytest.approx(
            half_width * judgement.standard_error
        )


def test_nothing_is_resolved_before_the_first_look() -> None:
    values = np.random.default_rng(0).normal(size=(2, 2)) * 0.001 + [[0.0], [5.0]]
    judged = judge(table(values), [("b", "a")], LOOKS)
    judgement = judged.comparisons[0]
    assert judged.look == 0 and judgement is not None
    assert judgement.verdict is Verdict.NOT_RESOLVED and judgement.adjusted_p == 1
    assert only(table(values)).verdict is Verdict.WORSE


def test_seeds_count_once_every_arm_has_an_outcome() -> None:
    values = np.random.default_rng(0).normal(size=(4, 5))
    values[1, 1] = np.nan
    values[3] = np.nan  # has not begun, and is not waited for
    results = table(values, diverged=[(2, 3)])
    judged = judge(results, against_first(4), LOOKS)
    assert judged.look == 3
    assert [judgement.seeds for judgement in judged.comparisons if judgement] == [(0, 2, 3), (0, 2, 3)]


def test_an_earlier_verdict_stands_unless_the_sign_changes() -> None:
    noise = np.random.default_rng(0).normal(size=(5, 5)) * 0.01
    values = noise.copy()
    values[1] += 1.0
    values[1, 3:] -= [0.5, 0.4]  # noisy from now on
    pairs = against_first(5)
    first = judge(table(values[:, :3]), pairs, LOOKS).comparisons[0]
    second = judge(table(values), pairs, LOOKS).comparisons[0]
    assert first is not None and second is not None
    assert first.verdict is second.verdict is Verdict.WORSE
    assert second.adjusted_p == pytest.approx(first.adjusted_p, rel=1e-6) and second.p_value > first.p_value
    values[1, 3:] -= 9.0
    third = judge(table(values), pairs, LOOKS).comparisons[0]
    assert third is not None and third.difference < 0 and third.verdict is Verdict.NOT_RESOLVED


def test_the_last_look_is_enough() -> None:
    values = np.random.default_rng(0).normal(size=(3, 11))
    judged = judge(table(values), against_first(3), LOOKS)
    assert judged.look == 8 and judged.level == pytest.approx(0.047099, rel=1e-4)
    assert judged == judge(table(values[:, :9]), against_first(3), LOOKS)
    assert dataclasses.replace(LOOKS, looks=()).looks == ()
