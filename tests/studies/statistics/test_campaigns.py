"""False discoveries over many studies, against statsmodels, by definition and by simulation."""

import functools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from statsmodels.stats.multitest import multipletests

from slmjax.studies.statistics.campaigns import benjamini_yekutieli, e_bh, e_value, mixed_e_value


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_benjamini_yekutieli_is_statsmodels(values: list[float]) -> None:
    expected = multipletests(values, method="fdr_by")[1]
    # Denormal numbers have few digits.
    np.testing.assert_allclose(benjamini_yekutieli(values), expected, rtol=1e-9, atol=1e-300)


def test_calibrators_have_an_expectation_of_one() -> None:
    def density(log: float, calibrator: Callable[[float], float]) -> float:
        # p is uniform without an effect; integrated over its logarithm.
        return calibrator(math.exp(log)) * math.exp(log)

    for calibrator in (e_value, mixed_e_value, functools.partial(e_value, power=0.2)):
        expectation, _ = integrate.quad(density, -600, 0, args=(calibrator,), limit=500)
        assert expectation == pytest.approx(1, abs=3e-3)
    assert e_value(0.01) == pytest.approx(5) and e_value(0.0) == mixed_e_value(0.0) == math.inf
    average = integrate.quad(lambda power: e_value(0.03, power=power), 0, 1)[0]
    assert mixed_e_value(0.03) == pytest.approx(average)
    assert mixed_e_value(1.0) == pytest.approx(0.5)
    assert mixed_e_value(0.9998) == pytest.approx(mixed_e_value(0.99995), abs=1e-3)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1000), min_size=1, max_size=8), st.sampled_from([0.05, 0.2, 0.5]))
def test_e_bh_by_definition(values: list[float], level: float) -> None:
    """Reject the k largest, with the largest k whose e value is at least m / (level k)."""
    ordered = sorted(values, reverse=True)
    num = len(values)
    fitting = [k for k in range(1, num + 1) if ordered[k - 1] * level * k >= num * (1 - 1e-12)]
    rejected = sum(value <= level * (1 + 1e-9) for value in e_bh(values))
    # Equal values at the boundary are rejected together.
    assert rejected == (max(fitting) if fitting else 0)


def test_false_discoveries_are_few() -> None:
    """Campaigns of 40 comparisons, 8 with an effect, all of which share a baseline."""
    draws = np.random.default_rng(0)
    has_effect = np.arange(40) < 8
    z = draws.normal(size=(400, 40)) + draws.normal(size=(400, 1)) + 4.5 * has_effect
    p_values = 2 * stats.norm.sf(abs(z) / math.sqrt(2))
    for adjust in (benjamini_yekutieli, lambda values: e_bh([e_value(value) for value in values])):
        rejected = np.array([adjust(row.tolist()) for row in p_values]) <= 0.1
        false = (rejected & ~has_effect).sum(axis=1) / np.maximum(rejected.sum(axis=1), 1)
        assert false.mean() < 0.1
        assert rejected[:, has_effect].mean() > 0.1


def test_what_is_no_p_or_e_value_is_refused() -> None:
    for call in (lambda: benjamini_yekutieli([1.5]), lambda: e_value(-0.1), lambda: mixed_e_value(2)):
        with pytest.raises(ValueError, match="is not a p value"):
            call()
    with pytest.raises(ValueError, match="is not an e value"):
        e_bh([math.nan])
    with pytest.raises(ValueError, match="power of the calibrator is 1"):
        e_value(0.5, power=1)
    assert benjamini_yekutieli([]) == e_bh([]) == ()
