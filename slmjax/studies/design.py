"""What a study fixes beforehand besides its arms: budgets, equal quantities, learning rates to tune over.

matched = (Match(quantity=Quantity.PARAMETERS, by="ffn"), Match(quantity=Quantity.FLOPS, by="steps"))
tune = LearningRates(rates=(5e-4, 1e-3, 2e-3), seeds=(1000,))
"""

import dataclasses
import enum


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

    STEPS = "steps"
    WIDTH = "width"
    DEPTH = "depth"
    FFN = "ffn"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Match:
    """A quantity that all arms have as the baseline has it."""

    quantity: Quantity
    by: Dimension  # what the other arms change
    tolerance: float = 0.01  # largest difference from the baseline, as a fraction of it

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 1:
            raise ValueError(
                f"the tolerance of {self.quantity.value} is {self.tolerance}: give a fraction from 0 to "
                "below 1, such as 0.01"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearningRates:
    """Learning rates that each arm is tried at before it is judged at its best one."""

    rates: tuple[float, ...]  # of `optim.lr`, each a multiple of the next lower one
    seeds: tuple[int, ...] = (1000,)  # that choose; none may be a seed of the study

    def __post_init__(self) -> None:
        if len(set(self.rates)) < max(3, len(self.rates)) or min(self.rates) <= 0:
            raise ValueError(f"rates to tune over are {self.rates}: give at least 3 above 0, each once")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"the tuning seeds are {self.seeds}: give at least one, and each only once")
