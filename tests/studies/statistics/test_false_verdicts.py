"""Studies without an effect seldom have a verdict: simulations (in full: `benchmarks/verdicts.py`)."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from slmjax.studies.statistics.power import smallest_resolved
from slmjax.studies.statistics.results_table import Rules
from slmjax.studies.statistics.verdicts import Verdict, assess
from tests.studies.statistics.tables import against_first, table

STUDIES = 200
# The level, and two standard errors of the share of 200 studies.
AT_MOST = 0.05 + 2 * math.sqrt(0.05 * 0.95 / STUDIES)


def equal(draws: np.random.Generator) -> np.ndarray:
    return draws.normal(size=(STUDIES, 6, 3))


def one_arm_noisier(draws: np.random.Generator) -> np.ndarray:
    values = equal(draws)
    values[:, 2] *= 4
    return values


def heavy_tails(draws: np.random.Generator) -> np.ndarray:
    return draws.standard_t(3, size=(STUDIES, 6, 3))


@pytest.mark.parametrize("noise", [equal, one_arm_noisier, heavy_tails])
def test_false_verdicts_are_at_most_the_level(noise: Callable[[np.random.Generator], np.ndarray]) -> None:
    draws = np.random.default_rng(0)
    # Effects of seeds, which all arms share, make no difference.
    values = noise(draws) + draws.normal(size=(STUDIES, 1, 3))
    verdicts = [assess(table(study), against_first(6), Rules()).verdicts for study in values]
    share = np.mean([any(verdict is not Verdict.NOT_RESOLVED for verdict in study) for study in verdicts])
    assert share <= AT_MOST


def test_intervals_hold_the_difference_and_margins_are_kept() -> None:
    """Two arms differ by the margin: they are not equal, and the others not different."""
    draws = np.random.default_rng(1)
    margin = 2 * smallest_resolved(math.sqrt(2), 4, 5, 15)
    truth = np.array([0.0, margin, 0.0, margin, 0.0, 0.0])
    values = draws.normal(size=(STUDIES, 6, 4)) + truth[:, None]
    rules = Rules(equal_within=margin)
    outcomes = [assess(table(study), against_first(6), rules) for study in values]
    allowed = [Verdict.WORSE if difference else Verdict.EQUAL for difference in truth[1:]]
    false = [
        any(
            verdict not in (right, Verdict.NOT_RESOLVED)
            for verdict, right in zip(outcome.verdicts, allowed, strict=True)
        )
        for outcome in outcomes
    ]
    assert np.mean(false) <= AT_MOST
    # Each is resolved far more often than not.
    for i, right in enumerate(allowed):
        assert np.mean([outcome.verdicts[i] is right for outcome in outcomes]) > 0.8
