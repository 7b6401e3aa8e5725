"""Levels of fixed looks, against published boundaries and by simulation."""

import numpy as np
import pytest
from scipy import stats

from slmjax.studies.statistics.results_table import Spending
from slmjax.studies.statistics.sequential import nominal_levels, sequential_p_value, spent


@pytest.mark.parametrize(
    ("spending", "boundaries"),
    [
        (Spending.OBRIEN_FLEMING, [4.8769, 3.3569, 2.6803, 2.2898, 2.0310]),
        (Spending.POCOCK, [2.4380, 2.4268, 2.4101, 2.3966, 2.3859]),
    ],
)
def test_boundaries_are_the_published_ones(spending: Spending, boundaries: list[float]) -> None:
    """Five equally spaced looks at 0.05: Reboussin et al. (2000), Controlled Clinical Trials 21."""
    levels = nominal_levels((1, 2, 3, 4, 5), spending=spending)
    np.testing.assert_allclose(stats.norm.isf(np.array(levels) / 2), boundaries, atol=2e-4)


@pytest.mark.parametrize("spending", Spending)
def test_all_is_spent_at_the_last_look(spending: Spending) -> None:
    assert spent(1.0, level=0.05, spending=spending) == pytest.approx(0.05)
    assert spent(1.5, level=0.05, spending=spending) == pytest.approx(0.05)
    fractions = [spent(fraction, level=0.05, spending=spending) for fraction in (0.1, 0.5, 0.9)]
    assert fractions == sorted(fractions) and fractions[-1] < 0.05
    assert nominal_levels((4,), spending=spending) == pytest.approx((0.05,))


@pytest.mark.parametrize("spending", Spending)
def test_a_p_value_at_a_nominal_level_is_the_level(spending: Spending) -> None:
    looks = (3, 5, 8)
    for level in (0.05, 0.00625, 1e-6):
        for i, nominal in enumerate(nominal_levels(looks, level=level, spending=spending)):
            found = sequential_p_value([*([1.0] * i), nominal], looks, spending=spending)
            assert found == pytest.approx(level, rel=2e-3)
    # Levels rise together, so that a smaller p value is never less evidence.
    ladder = [nominal_levels(looks, level=level, spending=spending) for level in (1e-4, 1e-3, 0.01, 0.1)]
    assert (np.diff(ladder, axis=0) > 0).all()


def test_earlier_looks_stand() -> None:
    looks = (3, 5, 8)
    assert sequential_p_value([1e-5, 0.9], looks) == sequential_p_value([1e-5], looks)
    assert sequential_p_value([0.9, 0.9, 0.9], looks) == 1
    assert sequential_p_value([], looks) == 1
    assert sequential_p_value([0.0], looks) > 0


def test_wrong_looks_are_refused() -> None:
    for looks in ((), (3, 3), (5, 3)):
        with pytest.raises(ValueError, match="give rising numbers of seeds"):
            nominal_levels(looks)
    with pytest.raises(ValueError, match="2 p values for 1 looks"):
        sequential_p_value([0.1, 0.1], (3,))
    with pytest.raises(ValueError, match="is not a p value"):
        sequential_p_value([-0.1], (3,))
    with pytest.raises(ValueError, match="level is 1"):
        spent(0.5, level=1)
    with pytest.raises(ValueError, match="fraction is 0"):
        spent(0, level=0.05)


@pytest.mark.parametrize("spending", Spending)
def test_t_tests_at_the_nominal_levels_have_the_overall_level(spending: Spending) -> None:
    """Paired t tests with 3, 5 and 8 seeds by their own variance, at a level of 0.05."""
    draws = np.random.default_rng(0).normal(size=(100_000, 8))
    is_rejected = np.zeros(len(draws), bool)
    for look, level in zip((3, 5, 8), nominal_levels((3, 5, 8), spending=spending), strict=True):
        is_rejected |= stats.ttest_1samp(draws[:, :look], 0.0, axis=1).pvalue <= level
    # Within a tenth, and the noise of the simulation.
    assert 0.044 < is_rejected.mean() < 0.0565
