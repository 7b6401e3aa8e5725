"""Noise of two-way tables, against scipy, statsmodels and least squares."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.regression.linear_model import OLS

from slmjax.studies.statistics.results_table import Rules
from slmjax.studies.statistics.two_way import (
    brown_forsythe,
    excess_noise,
    fit_two_way,
    own_variances,
    pool_noise,
)
from slmjax.studies.statistics.verdicts import judge
from tests.studies.statistics.tables import against_first, table


@pytest.mark.parametrize("missing", [(), ((0, 0),), ((0, 0), (1, 0), (2, 3), (3, 1), (3, 2))])
def test_residuals_are_those_of_a_linear_model(missing: tuple[tuple[int, int], ...]) -> None:
    values = np.random.default_rng(0).normal(size=(4, 5)) + 3
    for cell in missing:
        values[cell] = np.nan
    rows, columns = np.nonzero(np.isfinite(values))
    design = np.concatenate([np.eye(4)[rows], np.eye(5)[columns][:, 1:]], axis=1)
    expected = OLS(values[rows, columns], design).fit()
    fit = fit_two_way(values)
    np.testing.assert_allclose(fit.residuals[rows, columns], expected.resid, atol=1e-12)
    assert fit.degrees_of_freedom == expected.df_resid == 12 - len(missing)
    assert fit.variance == pytest.approx(expected.scale)


def test_parts_that_share_no_seed_have_levels_of_their_own() -> None:
    values = np.full((4, 4), np.nan)
    values[:2, :2] = [[1.0, 2.0], [1.5, 2.0]]
    values[2:, 2:] = [[8.0, 5.0], [6.0, 5.0]]
    assert fit_two_way(values).degrees_of_freedom == 2
    # Cells that are alone tell nothing.
    assert fit_two_way(np.array([[1.0, np.nan], [np.nan, 2.0]])).variance is None
    assert fit_two_way(np.full((2, 3), np.nan)).degrees_of_freedom == 0


def test_rounding_is_no_noise() -> None:
    values = np.array([[1.1], [1.2], [2.3]]) + [0.1, 0.3, 0.7]
    assert fit_two_way(values).sum_of_squares == 0
    assert not pool_noise(values).is_apart.any()


def test_variances_of_arms_add_up() -> None:
    values = np.random.default_rng(0).normal(size=(5, 4))
    fit = fit_two_way(values)
    own = own_variances(values, fit)
    assert own.mean() == pytest.approx(fit.variance)
    assert np.isnan(own_variances(np.array([[1.0, 2.0], [1.5, np.nan]]), fit_two_way(values[:2, :2]))[1])


def test_the_brown_forsythe_test_is_scipys() -> None:
    residuals = np.random.default_rng(0).normal(size=(4, 6)) * [[1], [1], [2], [1]]
    expected = stats.levene(*residuals, center="median").pvalue
    assert brown_forsythe(residuals) == pytest.approx(expected)
    residuals[1, 2:] = np.nan
    expected = stats.levene(*[row[np.isfinite(row)] for row in residuals], center="median").pvalue
    assert brown_forsythe(residuals) == pytest.approx(expected)
    assert brown_forsythe(residuals[:2]) is None
    assert brown_forsythe(np.zeros((4, 3))) is None


def test_excess_noise_is_the_same_with_and_without_missing_cells() -> None:
    """A complete table is tested by a formula, an incomplete one by leaving arms out."""
    values = np.random.default_rng(0).normal(size=(5, 4))
    # An arm of a single value has no residual, and changes nothing but the path that is taken.
    extended = np.concatenate([values, [[7.0, np.nan, np.nan, np.nan]]])
    np.testing.assert_allclose(excess_noise(extended)[:5], excess_noise(values), rtol=1e-9)
    assert excess_noise(extended)[5] == 1
    # By hand: the contrast of the first arm and the mean of the others.
    contrast = values[0] - values[1:].mean(axis=0)
    excess = 4 / 5 * 3 * contrast.var(ddof=1)
    rest = fit_two_way(values[1:]).sum_of_squares
    assert excess + rest == pytest.approx(fit_two_way(values).sum_of_squares)
    assert excess_noise(values)[0] == pytest.approx(stats.f.sf(excess / 3 / (rest / 9), 3, 9))


def test_a_noisy_arm_is_named_and_judged_by_its_own() -> None:
    values = np.random.default_rng(1).normal(size=(6, 5)) * 0.1
    values[2] *= 60
    judged = judge(table(values), against_first(6), Rules())
    assert judged.noise.noisy == ("c",) and "c" in judged.noise.apart
    for judgement in judged.comparisons:
        assert judgement is not None
        assert judgement.degrees_of_freedom == (
            4 if judgement.arm in judged.noise.apart else 4 * (5 - len(judged.noise.apart))
        )
    # The pool is not far from the noise of the other arms.
    assert judged.noise.deviation is not None and judged.noise.deviation < 0.25
    own = judged.noise.own["c"]
    assert own > 10 * judged.noise.deviation


def test_an_arm_set_apart_counts_with_no_more_than_the_cap() -> None:
    values = np.random.default_rng(2).normal(size=(6, 5))
    values[2] *= 1000
    pool = pool_noise(values)
    assert pool.is_noisy.tolist() == [False, False, True, False, False, False] and pool.is_apart[2]
    rest = fit_two_way(values[~pool.is_apart])
    left_out = 20 - rest.degrees_of_freedom
    cap = float(stats.f.isf(0.01, 4, rest.degrees_of_freedom))
    assert rest.variance is not None and pool.degrees_of_freedom == rest.degrees_of_freedom
    assert pool.variance == pytest.approx((rest.sum_of_squares + left_out * cap * rest.variance) / 20)
    # The cap is no more than what there is: without a noisy arm, nothing is added.
    calm = np.delete(values, 2, axis=0)
    pooled = pool_noise(calm).variance
    whole = fit_two_way(calm).variance
    assert pooled is not None and whole is not None and pooled <= whole * (1 + 1e-12)


def test_noisy_arms_do_not_hide_each_other() -> None:
    values = np.random.default_rng(1).normal(size=(8, 5))
    values[2] *= 30
    values[5] *= 300
    assert pool_noise(values).is_noisy.tolist() == [i in (2, 5) for i in range(8)]


def test_of_two_arms_neither_is_noisier() -> None:
    values = np.random.default_rng(1).normal(size=(2, 5)) * [[1], [50]]
    assert not pool_noise(values).is_apart.any()
