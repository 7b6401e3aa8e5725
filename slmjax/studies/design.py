"""What a study fixes beforehand besides its arms: budgets, equal quantities, learning rates to tune over.

parameters = Match(quantity=Quantity.PARAMETERS, by=Dimension.FFN)
matched = (parameters, Match(quantity=Quantity.FLOPS, by=Dimension.STEPS))
tune = LearningRates(factors=(0.25, 0.5, 1, 2, 4), seeds=(1000,))
"""

import dataclasses
import enum
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """The metric that must be equal for all arms for a fair comparison."""

    metric: str = "tokens"  # of each run, over all of its sessions: tokens, seconds, step
    tolerance: float = 0.0  # largest difference between arms of a seed, as a fraction of the largest value

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 1:
            raise ValueError(
                f"the budget's tolerance is {self.tolerance}: give a fraction from 0 to below 1, such as 0.02"
            )


class Quantity(enum.Enum):
    """What arms may have in common."""

    TOKENS = "tokens"  # trained on
    FLOPS = "flops"  # of the whole training, counted from the traced step
    SECONDS = "seconds"  # on this device
    PARAMETERS = "parameters"
    NON_EMBEDDING_PARAMETERS = "non_embedding_parameters"
    ACTIVE_PARAMETERS = "active_parameters"  # those that a token uses: of experts the chosen ones
    DEPLOYED_BYTES = "deployed_bytes"  # of the parameters as stored in their formats
    CACHE_BYTES = "cache_bytes"  # of the decoding cache, per sequence of context_length tokens
    EPOCHS = "epochs"  # over the unique text


class Dimension(enum.Enum):
    """What an arm may change to match."""

    STEPS = "steps"  # run.steps
    WIDTH = "width"  # model.embed_dim; feed-forward layers keep their ratio to it
    DEPTH = "depth"  # repeats of the layer groups
    FFN = "ffn"  # hidden widths of the feed-forward layers


_SIZES = (Dimension.WIDTH, Dimension.DEPTH, Dimension.FFN)
# The dimensions that each quantity depends on.
_DEPENDS_ON: Mapping[Quantity, tuple[Dimension, ...]] = {
    Quantity.TOKENS: (Dimension.STEPS,),
    Quantity.FLOPS: (Dimension.STEPS, *_SIZES),
    # By sizes, each candidate would have to be compiled and timed.
    Quantity.SECONDS: (Dimension.STEPS,),
    Quantity.PARAMETERS: _SIZES,
    Quantity.NON_EMBEDDING_PARAMETERS: _SIZES,
    Quantity.ACTIVE_PARAMETERS: _SIZES,
    Quantity.DEPLOYED_BYTES: _SIZES,
    Quantity.CACHE_BYTES: (Dimension.WIDTH, Dimension.DEPTH),
    Quantity.EPOCHS: (Dimension.STEPS,),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Match:
    """A quantity that all arms have as the baseline has it."""

    quantity: Quantity
    by: Dimension  # what the other arms change
    tolerance: float = 0.01  # largest difference from the baseline, as a fraction of it
    # names of arms that come as near as they can, and are compared even outside the tolerance
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 1:
            raise ValueError(
                f"the tolerance of {self.quantity.value} is {self.tolerance}: give a fraction from 0 to "
                "below 1, such as 0.01"
            )
        if self.by not in (dimensions := _DEPENDS_ON[self.quantity]):
            raise ValueError(
                f"{self.quantity.value} cannot be matched by {self.by.value}: use "
                f"{' or '.join(dimension.value for dimension in dimensions)}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearningRates:
    """Learning rates that each arm is tried at before it is judged at its best one.

    The rate is `optim.lr`; `optim.muon_lr` and `optim.scale_lr` keep their ratio to it.
    """

    rates: tuple[float, ...] = ()  # the same for all arms, such as powers of two of one rate
    # or multiples of each arm's own rate, such as (0.25, 0.5, 1, 2, 4): arms with other optimizers
    factors: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (1000,)  # that choose; none may be a seed of the study

    def __post_init__(self) -> None:
        if bool(self.rates) == bool(self.factors):
            raise ValueError(
                f"rates to tune over are {self.rates} and their factors {self.factors}: give one of both"
            )
        grid = self.rates or self.factors
        if len(set(grid)) < max(3, len(grid)) or min(grid) <= 0:
            raise ValueError(f"rates to tune over are {grid}: give at least 3 above 0, each once")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"the tuning seeds are {self.seeds}: give at least one, and each only once")

    def grid(self, own: float) -> tuple[float, ...]:
        """Return the rates of an arm whose own rate is `own`, in rising order."""
        return tuple(sorted(self.rates or (factor * own for factor in self.factors)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recovery:
    """The roles of arms in a report on what training recovers of the cost of quantization."""

    reference: str  # the arm in full precision, trained for as long as the others
    # for each arm that may recover something: one or more arms with the reference rounded to its format
    rounded: Mapping[str, str | tuple[str, ...]]

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Each arm with each rounded arm that it is compared with."""
        return tuple(
            (arm, name)
            for arm, names in self.rounded.items()
            for name in ((names,) if isinstance(names, str) else names)
        )
