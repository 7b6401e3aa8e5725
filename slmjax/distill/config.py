"""Settings of distillation: `objective.distill`.

DistillConfig(teachers=(TeacherConfig(path="runs/large"),))                             # forward KL alone,
temperature 1 DistillConfig(teachers=(...), divergence=Jsd(beta=0.9), weight=Ramp(start=0.5),
hard_weight=Ramp(start=0.5))
"""

import dataclasses
import enum
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from slmjax.config import near_names
from slmjax.losses import (
    DistillLossConfig,
    Divergence,
    ForwardKl,
    Jsd,
    ReverseKl,
    Sampled,
    SkewKl,
    SkewReverseKl,
    SoftCrossEntropy,
    Taid,
    TeacherMean,
    TopK,
    TotalVariation,
)
from slmjax.models.architecture import Precision
from slmjax.parallel.mesh import MeshConfig

DIVERGENCES: Mapping[str, type[Divergence]] = {
    "forward_kl": ForwardKl,
    "reverse_kl": ReverseKl,
    "jsd": Jsd,
    "skew_kl": SkewKl,
    "skew_reverse_kl": SkewReverseKl,
    "total_variation": TotalVariation,
    "soft_cross_entropy": SoftCrossEntropy,
    "taid": Taid,
    "top_k": TopK,
    "sampled": Sampled,
}


def divergence_of(name: str) -> Divergence:
    """The divergence of that name, as its defaults have it. Raises ValueError for another name."""
    if (found := DIVERGENCES.get(name.replace("-", "_"))) is None:
        raise ValueError(
            f"there is no divergence {name!r}.{near_names(name, DIVERGENCES)} There are "
            f"{', '.join(DIVERGENCES)}"
        )
    return found()


class RampShape(enum.Enum):
    """How a value goes from its start to its end."""

    LINEAR = "linear"
    COSINE = "cosine"  # slowly at first and at last


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ramp:
    """A number that may change over the steps of a run; undone steps count, so that what a step needs is
    known before it.
    """

    start: float = 1.0  # value at the first step
    end: float | None = None  # value at the end of the ramp and after it (none: it stays at `start`)
    steps: int | None = None  # length of the ramp in steps (none: the whole run)
    shape: RampShape = RampShape.LINEAR  # whether it goes evenly, or slowly at first and at last

    def __post_init__(self) -> None:
        if not all(math.isfinite(value) and value >= 0 for value in (self.start, self.last)):
            raise ValueError(f"a ramp goes between numbers of at least 0, got {self.start} and {self.end}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"a ramp takes at least 1 step, got {self.steps}")

    @property
    def last(self) -> float:
        """The value after the ramp."""
        return self.start if self.end is None else self.end

    @property
    def is_constant(self) -> bool:
        """Whether it never changes."""
        return self.last == self.start

    @property
    def is_zero(self) -> bool:
        """Whether it is 0 throughout."""
        return self.start == self.last == 0.0

    def at(self, step: Any, *, total_steps: int) -> Any:
        """The value at a step: a float of an int, an array of an array."""
        if self.is_constant:
            return self.start
        length = self.steps or total_steps
        share = min(step / length, 1.0) if isinstance(step, int) else jnp.minimum(step / length, 1.0)
        if self.shape is RampShape.COSINE:
            cosine = math.cos(math.pi * share) if isinstance(share, float) else jnp.cos(jnp.pi * share)
            share = 0.5 - 0.5 * cosine
        return self.start + (self.last - self.start) * share


class ShortContext(enum.Enum):
    """What is done with a teacher whose context is shorter than the rows of the data."""

    REFUSE = "refuse"
    WINDOW = "window"  # it reads them in windows that overlap


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """A trained model that a student learns from; it stays as it is."""

    path: str  # run directory, or directory of an imported model
    weight: float = 1.0  # its share in the mean of several teachers
    step: int | None = None  # checkpoint of a run (none: the newest)
    # in what it computes and keeps its matrices (none: as the student computes)
    precision: Precision | None = None

    def __post_init__(self) -> None:
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise ValueError(f"a teacher's weight must be above 0, got {self.weight}: leave the teacher out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Distillation: the loss is `weight` times the divergence from the teachers, plus `hard_weight` times the
    cross entropy.
    """

    teachers: tuple[TeacherConfig, ...]  # whom the student learns from; they have its tokenizer
    divergence: Divergence = ForwardKl()  # what is minimised of the teachers' and the student's distributions
    weight: Ramp = Ramp()  # multiplies the divergence
    hard_weight: Ramp = Ramp(start=0.0)  # multiplies the cross entropy on the text
    temperature: Ramp = Ramp()  # divides the logits of both sides in the divergence
    # multiply the divergence by the squared temperature, so that its gradient keeps its size
    scales_by_square: bool = True
    mean: TeacherMean = TeacherMean.LOGITS  # what is averaged over several teachers
    short_context: ShortContext = ShortContext.REFUSE  # for teachers whose context is shorter than the rows
    # tokens of context that their further windows repeat (none: a quarter window, at most 64)
    overlap: int | None = None
    mesh: MeshConfig | None = None  # of the teachers (none: the student's)
    # so many devices, the last ones, are the teachers' alone (none: all devices are shared)
    devices: int | None = None

    def __post_init__(self) -> None:
        if not self.teachers:
            raise ValueError(
                "distillation needs a teacher: name a run or an imported model, as in --teacher DIR"
            )
        if self.weight.last == self.hard_weight.last == 0.0:
            raise ValueError(
                "weight and hard_weight are both 0 in the end: there would be nothing to learn from. Keep "
                "one of them above 0"
            )
        if min(self.temperature.start, self.temperature.last) <= 0:
            raise ValueError(f"the temperature divides logits and must be above 0, got {self.temperature}")
        if self.devices is not None and (self.devices < 1 or self.mesh is None):
            raise ValueError(
                f"devices={self.devices} is for teachers with a mesh of their own: give their mesh as well, "
                "or leave it out"
            )

    @property
    def loss_config(self) -> DistillLossConfig:
        """Return the settings that are compiled into the loss."""
        return DistillLossConfig(
            divergence=self.divergence,
            mean=self.mean,
            teacher_weights=tuple(teacher.weight for teacher in self.teachers),
            scales_by_square=self.scales_by_square,
        )

    def uses_teachers(self, step: int, *, total_steps: int) -> bool:
        """Whether the step needs what the teachers say."""
        return self.weight.at(step, total_steps=total_steps) > 0.0
