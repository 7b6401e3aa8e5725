"""The objective: counts from the batch alone, and named sums that are divided by them."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from slmjax import losses
from slmjax.data.batch import Batch
from slmjax.distill import objective as distillation
from slmjax.distill.config import DistillConfig
from slmjax.models.definition import Definition, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The loss: cross entropy, its regulariser, and distillation."""

    z_loss: float = 0.0  # coefficient of the squared log-normaliser of the logits (1e-4 keeps it near zero)
    # tokens whose logits exist at once on a device (none: about 256 MB of them)
    chunk_size: int | None = None
    # distillation from teachers (none: cross entropy on the text alone)
    distill: DistillConfig | None = None

    def __post_init__(self) -> None:
        if self.z_loss < 0:
            raise ValueError(f"objective.z_loss must not be negative, got {self.z_loss}")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(
                f"objective.chunk_size must be at least 1, or none to have it chosen, got {self.chunk_size}"
            )
        if self.z_loss > 0 and self.distill is not None and self.distill.hard_weight.is_zero:
            raise ValueError(
                f"objective.z_loss={self.z_loss} is part of the cross entropy, which has no weight here: "
                "set it to 0, or give objective.distill.hard-weight.start a weight"
            )


CROSS_ENTROPY = ObjectiveConfig()


# The objective ----------------------------------------------------------------------------------------------
def count_targets(batch: Batch) -> dict[str, Float[Array, ""]]:
    """Return the denominators of a batch: scored targets, real tokens, UTF-8 bytes of the scored targets."""
    return {
        "targets": jnp.sum(batch.loss_mask),
        "tokens": jnp.sum(batch.segment_ids > 0).astype(jnp.float32),
        "bytes": jnp.sum(batch.num_bytes).astype(jnp.float32),
    }


def loss_terms(
    definition: Definition,
    objective: ObjectiveConfig,
    params: Params,
    buffers: Params,
    batch: Batch,
    *,
    key: Array | None,
    teacher_outputs: Sequence[losses.TeacherOutput] = (),
    weights: losses.DistillWeights | None = None,
) -> tuple[dict[str, tuple[Float[Array, ""], str]], dict[str, Array]]:
    """Return the sums that make up the loss, each with the name of its count, and sums that are only reported.

    Args:
      params: as modules compute with them (`Definition.transform`).
      key: randomness of dropout; None where there is none.
      teacher_outputs: of this batch; none where the divergence has no weight.
      weights: loss weights of distillation (`distill.objective.distill_weights_at`); None without it.
    """
    model = definition.merge_transformed(params, buffers)
    output = model(batch.tokens, segment_ids=batch.segment_ids, positions=batch.positions, key=key)
    # Load balancing of experts, and whatever else layers add to the loss, is a mean over all tokens.
    auxiliary = {name: (value, "tokens") for name, value in output.losses.items()}
    if objective.distill is not None and teacher_outputs and weights is not None:
        value, sums = distillation.batch_loss(
            objective.distill,
            output.hidden,
            output.head,
            batch,
            teacher_outputs,
            weights=weights,
            chunk_size=objective.chunk_size,
        )
        terms = {"distillation": (value, "targets")}
    else:
        value, sums = losses.cross_entropy(
            output.hidden,
            output.head,
            batch.targets,
            batch.loss_mask,
            z_loss=objective.z_loss,
            chunk_size=objective.chunk_size,
        )
        if weights is not None:
            value = value * weights.hard
        terms = {"cross_entropy": (value, "targets")}
    return terms | auxiliary, {**sums, **output.metrics}
