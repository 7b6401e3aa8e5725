"""Power against statsmodels, scipy and the figures of the field."""

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.power import TTestPower

from slmjax.studies.statistics.power import (
    power_of_difference,
    power_of_equality,
    seeds_for_equality,
    seeds_needed,
    smallest_equal,
    smallest_resolved,
)
from slmjax.studies.statistics.results_table import Rules, VarianceRule
from slmjax.studies.statistics.verdicts import Verdict, assess
from tests.studies.statistics.tables import against_first, table

OWN = VarianceRule.OWN
POOLED = VarianceRule.POOLED


@pytest.mark.parametrize("seeds", [2, 3, 8])
@pytest.mark.parametrize("effect", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("comparisons", [1, 8])
def test_power_of_own_pairs_is_statsmodels(seeds: int, effect: float, comparisons: int) -> None:
    expected = TTestPower().power(effect, seeds, 0.05 / comparisons)
    assert power_of_difference(2 * effect, 2.0, seeds, comparisons, variance=OWN) == pytest.approx(
        expected, rel=1e-6
    )


@pytest.mark.parametrize(
    ("seeds", "comparisons", "arms", "expected"),
    [(3, 8, 2, 9.3), (3, 8, 9, 2.3), (5, 8, 2, 3.0), (5, 8, 9, 1.7), (10, 8, 2, 1.4), (10, 8, 9, 1.2)]
    + [(3, 1, 2, 3.3), (3, 1, 9, 1.7)],
)
def test_smallest_effects(seeds: int, comparisons: int, arms: int, expected: float) -> None:
    """Known effects that are resolved 4 times in 5, in deviations of a pair's difference."""
    degrees = (arms - 1) * (seeds - 1)
    effect = smallest_resolved(1.0, seeds, comparisons, degrees, variance=POOLED)
    assert effect == pytest.approx(expected, abs=0.05)
    power = power_of_difference(effect, 1.0, seeds, comparisons, degrees, variance=POOLED)
    assert power == pytest.approx(0.8)
    # The larger variance costs something, the more the fewer seeds there are.
    assert effect <= smallest_resolved(1.0, seeds, comparisons, degrees) < 1.3 * effect


def test_the_power_of_the_larger_variance_by_simulation() -> None:
    """Contrasts of equal noise: the pair's own, and the rest of the table."""
    draws = np.random.default_rng(0)
    seeds = 3
    degrees = 16
    own = draws.chisquare(seeds - 1, 200_000)
    rest = draws.chisquare(degrees - seeds + 1, 200_000)
    t = (draws.normal(size=200_000) + 2.0 * math.sqrt(seeds)) / np.sqrt(
        np.maximum(own / (seeds - 1), (own + rest) / degrees)
    )
    together = np.mean(abs(t) > stats.t.isf(0.05 / 8 / 2, degrees))
    alone = power_of_difference(2.0, 1.0, seeds, 8, variance=OWN)
    # One pair in ten has an arm that is set apart.
    expected = 0.9025 * together + 0.0975 * alone
    assert power_of_difference(2.0, 1.0, seeds, 8, degrees) == pytest.approx(expected, abs=0.003)


def test_power_of_equality_by_simulation() -> None:
    draws = np.random.default_rng(0)
    differences = draws.normal(size=(100_000, 5)) + 0.3
    errors = differences.std(axis=1, ddof=1) / math.sqrt(5)
    bound = 2.0 - stats.t.isf(0.05 / 3, 4) * errors
    expected = np.mean(abs(differences.mean(axis=1)) < bound)
    found = power_of_equality(2.0, 1.0, 5, 3, effect=0.3, variance=OWN)
    assert found == pytest.approx(expected, abs=0.005)
    # Two arms have no noise but their own.
    assert power_of_equality(2.0, 1.0, 5, 3, 4, effect=0.3) == found


def test_seeds_needed_are_the_first_with_the_power() -> None:
    for arms in (2, 9):
        num = seeds_needed(1.0, 1.0, comparisons=8, arms=arms)
        assert num is not None
        powers = [power_of_difference(1.0, 1.0, n, 8, (arms - 1) * (n - 1)) for n in (num - 1, num)]
        assert powers[0] < 0.8 <= powers[1]
        enough = seeds_for_equality(1.0, 1.0, comparisons=8, arms=arms)
        assert enough is not None
        powers = [power_of_equality(1.0, 1.0, n, 8, (arms - 1) * (n - 1)) for n in (enough - 1, enough)]
        assert powers[0] < 0.8 <= powers[1]
    assert seeds_needed(1e-3, 1.0) is None and seeds_needed(0.0, 1.0) is None
    assert seeds_for_equality(1.0, 1.0, effect=1.0) is None
    assert smallest_equal(2.0, 5, 8, 32) == pytest.approx(2 * smallest_equal(1.0, 5, 8, 32))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: power_of_difference(1.0, 0.0, 3), "deviation is 0.0"),
        (lambda: power_of_difference(1.0, 1.0, 1), "1 seeds do not show the noise"),
        (lambda: power_of_difference(1.0, 1.0, 3, 0), "0 comparisons"),
        (lambda: power_of_difference(1.0, 1.0, 3, 1, 0), "0 degrees of freedom"),
        (lambda: power_of_difference(1.0, 1.0, 3, level=1.5), "level is 1.5"),
        (lambda: power_of_equality(0.0, 1.0, 3), "margin is 0.0"),
        (lambda: smallest_resolved(1.0, 3, power=1.0), "power is 1.0"),
    ],
)
def test_wrong_arguments_are_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_verdicts_have_the_power_that_was_planned() -> None:
    """Studies with the smallest effect that is resolved 4 times in 5, in one arm of six."""
    draws = np.random.default_rng(0)
    # The deviation of a pair's difference is sqrt(2).
    effect = smallest_resolved(math.sqrt(2), 4, 5, 15)
    values = draws.normal(size=(250, 6, 4))
    values[:, 3] += effect
    pairs = against_first(6)
    better = [assess(table(study), pairs, Rules()).verdicts[2] is Verdict.WORSE for study in values]
    # Two standard errors, and what the plan neglects.
    assert np.mean(better) == pytest.approx(0.8, abs=2 * math.sqrt(0.16 / 250) + 0.02)


def test_two_seeds_at_a_very_small_level() -> None:
    """As at a first look of many: with one degree of freedom, tails are those of 1 / level."""
    usual = smallest_resolved(1.0, 2)
    for level in (1e-3, 1e-6, 1e-12):
        assert smallest_resolved(1.0, 2, level=level) == pytest.approx(usual * 0.05 / level, rel=2e-3)
    # Where both ways to compute it are possible, they agree.
    for degrees in (1, 2, 8):
        tail = stats.t.sf(25.0, degrees)
        near, far = (
            power_of_difference(nc, math.sqrt(2), 2, 1, degrees, 2 * tail, variance=VarianceRule.POOLED)
            for nc in (29.99, 30.01)
        )
        assert 0 < far - near < 1e-3
