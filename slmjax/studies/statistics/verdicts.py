"""Verdicts: paired comparisons of a table of results, judged by rules that were fixed beforehand.

judged = judge(table, [("wide", "base")], rules)
judged.comparisons[0].verdict                                # Verdict.BETTER
"""

import dataclasses
import enum

from slmjax.studies.statistics.samples import Interval


class Verdict(enum.Enum):
    """Result of a comparison. "Not resolved" is not "equal": its interval may allow a large difference."""

    BETTER = "better"
    WORSE = "worse"
    EQUAL = "equal"  # within a margin that was stated beforehand
    NOT_RESOLVED = "not resolved"


def decide(mean: float, adjusted_p: float, *, lower_is_better: bool = True, level: float = 0.05) -> Verdict:
    """Return the verdict on an arm from its mean difference to another arm and the adjusted p value."""
    # Written as `not <=`, so that NaN resolves nothing.
    if not adjusted_p <= level or mean == 0:
        return Verdict.NOT_RESOLVED
    return Verdict.BETTER if (mean < 0) is lower_is_better else Verdict.WORSE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise:
    """The noise between seeds, by the two-way table arms x seeds."""

    deviation: float | None  # pooled, of one run; None where no two arms have two seeds in common
    degrees_of_freedom: int
    own: dict[str, float]  # of one run of each arm: of its residuals in the table
    noisy: tuple[str, ...]  # arms that the pooled deviation leaves out, and that are judged by their own
    equality_p: float | None  # Brown-Forsythe test that all arms are equally noisy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement:
    """One arm minus another, and what follows."""

    arm: str
    against: str
    seeds: tuple[int, ...]  # paired
    imputed: tuple[int, ...]  # of these: one arm has diverged, and the worst value stands for it
    difference: float  # mean over seeds
    standard_error: float
    degrees_of_freedom: float
    variance: str  # which deviation the standard error comes from: "own" or "pooled"
    interval: Interval  # of this comparison alone
    bootstrap_interval: Interval
    p_value: float  # two-sided, that the mean is zero
    adjusted_p: float  # by Holm, over all comparisons
    equal_p: float | None  # larger p of the two one-sided tests against the margin; None without a margin
    verdict: Verdict
    seeds_needed: int | None  # to resolve what is not resolved, if the difference stays as it is


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """The comparisons of a table, with the noise that they were judged by."""

    noise: Noise
    comparisons: tuple[Judgement | None, ...]  # None for a pair with fewer than two seeds
    level: float  # significance level spent at this look
    look: int | None  # number of seeds of the look that counts; None without fixed looks
