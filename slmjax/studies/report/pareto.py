"""Pareto fronts: arms that no other arm beats in quality at the same or a lower cost.

choices = [Choice("base", cost=1.0, quality=2.0), Choice("wide", cost=2.0, quality=1.5)]
pareto_front(choices, lower_is_better=True)
"""

import dataclasses
import math
from collections.abc import Sequence

from scipy import stats

from slmjax.studies.report.data import StudyReport
from slmjax.studies.report.sentences import BETTER, WORSE, quoted
from slmjax.studies.text_tables import in_words

MOST_PAIRS = 6  # pairs of arms that a sentence names; more are counted


@dataclasses.dataclass(frozen=True)
class Choice:
    """One arm with its cost and its quality."""

    name: str
    cost: float
    quality: float


def pareto_front(choices: Sequence[Choice], *, lower_is_better: bool) -> tuple[Choice, ...]:
    """Return the choices on the Pareto front by rising cost.

    A choice is on the front if no other costs at most as much and is at least as good, and better in one of
    both. Choices with equal cost and quality are both on it.
    """
    sign = 1.0 if lower_is_better else -1.0
    on_front: list[Choice] = []
    # By rising cost, and the best of an equal cost first: each must improve on all before it.
    for choice in sorted(choices, key=lambda item: (item.cost, sign * item.quality)):
        is_equal = bool(on_front) and (choice.cost, choice.quality) == (
            on_front[-1].cost,
            on_front[-1].quality,
        )
        if not on_front or sign * choice.quality < sign * on_front[-1].quality or is_equal:
            on_front.append(choice)
    return tuple(on_front)


def front_text(report: StudyReport, choices: Sequence[Choice], *, cost: str) -> str:
    """Return a sentence on the Pareto front over a cost, with the differences that its seeds do not resolve.

    The front is one of means. An arm next to it, or on it, may have its place by chance alone.
    """
    front = pareto_front(choices, lower_is_better=report.lower_is_better)
    names = ", ".join(quoted(choice.name) for choice in front)
    deciding = _deciding_pairs(front, choices, lower_is_better=report.lower_is_better)
    close = [(first, second) for first, second in deciding if not is_resolved(report, first, second)]
    if not close:
        return f"Pareto front over {cost}: {names}."
    metric = in_words(report.metric)
    if len(close) == len(deciding):
        return (
            f"Pareto front over {cost}: not resolved. By the means it is {names}, but these seeds resolve "
            f"no difference in {metric} that decides it."
        )
    pairs = "; ".join(f"{quoted(first)} and {quoted(second)}" for first, second in close[:MOST_PAIRS])
    further = f"; {len(close) - MOST_PAIRS} more pairs" if len(close) > MOST_PAIRS else ""
    return f"Pareto front over {cost}, by the means: {names}. Not resolved in {metric}: {pairs}{further}."


def _deciding_pairs(
    front: Sequence[Choice], choices: Sequence[Choice], *, lower_is_better: bool
) -> list[tuple[str, str]]:
    """Return the pairs of arms whose difference in quality decides which of them are on the front."""
    sign = 1.0 if lower_is_better else -1.0
    # Each arm of the front is worth its cost if it is better than the one before it.
    pairs = [
        (before.name, after.name)
        for before, after in zip(front, front[1:], strict=False)
        if before.cost < after.cost
    ]
    for choice in choices:
        if choice in front:
            continue
        beaten_by = [
            other
            for other in front
            if other.cost <= choice.cost and sign * other.quality <= sign * choice.quality
        ]
        best = min(beaten_by, key=lambda other: sign * other.quality)
        pairs.append((choice.name, best.name))
    return pairs


def is_resolved(report: StudyReport, first: str, second: str) -> bool:
    """Return whether the study resolves the difference of two arms in quality.

    The verdict counts where the two were compared. Other differences are compared with the pooled noise
    between seeds, at the confidence of the study and without correction for the number of pairs.
    """
    for item in report.comparisons:
        if {item.arm, item.against} == {first, second}:
            return item.verdict in (BETTER, WORSE)
    estimates = {arm.name: arm.metric for arm in report.arms}
    pair = [estimate for name in (first, second) if (estimate := estimates[name]) is not None]
    noise = report.noise
    if len(pair) < 2 or noise is None or not noise.deviation or not noise.degrees_of_freedom:
        return False
    error = noise.deviation * math.sqrt(sum(1 / estimate.num_values for estimate in pair))
    quantile = float(stats.t.isf((1 - report.confidence) / 2, noise.degrees_of_freedom))
    return abs(pair[0].mean - pair[1].mean) > quantile * error
