"""Verdicts of tables, against scipy, against numbers worked by hand, and by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from slmjax.studies.statistics.results_table import Rules, Table, VarianceRule
from slmjax.studies.statistics.verdicts import judge


def table(values: list[list[float]], diverged: tuple[tuple[int, int], ...] = ()) -> Table:
    """A table of arms a, b, c, ... by seeds 0, 1, 2, ...; cells that diverged have no value."""
    array = np.array(values, dtype=np.float64)
    flags = np.zeros(array.shape, bool)
    for cell in diverged:
        array[cell] = np.nan
        flags[cell] = True
    return Table(
        arms=tuple("abcdefghi"[: len(array)]),
        seeds=tuple(range(array.shape[1])),
        values=array,
        diverged=flags,
    )


def test_two_arms_are_judged_by_the_paired_t_test() -> None:
    rows = np.random.default_rng(0).normal(size=(2, 4)) + [[0.0], [2.0]]
    (judgement,) = judge(table(rows.tolist()), [("a", "b")], Rules()).comparisons
    expected = stats.ttest_rel(rows[0], rows[1])
    assert judgement is not None
    assert judgement.p_value == judgement.adjusted_p == pytest.approx(expected.pvalue)
    assert judgement.interval == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert judgement.degrees_of_freedom == 3


def test_the_larger_variance_by_hand() -> None:
    """Residuals of b are the negative of those of a; c adds noise of its own."""
    values = [[1.0, 2.0, 3.0], [4.0, 5.5, 5.5], [0.0, 3.0, 0.0]]
    array = np.array(values)
    residuals = array - array.mean(1, keepdims=True) - array.mean(0) + array.mean()
    pooled = float(np.square(residuals).sum()) / 4
    own = float(np.var(array[1] - array[0], ddof=1))
    for rule, variance, degrees in (
        (VarianceRule.OWN, own, 2),
        (VarianceRule.POOLED, 2 * pooled, 4),
        (VarianceRule.LARGER, max(own, 2 * pooled), 4),
    ):
        judged = judge(table(values), [("b", "a"), ("c", "a")], Rules(variance=rule))
        judgement = judged.comparisons[0]
        assert judgement is not None and judged.noise.deviation == pytest.approx(math.sqrt(pooled))
        assert judgement.difference == pytest.approx(3) and judgement.degrees_of_freedom == degrees
        assert judgement.standard_error == pytest.approx(math.sqrt(variance / 3))
        assert judgement.p_value == pytest.approx(2 * stats.t.sf(3 / math.sqrt(variance / 3), degrees))
