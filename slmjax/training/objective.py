"""`ObjectiveConfig`: the loss that is minimised. `step.loss_terms` computes it."""

import dataclasses

from slmjax.distill.config import DistillConfig


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
