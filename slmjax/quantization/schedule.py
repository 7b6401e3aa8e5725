"""How training eases into its formats: the share of the rounding error, the pull to the codes, and layers
that stop moving.

Dims: R layers of a stack.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from slmjax.models.architecture import ModelConfig
from slmjax.models.paths import layer_indices
from slmjax.quantization.rules import QuantConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantSchedule:
    """What of `QuantConfig` changes from step to step, with the steps at which it does."""

    first_step: int  # of quantization
    warmup_steps: int
    damping: float
    freeze_from: int | None  # the step after which the first layer stops; None where none does
    last_step: int

    def share(self, step: Int[Array, ""]) -> Float[Array, ""] | None:
        """How much of the rounding error there is in the step after `step`; None for all of it, always."""
        if self.warmup_steps == 0:
            return None
        return jnp.clip((step - self.first_step + 1) / (self.warmup_steps + 1), 0.0, 1.0)

    def num_stopped(self, step: Int[Array, ""], *, num_layers: int) -> Float[Array, ""]:
        """Return how many layers, counted from the first, do not move in the step after `step`."""
        if self.freeze_from is None:
            return jnp.zeros(())
        passed = (step - self.freeze_from) / max(self.last_step - self.freeze_from, 1)
        return jnp.where(passed < 0, 0.0, jnp.floor(passed * num_layers) + 1)

    def held(
        self, updates: Any, step: Int[Array, ""], *, config: ModelConfig, paths: Iterable[str]
    ) -> dict[str, Array]:
        """Updates, by stack path, without those of weights, and of what is learned beside them, in layers
        that have stopped.

        One layer after another stops, the first at once, at even distances; tables outside the layers move to
        the end.
        """
        if self.freeze_from is None:
            return dict(updates)
        num_stopped = self.num_stopped(step, num_layers=config.num_layers)
        result = dict(updates)
        for path in paths:
            if (layers := layer_indices(config, path)) is None:
                continue
            moves = (jnp.asarray(layers) >= num_stopped).astype(jnp.float32)
            for name in [name for name in updates if name == path or name.startswith(path + "/")]:
                update = updates[name]
                result[name] = update * moves.reshape(-1, *(1 for _ in update.shape[1:]))
        return result


def quant_schedule_of(config: QuantConfig, *, first_step: int, total_steps: int) -> QuantSchedule:
    """The easing of a run of so many steps whose quantization begins at a step."""
    freeze_from = None if config.freeze_steps is None else max(first_step, total_steps - config.freeze_steps)
    return QuantSchedule(
        first_step=first_step,
        warmup_steps=config.warmup_steps,
        damping=config.damping,
        freeze_from=freeze_from,
        last_step=total_steps,
    )
