"""The arms of a study: an experiment to train, or models derived from those of another arm without training.

arm = Arm(name="full precision", experiment=continued)   # an Experiment, or a function of the seed
rules = (QuantRule(paths=".", weight=preset("q4_0")),)
derived = Derived(name="rounded", source="full precision", recipe=RoundToNearest(rules=rules))
"""

import abc
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

from slmjax.training.experiment import Experiment


def directory_name(name: str) -> str:
    """An arm's name as a directory can have it. Raises ValueError if nothing of it is left."""
    if not (kept := re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.")):
        raise ValueError(f"an arm is named {name!r}: give it a name with letters or digits")
    return kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the things that are compared: a training."""

    name: str  # as tables show it; its letters, digits and dots name the directory of its runs
    experiment: (
        Experiment | Callable[[int], Experiment]
    )  # or one for each seed; seeds and the place of runs are set by the study

    def __post_init__(self) -> None:
        directory_name(self.name)

    @property
    def directory(self) -> str:
        """The name as a directory can have it."""
        return directory_name(self.name)

    def of_seed(self, seed: int) -> Experiment:
        """The experiment of a seed, as it was given."""
        return self.experiment if isinstance(self.experiment, Experiment) else self.experiment(seed)


class Derivation(abc.ABC):
    """How a model is made of a trained one: subclasses are frozen dataclasses, by whose fields a study knows
    whether it has changed.
    """

    @abc.abstractmethod
    def make(self, model: Path, out: Path) -> None:
        """Writes into `out`, which is not there yet, what `load_model` opens; `model` is a run directory, or
        what another recipe wrote.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Derived:
    """An arm whose members are made of another arm's: rounded after training, for one. They are evaluated as
    those were.
    """

    name: str  # as an arm's
    source: str  # the arm that they are made of, which stands before this one
    recipe: Derivation  # how

    def __post_init__(self) -> None:
        directory_name(self.name)

    @property
    def directory(self) -> str:
        """The name as a directory can have it."""
        return directory_name(self.name)
