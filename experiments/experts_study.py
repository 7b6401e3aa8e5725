"""Is a mixture of experts better than a dense model, at equal active FLOPs and at equal parameters?

    slmjax ablate experiments/experts_study.py

The mixture has 8 experts, of which a token uses 2 that together are as wide as the dense model's feed-forward
layer: forward and backward passes need about the same FLOPs. The wide dense model has as many parameters as
the mixture in all. The report has the FLOPs of the whole step: Muon's work grows with all parameters.
"""

from study_base import SIZES, base

from slmjax.models import MoeConfig
from slmjax.studies import Arm, Study

FFNS = "model.stack.*.pattern.*.ffn"
NUM_EXPERTS = 8
NUM_SELECTED = 2


def study(size: str = "small") -> Study:
    """Return the study of the mixture and two dense models."""
    hidden_dim = SIZES[size].hidden_dim
    expert_dim = hidden_dim // NUM_SELECTED
    experts = MoeConfig(num_experts=NUM_EXPERTS, num_selected=NUM_SELECTED, hidden_dim=expert_dim)
    return Study(
        name=f"experts-{size}",
        question="Is a mixture of experts better than a dense model, at equal active FLOPs or parameters?",
        base=base(size),
        arms=(
            Arm(name="dense"),
            Arm(name="8 experts, 2 active", changes={FFNS: experts}),
            # The router's few parameters apart.
            Arm(name="wide dense", changes={f"{FFNS}.hidden_dim": NUM_EXPERTS * expert_dim}),
        ),
        seeds=(0, 1, 2),
        baseline="dense",
        comparisons=(("8 experts, 2 active", "wide dense"),),
        smallest_effect=0.015,
    )
