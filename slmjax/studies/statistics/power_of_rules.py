"""Power of comparisons as the rules of a study judge them: variance, Holm's first level, fixed looks.

    level_of_test(rules, 3, comparisons=8)                             # of a single test, with 3 seeds
    seeds_that_resolve(0.01, 0.004, rules, comparisons=8, arms=9)      # of fixed looks, the first that does

Without looks, any number of seeds may be chosen before the study begins. With looks, verdicts are drawn at
their numbers of seeds alone, each at the level that alpha spending leaves to it: a number of seeds between
two looks resolves nothing, and one after the last look is another study. The power of a look is that of its
own test. Verdicts of earlier looks add to it, so that it is a little more.

Deviations are those of one pair's difference, as in `power.py`.
"""

from collections.abc import Callable

from slmjax.studies.statistics.power import (
    POWER,
    power_of_difference,
    power_of_equality,
    seeds_for_equality,
    seeds_needed,
    smallest_resolved,
)
from slmjax.studies.statistics.results_table import Rules
from slmjax.studies.statistics.sequential import nominal_levels


def level_of_test(rules: Rules, seeds: int, *, comparisons: int) -> float:
    """Return the two-sided level of one test that Holm's correction makes first, of so many comparisons.

    Raises:
      ValueError: the rules have looks, and none with this number of seeds.
    """
    level = (1 - rules.confidence) / comparisons
    # The looks of a test are spent at its own level, which is not the same fraction at every look.
    return (
        level
        if not rules.looks
        else nominal_levels(rules.looks, level=level, spending=rules.spending)[_look(rules, seeds)]
    )


def level_of_equality(rules: Rules, seeds: int, *, comparisons: int) -> float:
    """Return the level of each of the two one-sided tests for equality, as `level_of_test` does."""
    level = (1 - rules.confidence) / comparisons
    if not rules.looks:
        return level
    # Nominal levels are two-sided.
    return nominal_levels(rules.looks, level=2 * level, spending=rules.spending)[_look(rules, seeds)] / 2


def _look(rules: Rules, seeds: int) -> int:
    if seeds not in rules.looks:
        raise ValueError(f"there is no look at {seeds} seeds: looks are {', '.join(map(str, rules.looks))}")
    return rules.looks.index(seeds)


def seeds_that_count(rules: Rules, seeds: int) -> int:
    """Return the number of seeds that verdicts are drawn from: with looks, of the latest one, 0 before it."""
    return seeds if not rules.looks else max((look for look in rules.looks if look <= seeds), default=0)


def smallest_difference(
    deviation: float, seeds: int, rules: Rules, *, comparisons: int, degrees_of_freedom: float | None = None
) -> float:
    """Return the smallest true difference that these seeds, or this look, resolve 4 times in 5.

    Raises:
      ValueError: as for `smallest_resolved` and `level_of_test`.
    """
    level = level_of_test(rules, seeds, comparisons=comparisons)
    return smallest_resolved(deviation, seeds, 1, degrees_of_freedom, level, variance=rules.variance)


def power_for(
    effect: float,
    deviation: float,
    seeds: int,
    rules: Rules,
    *,
    comparisons: int,
    degrees_of_freedom: float | None = None,
) -> float:
    """Return the probability that these seeds, or this look, resolve an effect.

    Raises:
      ValueError: as for `power_of_difference` and `level_of_test`.
    """
    level = level_of_test(rules, seeds, comparisons=comparisons)
    return power_of_difference(
        effect, deviation, seeds, 1, degrees_of_freedom, level, variance=rules.variance
    )


def seeds_that_resolve(
    effect: float, deviation: float, rules: Rules, *, comparisons: int, arms: int, after: int = 0
) -> int | None:
    """Return the number of seeds that resolve an effect 4 times in 5.

    Args:
      effect: true mean difference.
      deviation: true standard deviation of one pair's difference.
      rules: by which verdicts are drawn.
      comparisons: number of them.
      arms: whose residuals are pooled; 2 for a pair that is judged by its own differences.
      after: of fixed looks, only those with more seeds count.

    Returns:
      without looks None if over 1,000 are needed; with looks None if none of those left resolves it.
    """
    if not rules.looks:
        level = 1 - rules.confidence
        return seeds_needed(
            effect, deviation, comparisons=comparisons, arms=arms, level=level, variance=rules.variance
        )

    def power_at(seeds: int) -> float:
        degrees = (arms - 1) * (seeds - 1)
        return power_for(effect, deviation, seeds, rules, comparisons=comparisons, degrees_of_freedom=degrees)

    return _first_look(rules, after, power_at)


def seeds_that_show_equality(
    margin: float,
    deviation: float,
    rules: Rules,
    *,
    effect: float = 0.0,
    comparisons: int,
    arms: int,
    after: int = 0,
) -> int | None:
    """Return the number of seeds that show 4 times in 5 that a difference is within the margin.

    The other arguments and the result are those of `seeds_that_resolve`; `effect` is the true difference.
    """
    if not rules.looks:
        return seeds_for_equality(
            margin,
            deviation,
            effect=effect,
            comparisons=comparisons,
            arms=arms,
            level=1 - rules.confidence,
            variance=rules.variance,
        )

    def power_at(seeds: int) -> float:
        level = level_of_equality(rules, seeds, comparisons=comparisons)
        degrees = (arms - 1) * (seeds - 1)
        return power_of_equality(
            margin, deviation, seeds, 1, degrees, level, effect=effect, variance=rules.variance
        )

    return None if abs(effect) >= margin else _first_look(rules, after, power_at)


def _first_look(rules: Rules, after: int, power_at: Callable[[int], float]) -> int | None:
    return next((look for look in rules.looks if look > after and power_at(look) >= POWER), None)
