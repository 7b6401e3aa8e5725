"""What distillation adds to a train step: its amounts at a step, its term of the loss, and its state from
step to step.

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

# folded into a step's key, for what divergences draw at random: dropout's keys are folded from small
# numbers
DRAWS = 0x5EED


def distill_weights_at(
    distill: DistillConfig | None, step: Array, *, total_steps: int, state: Mapping[str, Array], key: Array
) -> dict[str, Any] | None:
    """Weights, temperature, state and randomness of a step, in distillation; what is a number never changes,
    and is compiled in.

    Args:
      step: steps that came before.
      state: of the divergence.
      key: the step's.
    """
    if distill is None:
        return None
    ramps = {"soft": distill.weight, "hard": distill.hard_weight, "temperature": distill.temperature}
    found: dict[str, Any] = {name: ramp.at(step, total_steps=total_steps) for name, ramp in ramps.items()}
    drawn = (
        jax.random.key_data(jax.random.fold_in(key, DRAWS)) if distill.divergence.draws_at_random else None
    )
    return found | {"state": state, "key": drawn}


def soft_term(
    distill: DistillConfig,
    hidden: Float[Array, "B T D"],
    head: losses.Head,
    batch: Batch,
    teachers: Sequence[losses.TeacherOutput],
    *,
    amounts: Mapping[str, Any],
    z_loss: float,
    chunk_size: int | None,
) -> tuple[Float[Array, ""], losses.Metrics]:
    """The sum over scored targets that the student minimises, divergence and cross entropy weighted, and what
    is reported beside it.
    """
    draws = token_numbers(batch) if distill.divergence.draws_at_random else None
    return losses.sharded_divergence(
        hidden,
        head,
        teachers,
        distill.matching,
        batch.targets,
        batch.loss_mask,
        draws=draws,
        chunk_size=chunk_size,
        z_loss=z_loss,
        **amounts,
    )


def token_numbers(batch: Batch) -> UInt32[Array, "B T 2"]:
    """Two numbers that no other token of the data has: its row of the dataset and its place in that row."""
    rows = jnp.broadcast_to(batch.row_ids[:, None], batch.tokens.shape)
    places = jax.lax.broadcasted_iota(jnp.int32, batch.tokens.shape, 1)
    return jnp.stack([rows, places], axis=-1).astype(jnp.uint32)


def updated_state(
    distill: DistillConfig | None,
    state: Mapping[str, Array],
    sums: Mapping[str, Array],
    *,
    num_targets: Array,
    progress: Array,
) -> dict[str, Array]:
    """What the divergence remembers after a step, from its sum over the global batch; as before where there
    was nothing to compare.
    """
    if distill is None or "divergence" not in sums:
        return dict(state)
    new = distill.divergence.updated_state(
        state, value=sums["divergence"] / jnp.maximum(num_targets, 1.0), progress=progress
    )
    return {
        name: jnp.where(num_targets > 0, value, state[name]) for name, value in new.items()
    }  # 0 would pass for a perfect student


def reported(amounts: Mapping[str, Any] | None) -> dict[str, Array]:
    """The amounts of a step as the log has them; none without distillation."""
    if amounts is None:
        return {}
    names = {"soft": "soft_weight", "hard": "hard_weight", "temperature": "temperature"}
    found = {name: jnp.asarray(amounts[key], jnp.float32) for key, name in names.items()}
    return found | {f"divergence_{name}": value for name, value in amounts["state"].items()}
