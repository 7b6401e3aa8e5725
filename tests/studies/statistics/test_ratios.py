"""The share that is recovered: numbers worked by hand, Fieller's interval against the t tests that it stands
for, scipy's bootstrap.
"""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from slmjax.studies import recovered_fraction
from slmjax.studies.statistics.ratios import fieller_interval


def figures(num: int, *, share: float = 0.6, seed: int = 0) -> tuple[list[float], list[float], list[float]]:
    """An arm, full precision and rounded, which share the noise of their seeds and have a little of their
    own.
    """
    draws = np.random.default_rng(seed)
    full = 1.4 + 0.03 * draws.normal(size=num)
    rounded = full + 0.1 + 0.01 * draws.normal(size=num)
    return (
        (full + (1 - share) * 0.1 + 0.01 * draws.normal(size=num)).tolist(),
        full.tolist(),
        rounded.tolist(),
    )


def p_value_of_zero(values: np.ndarray) -> float:
    """Of scipy's t test that the mean is zero."""
    return float(stats.ttest_rel(values, np.zeros_like(values))[1])


def test_a_recovery_by_hand() -> None:
    """Distances from full precision: the arm's 1, 2, 3, rounding's 4, 4, 8. Ratio of means 6 / 16, so that
    5/8 is recovered.

    Residuals x - 3/8 y are -1/2, 1/2, 0: deviation 1/2, and the standard error 1/2 / sqrt(3) / (16 / 3).
    """
    found = recovered_fraction([11.0, 22.0, 33.0], full=[10.0, 20.0, 30.0], rounded=[14.0, 24.0, 38.0])
    assert found.fraction == pytest.approx(5 / 8)
    assert found.standard_error == pytest.approx(0.5 / math.sqrt(3) / (16 / 3))
    assert found.cost.mean == pytest.approx(16 / 3) and found.gain.mean == pytest.approx(2 - 16 / 3)
    # Variances of the means: of x 1/3, of y 16/9, covariance 2/3. With t = 4.3027, r solves r^2 a - 2 r b + c
    # = 0.
    t2 = 4.302652730**2
    a = (16 / 3) ** 2 - t2 * 16 / 9
    b = 32 / 3 - t2 * 2 / 3
    c = 4 - t2 / 3
    assert (
        a < 0 and found.fieller_interval is None and not found.is_above_zero
    )  # rounding's cost, 5.3 +- 1.3, does not differ from zero significantly
    weaker = recovered_fraction(
        [11.0, 22.0, 33.0], full=[10.0, 20.0, 30.0], rounded=[14.0, 24.0, 38.0], confidence=0.8
    )
    t2 = 1.885618083**2
    a = (16 / 3) ** 2 - t2 * 16 / 9
    b = 32 / 3 - t2 * 2 / 3
    c = 4 - t2 / 3
    root = math.sqrt(b**2 - a * c)
    assert weaker.fieller_interval == pytest.approx((1 - (b + root) / a, 1 - (b - root) / a))
    # The 27 resamples' ratios of means; 2.5% of them is the smallest: all three seeds the second, or all the
    # first.
    assert found.bootstrap_interval == pytest.approx((1 - 2 / 4, 1 - 1 / 4))


@pytest.mark.parametrize("num", [3, 5, 12])
@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_fiellers_interval_is_that_of_the_paired_t_tests(num: int, confidence: float) -> None:
    """At each of its ends the t test of x - r y gives exactly the level, inside a larger p, outside a smaller
    one.
    """
    arm, full, rounded = figures(num)
    x = np.subtract(arm, full)
    y = np.subtract(rounded, full)
    ends = fieller_interval(x, y, confidence=confidence)
    assert ends is not None

    def p_value(ratio: float) -> float:
        return p_value_of_zero(x - ratio * y)

    for end in ends:
        assert p_value(end) == pytest.approx(1 - confidence, rel=1e-6)
    assert p_value(sum(ends) / 2) > 1 - confidence > p_value(ends[1] + 0.1)
    found = recovered_fraction(arm, full=full, rounded=rounded, confidence=confidence)
    assert found.fieller_interval == pytest.approx((1 - ends[1], 1 - ends[0]))
    assert found.is_above_zero == (p_value_of_zero(np.subtract(arm, rounded)) < 1 - confidence)


