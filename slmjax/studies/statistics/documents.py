"""The uncertainty of a paired difference by source: seeds, and held-out text.

    sources = difference_sources(arm, against, weights)       # (S, D), (S, D), (D,)
    sources.seed_error, sources.text_error
    sources.advice                                            # Advice.MORE_SEEDS

The paired t test of a study asks whether the arms differ on this held-out text, whatever the seed. Other text
of the same kind would give another difference. Both uncertainties are estimated from the sums of each
document, so that one knows whether another seed or more text would be worth buying.

Every seed is evaluated on the same documents, so that seeds and documents are crossed. With w the weight of a
document (its bytes or tokens), y the difference of both arms' sums (of bits or nats), and R = sum(y) / sum(w)
the difference of the metric, the parts x = (y - R w) / mean(w) of each seed and document have a mean of
R_s - R over the documents of seed s. Their two-way table has components of variance of seeds, of documents
and of both together, a + b + c, which are estimated by mean squares. The mean difference has the variance
a / S + b / D + c / (S D).

S: seeds, D: documents.
"""

import dataclasses
import enum
import math

import numpy as np
from jaxtyping import Float

from slmjax.studies.statistics.samples import Interval, percentile_interval

NUM_DRAWS = 2000


class Advice(enum.Enum):
    """What would shrink the interval of the difference more."""

    MORE_SEEDS = "more seeds"
    MORE_TEXT = "more text"
    NEITHER = "neither: there is no noise"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DifferenceSources:
    """A paired difference of two arms, with its variance by source."""

    difference: float  # of the metric, per unit of weight
    num_seeds: int
    num_documents: int
    seed_variance: float  # of the difference of one seed on all text of this kind
    document_variance: float  # of the difference on one document of average weight, for all seeds
    interaction_variance: float  # of one seed on one document, beyond both
    seed_error: float  # standard error of the mean by seeds, on this text: that of the paired t test
    text_error: float  # by documents, for these seeds
    error: float  # for other seeds and other text
    interval: Interval  # bootstrap of seeds and documents together

    def error_with(self, *, seeds: int, documents: int) -> float:
        """Return the standard error for other seeds and other text, with other numbers of both."""
        return math.sqrt(
            self.seed_variance / seeds
            + self.document_variance / documents
            + self.interaction_variance / (seeds * documents)
        )

    @property
    def advice(self) -> Advice:
        """Whether doubling the seeds or doubling the text would shrink the error more."""
        seeds = self.error_with(seeds=2 * self.num_seeds, documents=self.num_documents)
        text = self.error_with(seeds=self.num_seeds, documents=2 * self.num_documents)
        if self.error == 0:
            return Advice.NEITHER
        return Advice.MORE_SEEDS if seeds <= text else Advice.MORE_TEXT


def difference_sources(
    arm: Float[np.ndarray, "_ _"],
    against: Float[np.ndarray, "_ _"],
    weights: Float[np.ndarray, " _"],
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> DifferenceSources:
    """Split the uncertainty of a paired difference into that of seeds and that of documents.

    Args:
      arm: sum of the loss over each document, by seed: "S D".
      against: the same of the other arm: "S D".
      weights: what the metric is divided by, bytes or tokens of each document: "D".
      confidence: of the interval.
      seed: of the bootstrap.

    Raises:
      ValueError: the shapes differ, there are fewer than two seeds or documents, a value is not finite, or a
        weight is negative.
    """
    _check(arm, against, weights)
    difference = np.asarray(arm, np.float64) - np.asarray(against, np.float64)
    weights = np.asarray(weights, np.float64)
    num_seeds, num_documents = difference.shape
    ratio = float(difference.sum(axis=1).mean() / weights.sum())
    # Linearized at the ratio: its derivative by the sum of the weights is -R / sum(w).
    parts = (difference - ratio * weights) / weights.mean()
    of_seeds = parts.mean(axis=1)
    of_documents = parts.mean(axis=0)
    residuals = parts - of_seeds[:, None] - of_documents + parts.mean()
    within = float(np.square(residuals).sum()) / ((num_seeds - 1) * (num_documents - 1))
    between_seeds = float(of_seeds.var(ddof=1))
    between_documents = float(of_documents.var(ddof=1))
    # Estimates of small components may come out negative.
    seed_variance = max(between_seeds - within / num_documents, 0.0)
    document_variance = max(between_documents - within / num_seeds, 0.0)
    sources = DifferenceSources(
        difference=ratio,
        num_seeds=num_seeds,
        num_documents=num_documents,
        seed_variance=seed_variance,
        document_variance=document_variance,
        interaction_variance=within,
        seed_error=math.sqrt(between_seeds / num_seeds),
        text_error=math.sqrt(between_documents / num_documents),
        error=0.0,
        interval=_bootstrap(difference, weights, confidence=confidence, seed=seed),
    )
    return dataclasses.replace(sources, error=sources.error_with(seeds=num_seeds, documents=num_documents))


def _bootstrap(
    difference: Float[np.ndarray, "S D"], weights: Float[np.ndarray, " D"], *, confidence: float, seed: int
) -> Interval:
    """Return the percentile interval of the ratio if seeds and documents are both resampled (Owen, 2007).

    It is somewhat too wide, since the noise of both together counts more than once, and too narrow for few
    seeds, as any bootstrap.
    """
    draws = np.random.default_rng(seed)
    num_seeds, num_documents = difference.shape
    # The multiplicity of each seed and document, by which sums are weighted.
    seeds = draws.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=NUM_DRAWS)
    ratios = np.empty(NUM_DRAWS)
    # One at a time: a matrix of all draws would have as many rows as documents, of which there may be many.
    for i in range(NUM_DRAWS):
        documents = np.bincount(draws.integers(num_documents, size=num_documents), minlength=num_documents)
        ratios[i] = seeds[i] @ (difference @ documents) / (num_seeds * (weights @ documents))
    return percentile_interval(ratios, confidence=confidence)


def _check(
    arm: Float[np.ndarray, "_ _"], against: Float[np.ndarray, "_ _"], weights: Float[np.ndarray, " _"]
) -> None:
    if arm.shape != against.shape or arm.ndim != 2 or weights.shape != arm.shape[1:]:
        raise ValueError(
            f"scores have shapes {arm.shape} and {against.shape}, weights {weights.shape}: give both "
            "arms the same seeds and documents, and each document one weight"
        )
    if min(arm.shape) < 2:
        raise ValueError(
            f"{arm.shape[0]} seeds and {arm.shape[1]} documents do not show both sources of noise: give at "
            "least 2 of each"
        )
    if not (np.isfinite(arm).all() and np.isfinite(against).all() and np.isfinite(weights).all()):
        raise ValueError("scores or weights are not all finite: leave out the seeds of runs that diverged")
    if weights.min() < 0 or weights.sum() <= 0:
        raise ValueError("weights of documents must not be negative, nor all 0: give their bytes or tokens")
