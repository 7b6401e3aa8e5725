"""Paired statistics equal scipy's and numbers worked by hand, and hold what a correction for several tests
promises.
"""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from slmjax.studies import Verdict, bootstrap_interval, decide, holm, paired_difference, summarize

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def samples(num: int, seed: int = 0) -> tuple[list[float], list[float]]:
    """Figures of two arms that share a good part of their noise, as those of one seed do."""
    draws = np.random.default_rng(seed)
    shared = draws.normal(size=num)
    return (1.4 + 0.03 * shared + 0.01 * draws.normal(size=num)).tolist(), (
        1.41 + 0.03 * shared + 0.01 * draws.normal(size=num)
    ).tolist()


# Differences ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("num", [2, 3, 5, 12])
@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_the_paired_t_test_is_scipys(num: int, confidence: float) -> None:
    first, second = samples(num)
    found = paired_difference(first, second, confidence=confidence)
    expected = stats.ttest_rel(first, second)
    differences = np.subtract(first, second)
    assert found.num_pairs == num
    np.testing.assert_allclose(found.p_value, expected.pvalue, rtol=1e-10)
    np.testing.assert_allclose(found.t_interval, expected.confidence_interval(confidence), rtol=1e-10)
    np.testing.assert_allclose(found.standard_error, stats.sem(differences), rtol=1e-10)
    np.testing.assert_allclose(found.standard_deviation, differences.std(ddof=1), rtol=1e-10)


def test_a_paired_difference_by_hand() -> None:
    """Differences 1, 2, 3: mean 2, deviation 1; with two degrees of freedom p is 1 - t / sqrt(t^2 + 2), and t
    is sqrt(12).
    """
    found = paired_difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert found.mean == 2 and found.standard_deviation == 1
    assert found.p_value == pytest.approx(1 - math.sqrt(12 / 14))
    assert found.t_interval == pytest.approx((2 - 4.302652730 / math.sqrt(3), 2 + 4.302652730 / math.sqrt(3)))
    assert found.bootstrap_interval == (
        1,
        3,
    )  # all three resampled values the smallest: 1 of 27, more than 2.5%


def test_the_other_way_round_turns_everything_over() -> None:
    for num in (3, 9):
        first, second = samples(num)
        forth = paired_difference(first, second)
        back = paired_difference(second, first)
        assert forth.p_value == back.p_value and forth.mean == -back.mean
        for one, other in (
            (forth.t_interval, back.t_interval),
            (forth.bootstrap_interval, back.bootstrap_interval),
        ):
            np.testing.assert_allclose(one, (-other[1], -other[0]), rtol=1e-12)


@pytest.mark.parametrize("offset", [0.0, 0.1, -1e-3])
def test_differences_without_noise_prove_nothing(offset: float) -> None:
    """Up to rounding they are equal: the seeds changed nothing, and a t test would call anything certain."""
    values = [1.1, 1.3, 1.7]
    found = paired_difference([value + offset for value in values], values)
    assert not found.has_noise and found.p_value == 1
    assert found.mean == pytest.approx(offset, abs=1e-12)
    assert found.t_interval == found.bootstrap_interval == (found.mean, found.mean)
    assert decide(found.mean, found.p_value) is Verdict.NOT_RESOLVED
    assert paired_difference([1.1, 1.3, 1.7 + 1e-9], values).has_noise


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([1.0], [2.0], "1 pairs do not show the noise: train at least 2 seeds"),
        ([], [], "0 pairs"),
        ([1.0, 2.0], [1.0], "2 and 1 values do not make pairs"),
        ([1.0, math.nan], [1.0, 2.0], "leave out the seeds of runs that diverged"),
    ],
)
def test_what_cannot_be_compared_is_refused(first: list[float], second: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_difference(first, second)


def test_a_confidence_is_a_share() -> None:
    for call in (
        lambda: paired_difference([1, 2], [3, 5], confidence=95),
        lambda: bootstrap_interval([1, 2], confidence=1),
    ):
        with pytest.raises(ValueError, match="give a fraction between 0 and 1"):
            call()


# Bootstrap --------------------------------------------------------------------------------------------------
def test_few_pairs_are_enumerated() -> None:
    """Against the definition: the smallest mean that at least 2.5% of all resamples do not exceed, and
    likewise from above.
    """
    values = [0.3, -0.1, 0.25, 0.02]
    means = sorted(sum(chosen) / 4 for chosen in itertools.product(values, repeat=4))
    low, high = bootstrap_interval(values)
    assert low == pytest.approx(means[math.ceil(0.025 * 256) - 1]) and high == pytest.approx(
        means[-math.ceil(0.025 * 256)]
    )
    assert bootstrap_interval(values, seed=1) == (low, high)


@pytest.mark.parametrize("num", [5, 6, 20])
def test_the_bootstrap_is_scipys(num: int) -> None:
    """Scipy draws; within what 30,000 draws leave uncertain, against the spread of the means."""
    values = np.subtract(*samples(num))
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=30_000, method="percentile", rng=np.random.default_rng(1)
    )
    np.testing.assert_allclose(
        bootstrap_interval(values.tolist()),
        expected.confidence_interval,
        atol=0.06 * values.std() / math.sqrt(num),
    )