def test_the_delta_method_is_the_limit_of_fiellers_interval() -> None:
    arm, full, rounded = figures(4000)
    found = recovered_fraction(arm, full=full, rounded=rounded)
    assert (
        found.fieller_interval is not None and found.standard_error is not None and found.fraction is not None
    )
    np.testing.assert_allclose(
        np.subtract(found.fieller_interval, found.fraction),
        [-1.96 * found.standard_error, 1.96 * found.standard_error],
        rtol=5e-3,
    )
    assert abs(found.fraction - 0.6) < 4 * found.standard_error


def test_the_bootstrap_draws_whole_seeds() -> None:
    arm, full, rounded = figures(4)
    x = np.subtract(arm, full)
    y = np.subtract(rounded, full)
    shares = sorted(
        1 - x[list(chosen)].mean() / y[list(chosen)].mean()
        for chosen in itertools.product(range(4), repeat=4)
    )
    found = recovered_fraction(arm, full=full, rounded=rounded).bootstrap_interval
    assert found == pytest.approx((shares[math.ceil(0.025 * 256) - 1], shares[-math.ceil(0.025 * 256)]))
    arm, full, rounded = figures(12)
    expected = stats.bootstrap(
        (np.array(arm), np.array(full), np.array(rounded)),
        lambda a, f, r, axis: 1 - (a - f).mean(axis) / (r - f).mean(axis),
        n_resamples=30_000,
        paired=True,
        method="percentile",
        rng=np.random.default_rng(1),
    )
    found = recovered_fraction(arm, full=full, rounded=rounded)
    assert found.standard_error is not None and found.bootstrap_interval is not None
    np.testing.assert_allclose(
        found.bootstrap_interval, expected.confidence_interval, atol=0.1 * found.standard_error
    )


def test_fiellers_interval_holds_the_truth_as_often_as_it_says() -> None:
    """3 seeds, 2000 studies: the percentile bootstrap holds it far less often, as its documentation warns."""
    held = 0
    resampled = 0
    for seed in range(2000):
        arm, full, rounded = figures(3, seed=seed)
        found = recovered_fraction(arm, full=full, rounded=rounded)
        # The set without two ends, where rounding's cost does not differ from zero significantly, is counted
        # as it is: by the test at the truth.
        x = np.subtract(arm, full)
        y = np.subtract(rounded, full)
        held += (
            p_value_of_zero(x - 0.4 * y) > 0.05
            if found.fieller_interval is None
            else (found.fieller_interval[0] < 0.6 < found.fieller_interval[1])
        )
        resampled += (
            found.bootstrap_interval is not None
            and found.bootstrap_interval[0] < 0.6 < found.bootstrap_interval[1]
        )
    assert abs(held / 2000 - 0.95) < 0.015 and resampled / 2000 < 0.85


def test_where_there_is_nothing_to_recover() -> None:
    arm = [1.4, 1.42, 1.41]
    full = [1.5, 1.51, 1.52]
    rounded = [1.5, 1.5, 1.51]
    found = recovered_fraction(arm, full=full, rounded=rounded)
    assert (
        found.fraction is None
        and found.fieller_interval is None
        and found.bootstrap_interval is None
        and not found.is_above_zero
    )
    assert recovered_fraction(arm, full=full, rounded=rounded, lower_is_better=False).fraction is not None


def test_higher_can_be_better() -> None:
    arm, full, rounded = figures(5)
    turned = recovered_fraction(
        [-value for value in arm],
        full=[-value for value in full],
        rounded=[-value for value in rounded],
        lower_is_better=False,
    )
    found = recovered_fraction(arm, full=full, rounded=rounded)
    assert turned.fraction == pytest.approx(found.fraction) and turned.fieller_interval == pytest.approx(
        found.fieller_interval
    )


def test_worse_than_rounding_is_below_zero() -> None:
    arm, full, rounded = figures(5, share=-2.0)
    found = recovered_fraction(arm, full=full, rounded=rounded)
    assert found.is_below_zero and not found.is_above_zero


def test_no_noise_is_no_evidence() -> None:
    found = recovered_fraction([1.1, 1.3, 1.7], full=[1.0, 1.2, 1.6], rounded=[1.3, 1.5, 1.9])
    assert (
        found.fraction == pytest.approx(2 / 3)
        and found.standard_error is None
        and found.fieller_interval is None
    )
    assert not found.is_above_zero


def test_what_makes_no_pairs_is_refused() -> None:
    with pytest.raises(ValueError, match="do not make pairs"):
        recovered_fraction([1.0, 2.0], full=[1.0, 2.0, 3.0], rounded=[1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="train at least 2 seeds"):
        recovered_fraction([1.0], full=[1.0], rounded=[1.0])
