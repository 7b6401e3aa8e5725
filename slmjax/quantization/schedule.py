"""What changes from step to step in quantization-aware training: warm-up, damping, frozen layers.

Warm-up: the fraction of the rounding error that weights have. Damping: a loss on the difference of weights
and their codes (Nagel et al. 2022). Frozen layers: the updates of one layer after another are masked out.

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
    """The settings of `QuantConfig` that depend on the step, with the steps at which they take effect."""

    first_step: int  # of quantization
    warmup_steps: int
    damping: float  # weight of the damping loss
    freeze_from: int | None  # the step after which the first layer is frozen; None where none is
    last_step: int

    def warmup_fraction(self, step: Int[Array, ""]) -> Float[Array, ""] | None:
        """Return the fraction of the rounding error in the step after `step`; None for all of it, always."""
        if self.warmup_steps == 0:
            return None
        # The first step has a part of the error already, and the last of the warm-up not yet all of it.
        return jnp.clip((step - self.first_step + 1) / (self.warmup_steps + 1), 0.0, 1.0)

    def num_frozen(self, step: Int[Array, ""], *, num_layers: int) -> Float[Array, ""]:
        """Return how many layers, counted from the first, are frozen in the step after `step`."""
        if self.freeze_from is None:
            return jnp.zeros(())
        # From the first on, so that the layers still trained adapt to inputs that no longer change.
        progress = (step - self.freeze_from) / max(self.last_step - self.freeze_from, 1)
        return jnp.where(progress < 0, 0.0, jnp.floor(progress * num_layers) + 1)

    def freeze_updates(
        self, updates: Any, step: Int[Array, ""], *, config: ModelConfig, paths: Iterable[str]
    ) -> dict[str, Array]:
        """Return updates, by stack path, with those of quantized weights in frozen layers set to zero.

        Updates of their quantizers' parameters are zero too. Layers are frozen one after another at even
        intervals, the first at `freeze_from`; tables outside the layers are trained to the end.

        Args:
          paths: stack paths of the quantized weights.
        """
        if self.freeze_from is None:
            return dict(updates)
        # Updates are masked, not gradients: moments are still updated, and weight decay is masked too.
        num_frozen = self.num_frozen(step, num_layers=config.num_layers)
        result = dict(updates)
        for path in paths:
            if (layers := layer_indices(config, path)) is None:
                continue
            # A mask for each layer of the stack: its program does not depend on the step.
            mask = (jnp.asarray(layers) >= num_frozen).astype(jnp.float32)
            for name in [name for name in updates if name == path or name.startswith(path + "/")]:
                update = updates[name]
                result[name] = update * mask.reshape(-1, *(1 for _ in update.shape[1:]))
        return result


def quant_schedule_of(config: QuantConfig, *, first_step: int, total_steps: int) -> QuantSchedule:
    """Return the schedule of a run of `total_steps` whose quantization begins at `first_step`."""
    # Freezing counts from the end of the run, but never before quantization begins.
    freeze_from = None if config.freeze_steps is None else max(first_step, total_steps - config.freeze_steps)
    return QuantSchedule(
        first_step=first_step,
        warmup_steps=config.warmup_steps,
        damping=config.damping,
        freeze_from=freeze_from,
        last_step=total_steps,
    )
