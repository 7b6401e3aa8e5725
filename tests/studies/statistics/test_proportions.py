"""Exact intervals of proportions, against scipy and statsmodels."""

import pytest
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from slmjax.studies.statistics.proportions import exact_interval


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (0, 8), (1, 8), (4, 8), (8, 8), (13, 100)])
@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_intervals_are_those_of_scipy_and_statsmodels(successes: int, trials: int, confidence: float) -> None:
    found = exact_interval(successes, trials, confidence=confidence)
    expected = stats.binomtest(successes, trials).proportion_ci(confidence, method="exact")
    assert found == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert found == pytest.approx(
        proportion_confint(successes, trials, 1 - confidence, method="beta"), abs=1e-9
    )


def test_wrong_numbers_are_refused() -> None:
    for successes, trials in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match=f"{successes} of {trials}"):
            exact_interval(successes, trials)
    with pytest.raises(ValueError, match="confidence is 95"):
        exact_interval(1, 2, confidence=95)
