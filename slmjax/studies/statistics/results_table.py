"""What a verdict is drawn from: a table of one metric, arms by seeds, and the rules fixed beforehand.

    table = Table(arms=("base", "wide"), seeds=(0, 1, 2), values=values, diverged=diverged)
    rules = Rules(equal_within=0.005)

A: arms, S: seeds.
"""

import dataclasses
import enum
import math

import numpy as np
from jaxtyping import Bool, Float


class VarianceRule(enum.Enum):
    """The variance of the difference of two arms."""

    OWN = "own"  # of the pair's own differences
    POOLED = "pooled"  # residual of the two-way table arms x seeds
    LARGER = "larger"  # the larger of both, with the pooled degrees of freedom


class VarianceSource(enum.Enum):
    """What the standard error of a comparison comes from, and how many degrees of freedom it has."""

    OWN = "own"  # the pair's own differences, their number less 1
    POOLED = "pooled"  # the residual of the two-way table, with its degrees of freedom
    # the pair's own differences, since their variance is the larger of both; the degrees of the pooled one,
    # as in `VarianceRule.LARGER`
    OWN_LARGER = "own, larger than pooled"
    # the pair's own differences, their number less 1: an arm is noisier than the others, or may be
    OWN_UNEQUAL = "own, unequal noise"


class Correction(enum.Enum):
    """How p values are adjusted for the number of comparisons."""

    HOLM = "Holm"  # tests for a difference alone (`samples.holm`)
    # tests for a difference and for equality within a margin together (`samples.holm_with_equality`), which
    # is stricter: most p values are multiplied by the number of comparisons
    CLOSED = "closed test"


class Spending(enum.Enum):
    """How the probability of a false verdict is spent over fixed looks (Lan and DeMets, 1983)."""

    OBRIEN_FLEMING = "obrien_fleming"  # nearly all at the last look
    POCOCK = "pocock"  # about as much at each look


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """Everything that turns a table into verdicts, fixed before the first result is seen."""

    confidence: float = 0.95  # of intervals; the probability of any false verdict is at most 1 - confidence
    lower_is_better: bool = True
    equal_within: float | None = None  # largest difference that counts as none; None: nothing is called equal
    smallest_effect: float | None = None  # the smallest difference worth having, for power
    looks: tuple[int, ...] = ()  # numbers of seeds at which verdicts are drawn; empty: once, at the end
    spending: Spending = Spending.OBRIEN_FLEMING  # over the looks
    variance: VarianceRule = VarianceRule.LARGER

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise ValueError(
                f"confidence is {self.confidence}: give a fraction between 0 and 1, such as 0.95"
            )
        for name in ("equal_within", "smallest_effect"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}: give a difference of the metric above 0, or none")
        if self.looks and (min(self.looks) < 2 or list(self.looks) != sorted(set(self.looks))):
            raise ValueError(
                f"looks are {self.looks}: give numbers of seeds from 2 on in rising order, such as 3, 5, 8"
            )

    @property
    def correction(self) -> Correction:
        """How p values are adjusted for the number of comparisons."""
        return Correction.HOLM if self.equal_within is None else Correction.CLOSED


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """One metric of every arm with every seed."""

    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    values: Float[np.ndarray, "A S"]  # float64; NaN where there is no value
    diverged: Bool[np.ndarray, "A S"]  # runs that diverged, which have no value

    def __post_init__(self) -> None:
        shape = (len(self.arms), len(self.seeds))
        if self.values.shape != shape or self.diverged.shape != shape:
            raise ValueError(
                f"a table of {shape[0]} arms and {shape[1]} seeds has values of shape {self.values.shape} "
                f"and divergence of shape {self.diverged.shape}"
            )

    def row(self, arm: str) -> Float[np.ndarray, " S"]:
        """Return the values of an arm by seed."""
        return self.values[self.arms.index(arm)]
