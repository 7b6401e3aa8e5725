"""Uncertainty by seeds and by documents, against known deviations and a two-way analysis of variance."""

import math

import numpy as np
import pandas
import pytest
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm

from slmjax.studies.statistics.documents import Advice, difference_sources
from slmjax.studies.statistics.samples import paired_difference


def scores(
    seeds: int, documents: int, *, of_seeds: float, of_documents: float, of_both: float, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums of two arms with known deviations of their difference per unit of weight."""
    draws = np.random.default_rng(seed)
    weights = draws.integers(50, 150, size=documents).astype(float)
    base = 1.5 + 0.2 * draws.normal(size=documents) + 0.01 * draws.normal(size=(seeds, 1))
    difference = (
        -0.02
        + of_seeds * draws.normal(size=(seeds, 1))
        + of_documents * draws.normal(size=documents)
        + of_both * draws.normal(size=(seeds, documents))
    )
    return (base + difference) * weights, base * weights, weights


def test_components_are_those_of_an_analysis_of_variance() -> None:
    arm, against, _ = scores(4, 12, of_seeds=0.01, of_documents=0.03, of_both=0.02)
    weights = np.full(12, 100.0)
    sources = difference_sources(arm, against, weights)
    values = (arm - against) / 100
    rows, columns = np.indices(values.shape)
    frame = pandas.DataFrame({"y": values.ravel(), "seed": rows.ravel(), "document": columns.ravel()})
    squares = anova_lm(ols("y ~ C(seed) + C(document)", frame).fit())["mean_sq"]
    within = squares["Residual"]
    assert sources.interaction_variance == pytest.approx(within)
    assert sources.seed_variance == pytest.approx(max((squares["C(seed)"] - within) / 12, 0))
    assert sources.document_variance == pytest.approx(max((squares["C(document)"] - within) / 4, 0))


def test_the_error_of_seeds_is_that_of_the_paired_test() -> None:
    arm, against, weights = scores(5, 40, of_seeds=0.01, of_documents=0.03, of_both=0.02)
    sources = difference_sources(arm, against, weights)
    metrics = [values.sum(axis=1) / weights.sum() for values in (arm, against)]
    expected = paired_difference(*(values.tolist() for values in metrics))
    assert sources.difference == pytest.approx(expected.mean)
    assert sources.seed_error == pytest.approx(expected.standard_error)
    assert sources.interval[0] < sources.difference < sources.interval[1]


def test_known_deviations_are_estimated() -> None:
    estimates = [
        difference_sources(*scores(6, 80, of_seeds=0.01, of_documents=0.05, of_both=0.02, seed=seed))
        for seed in range(3)
    ]
    for name, expected in (("seed", 0.01), ("document", 0.05), ("interaction", 0.02)):
        mean = np.mean([getattr(sources, f"{name}_variance") for sources in estimates])
        # Weights vary by a third, which adds to the parts of documents.
        assert expected / 2 < math.sqrt(mean) < 1.5 * expected


def test_advice_follows_the_larger_source() -> None:
    for of_seeds, of_documents, expected in ((0.03, 0.01, Advice.MORE_SEEDS), (0.001, 0.1, Advice.MORE_TEXT)):
        sources = difference_sources(
            *scores(4, 50, of_seeds=of_seeds, of_documents=of_documents, of_both=0.001)
        )
        assert sources.advice is expected
        assert sources.error == pytest.approx(sources.error_with(seeds=4, documents=50))
        assert sources.error_with(seeds=8, documents=100) < sources.error
        # The bootstrap has about the width of the error.
        width = (sources.interval[1] - sources.interval[0]) / 2 / 1.96
        assert 0.5 * sources.error < width < 1.5 * sources.error
    same = np.ones((2, 3))
    assert difference_sources(same, same, np.ones(3)).advice is Advice.NEITHER


def test_wrong_scores_are_refused() -> None:
    good = np.ones((2, 3))
    for arm, weights, message in (
        (np.ones((2, 4)), np.ones(3), "give both arms the same seeds and documents"),
        (good, np.ones(2), "each document one weight"),
        (good * math.nan, np.ones(3), "not all finite"),
        (good, -np.ones(3), "must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            difference_sources(arm, good, weights)
    with pytest.raises(ValueError, match="1 seeds and 3 documents"):
        difference_sources(good[:1], good[:1], np.ones(3))
