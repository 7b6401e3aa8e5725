"""Pareto fronts: arms that no other arm beats in quality at the same or a lower cost.

choices = [Choice("base", cost=1.0, quality=2.0), Choice("wide", cost=2.0, quality=1.5)]
pareto_front(choices, lower_is_better=True)
"""

import dataclasses
from collections.abc import Sequence


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