def test_drawn_resamples_are_those_of_the_seed() -> None:
    values = np.subtract(*samples(9)).tolist()
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values) != bootstrap_interval(values, seed=1)
    with pytest.raises(ValueError, match="1 values cannot be resampled"):
        bootstrap_interval([1.0])


# Summaries --------------------------------------------------------------------------------------------------
def test_summaries() -> None:
    found = summarize([1.0, 2.0, 6.0])
    assert (found.num_values, found.mean) == (3, 3)
    assert found.standard_deviation == pytest.approx(math.sqrt(7)) and found.standard_error == pytest.approx(
        math.sqrt(7 / 3)
    )
    alone = summarize([1.0])
    assert alone.mean == 1 and alone.standard_deviation is None and alone.standard_error is None
    with pytest.raises(ValueError, match="at least one seed must have finished"):
        summarize([])


# Several tests ----------------------------------------------------------------------------------------------
def test_holm_by_hand() -> None:
    # 0.04 x 1 is raised to 0.03 x 2
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == (1, 1)  # 2 x 0.5, and not below it
    assert holm([0.6, 0.9, 0.7]) == (1, 1, 1)
    assert holm([0.02]) == (0.02,)
    assert holm([]) == ()
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="is not a p value"):
            holm([0.5, wrong])


@settings(deadline=None)
@given(P_VALUES)
def test_holm_keeps_its_promises(values: list[float]) -> None:
    adjusted = holm(values)
    num = len(values)
    for value, found in zip(values, adjusted, strict=True):
        assert value <= found <= min(1, num * value) * (1 + 1e-12)  # between no correction and Bonferroni's
    order = np.argsort(values, kind="stable")
    assert all(np.diff(np.asarray(adjusted)[order]) >= 0)
    assert list(holm(values[::-1])) == pytest.approx(list(adjusted)[::-1])
    assert min(adjusted) == pytest.approx(min(1, num * min(values)))
    # Stepping down, as the procedure is defined: reject while the next smallest is within 0.05 over what is
    # left.
    rejected = list(itertools.takewhile(lambda i: values[order[i]] * (num - i) <= 0.05, range(num)))
    assert sum(p <= 0.05 for p in adjusted) == len(rejected)


def test_a_family_of_true_nulls_is_seldom_rejected() -> None:
    """800 studies of 5 arms of which none differs from the baseline that they share: at most one in twenty
    may find something.
    """
    draws = np.random.default_rng(0).normal(size=(800, 6, 4))
    families = [stats.ttest_rel(one[1:], one[:1], axis=1).pvalue.tolist() for one in draws]
    share = np.mean([min(holm(family)) <= 0.05 for family in families])
    assert 0.01 < share < 0.065  # 0.05 and two standard errors
    assert np.mean([min(family) <= 0.05 for family in families]) > 0.12


def test_verdicts() -> None:
    assert decide(-0.1, 0.01) is Verdict.BETTER
    assert decide(0.1, 0.01) is Verdict.WORSE
    assert decide(0.1, 0.01, lower_is_better=False) is Verdict.BETTER
    assert decide(-0.1, 0.01, lower_is_better=False) is Verdict.WORSE
    assert decide(-0.1, 0.051) is Verdict.NOT_RESOLVED
    assert decide(-0.1, 0.03, level=0.01) is Verdict.NOT_RESOLVED
    assert decide(0.0, 0.0) is Verdict.NOT_RESOLVED
