"""Distillation within a train step: loss weights of the step, the loss, and the state of the divergence.

Dims: B rows, T time.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from slmjax import losses
from slmjax.data.batch import Batch
from slmjax.distill.config import DistillConfig

# Folded into a step's key for divergences that draw tokens; the keys of dropout are folded from small
# numbers.
DRAWS = 0x5EED


def distill_weights_at(
    distill: DistillConfig | None,
    step: Array,
    *,
    total_steps: int,
    state: Mapping[str, Array],
    key: Array,
    z_loss: float | Float[Array, ""] = 0.0,
) -> losses.DistillWeights | None:
    """Return the loss weights and the temperature of a step; None without distillation.

    A weight that never changes is a float, which is compiled in.

    Args:
      distill: the schedules.
      step: number of steps before this one.
      total_steps: steps of the run.
      state: state of the divergence before the step.
      key: random key of the step.
      z_loss: coefficient of the squared log-normaliser, within the cross entropy.
    """
    if distill is None:
        return None
    needs_key = distill.divergence.draws_at_random
    return losses.DistillWeights(
        soft=distill.weight.at(step, total_steps=total_steps),
        hard=distill.hard_weight.at(step, total_steps=total_steps),
        z_loss=z_loss,
        temperature=distill.temperature.at(step, total_steps=total_steps),
        state=state,
        key=jax.random.key_data(jax.random.fold_in(key, DRAWS)) if needs_key else None,
    )


def batch_loss(
    distill: DistillConfig,
    hidden: Float[Array, "B T D"],
    head: losses.Head,
    batch: Batch,
    teachers: Sequence[losses.TeacherOutput],
    *,
    weights: losses.DistillWeights,
    chunk_size: int | None,
) -> tuple[Float[Array, ""], losses.Metrics]:
    """Return the distillation loss summed over the scored targets of a batch, and sums for the log."""
    return losses.distill_loss(
        hidden,
        head,
        teachers,
        distill.loss_config,
        batch.targets,
        batch.loss_mask,
        weights=weights,
        draws=token_numbers(batch) if distill.divergence.draws_at_random else None,
        chunk_size=chunk_size,
    )


def token_numbers(batch: Batch) -> UInt32[Array, "B T 2"]:
    """Return two numbers that no other token of the data has: its row of the dataset, its position there."""
    # From the data and not from the batch: the draws are the same on any mesh and after a resume.
    rows = jnp.broadcast_to(batch.row_ids[:, None], batch.tokens.shape)
    positions = jax.lax.broadcasted_iota(jnp.int32, batch.tokens.shape, 1)
    return jnp.stack([rows, positions], axis=-1).astype(jnp.uint32)


def updated_state(
    distill: DistillConfig | None,
    state: Mapping[str, Array],
    sums: Mapping[str, Array],
    *,
    num_targets: Array,
    progress: Array,
) -> dict[str, Array]:
    """Return the state of the divergence after a step; unchanged where no teacher was compared.

    Args:
      distill: the divergence.
      state: the state before the step.
      sums: metrics of `batch_loss` over the global batch.
      num_targets: scored targets of the global batch.
      progress: fraction of the run's steps that come before this one.
    """
    if distill is None or "divergence" not in sums:
        return dict(state)
    # The mean over the global batch, so that the state does not depend on accumulation or devices.
    mean = sums["divergence"] / jnp.maximum(num_targets, 1.0)
    new = distill.divergence.updated_state(state, value=mean, progress=progress)
    # Without a scored target the mean is 0, which would look like a perfect student.
    return {name: jnp.where(num_targets > 0, value, state[name]) for name, value in new.items()}


def weight_metrics(weights: losses.DistillWeights | None) -> dict[str, Any]:
    """Return the loss weights of a step and the state of the divergence under their names in the log."""
    if weights is None:
        return {}
    metrics = {
        "soft_weight": jnp.asarray(weights.soft, jnp.float32),
        "hard_weight": jnp.asarray(weights.hard, jnp.float32),
        "temperature": jnp.asarray(weights.temperature, jnp.float32),
    }
    return metrics | {f"divergence_{name}": value for name, value in weights.state.items()}
