"""`Hyperparameters`: numbers of a train step that may be arrays, for members of a population.

An ordinary run takes these numbers from its settings, as constants of its program. The names are those of
`OptimConfig`, so that code of the step reads either.

Dims: S optimizer steps of a run.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Number = Any  # float, a constant of the program, or a Float32 scalar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """Numbers of the step of one member: constants where all members have the same, else arrays."""

    learning_rates: Float[Array, " S"]  # of each update, whatever the schedule
    lr: Number  # the peak, to which the other rates are relative
    muon_lr: Number
    scale_lr: Number | None
    weight_decay: Number
    betas: tuple[Number, Number]
    eps: Number
    muon_momentum: Number
    grad_clip: Number | None
    ema_decay: Number | None
    z_loss: Number

    def learning_rate(self, step: Int[Array, "..."]) -> Float[Array, "..."]:
        """Return the learning rate of an update; the first has number 0."""
        return jnp.take(self.learning_rates, step, mode="clip")
