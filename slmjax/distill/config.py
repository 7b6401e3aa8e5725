"""Settings of distillation: `objective.distill`.

    teachers = (TeacherConfig(path="runs/large"),)
    DistillConfig(teachers=teachers)                    # forward KL alone, at temperature 1
    DistillConfig(teachers=teachers, divergence=Jsd(beta=0.9), hard_weight=Ramp(start=0.5))

Weights and the temperature are schedules over the steps of a run (`Ramp`); `distill/objective.py` evaluates
them at a step.
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

# Names for the command line; an experiment file uses the classes.
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
    """Return the divergence of this name with its default settings. Raises ValueError for an unknown name."""
    if (kind := DIVERGENCES.get(name.replace("-", "_"))) is None:
        raise ValueError(
            f"there is no divergence {name!r}.{near_names(name, DIVERGENCES)} There are "
            f"{', '.join(DIVERGENCES)}"
        )
    return kind()


class RampShape(enum.Enum):
    """Course of a value from its start to its end."""

    LINEAR = "linear"
    COSINE = "cosine"  # slow at the beginning and at the end


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ramp:
    """A number that may change over the steps of a run.

    Skipped steps count: the value of a step is known before it runs, and with it whether the step needs the
    teachers.
    """

    start: float = 1.0  # value at the first step
    end: float | None = None  # value at the end of the ramp and after it (none: the value stays at `start`)
    steps: int | None = None  # length of the ramp in steps (none: all steps of the run)
    # course of the value: at a constant rate, or slowly at the beginning and at the end
    shape: RampShape = RampShape.LINEAR

    def __post_init__(self) -> None:
        if not all(math.isfinite(value) and value >= 0 for value in (self.start, self.last)):
            raise ValueError(f"a ramp goes between numbers of at least 0, got {self.start} and {self.end}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"a ramp takes at least 1 step, got {self.steps}")

    @property
    def last(self) -> float:
        """Return the value after the ramp."""
        return self.start if self.end is None else self.end

    @property
    def is_constant(self) -> bool:
        """Return True if the value never changes."""
        return self.last == self.start

    @property
    def is_zero(self) -> bool:
        """Return True if the value is 0 at every step."""
        return self.start == self.last == 0.0

    def at(self, step: Any, *, total_steps: int) -> Any:
        """Return the value at a step: a float for an int, an array for an array."""
        if self.is_constant:
            return self.start
        length = self.steps or total_steps
        progress = min(step / length, 1.0) if isinstance(step, int) else jnp.minimum(step / length, 1.0)
        if self.shape is RampShape.COSINE:
            is_float = isinstance(progress, float)
            cosine = math.cos(math.pi * progress) if is_float else jnp.cos(jnp.pi * progress)
            progress = 0.5 - 0.5 * cosine
        return self.start + (self.last - self.start) * progress


class ShortContext(enum.Enum):
    """Handling of a teacher whose context is shorter than the sequences of the data."""

    REFUSE = "refuse"
    WINDOW = "window"  # it reads them in overlapping windows


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """A trained model that a student learns from; its parameters do not change."""

    path: str  # run directory, or directory of an imported model
    weight: float = 1.0  # weight in the mean of several teachers
    step: int | None = None  # checkpoint of a run (none: the newest)
    # precision of its computation and of its stored matrices (none: the student's)
    precision: Precision | None = None

    def __post_init__(self) -> None:
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise ValueError(f"a teacher's weight must be above 0, got {self.weight}: leave the teacher out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Distillation: loss = `weight` * divergence from the teachers + `hard_weight` * cross entropy."""

    teachers: tuple[TeacherConfig, ...]  # models to learn from; they must have the student's tokenizer
    divergence: Divergence = ForwardKl()  # divergence between the teachers' and the student's distributions
    weight: Ramp = Ramp()  # multiplies the divergence
    hard_weight: Ramp = Ramp(start=0.0)  # multiplies the cross entropy on the text
    temperature: Ramp = Ramp()  # divides the logits of both sides in the divergence
    # multiply the divergence by the squared temperature, so that the size of its gradient does not change
    scales_by_square: bool = True
    mean: TeacherMean = TeacherMean.LOGITS  # what is averaged over several teachers
    # handling of teachers whose context is shorter than the sequences
    short_context: ShortContext = ShortContext.REFUSE
    # tokens of context that each further window repeats (none: a quarter of the window, at most 64)
    overlap: int | None = None
    mesh: MeshConfig | None = None  # mesh of the teachers (none: the student's)
    # number of devices, the last ones, that only the teachers use (none: all devices are shared)
    devices: int | None = None

    def __post_init__(self) -> None:
        if not self.teachers:
            raise ValueError(
                "distillation needs a teacher: name a run or an imported model, as in --teacher DIR"
            )
        # A weight may be 0 for a part of the run, but a loss of 0 at its end trains nothing.
        if self.weight.last == self.hard_weight.last == 0.0:
            raise ValueError(
                "weight and hard_weight are both 0 at the end of the run, so the loss would be 0: keep one "
                "of them above 0"
            )
        if min(self.temperature.start, self.temperature.last) <= 0:
            raise ValueError(f"the temperature divides logits and must be above 0, got {self.temperature}")
        # Without a mesh of their own the teachers run on the student's devices, all of them.
        if self.devices is not None and (self.devices < 1 or self.mesh is None):
            raise ValueError(
                f"devices={self.devices} is for teachers with a mesh of their own: set mesh as well, or "
                "leave devices out"
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
        """Return True if the loss of the step needs the teachers' outputs."""
        return self.weight.at(step, total_steps=total_steps) > 0.0
