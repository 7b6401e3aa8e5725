"""Does the normalisation of queries and keys help, and at which learning rates?

    slmjax ablate experiments/qk_norm_study.py

With and without the norm at the base's learning rate and at 8 times it: the norm bounds the attention scores,
which otherwise grow where the rate is high. A run that diverges is a result.
"""

from study_base import base

from slmjax.models import QkNorm
from slmjax.studies import Arm, Study

MULTIPLES = (1, 8)  # of the base's learning rates


def study(size: str = "small") -> Study:
    """Return the study: a comparison at each rate."""
    start = base(size)

    def arm(multiple: int, norm: QkNorm) -> Arm:
        return Arm(
            name=_name(multiple, norm),
            changes={
                "model.stack.*.pattern.*.mixer.qk_norm": norm,
                "optim.lr": multiple * start.optim.lr,
                "optim.muon_lr": multiple * start.optim.muon_lr,
            },
        )

    norms = (QkNorm.NONE, QkNorm.PER_HEAD)
    return Study(
        name=f"qk-norm-{size}",
        question="Does the normalisation of queries and keys help, and at which learning rates?",
        base=start,
        arms=tuple(arm(multiple, norm) for multiple in MULTIPLES for norm in norms),
        seeds=(0, 1, 2),
        baseline=_name(1, QkNorm.NONE),
        comparisons=tuple(
            (_name(multiple, QkNorm.PER_HEAD), _name(multiple, QkNorm.NONE)) for multiple in MULTIPLES[1:]
        ),
        smallest_effect=0.015,
    )


def _name(multiple: int, norm: QkNorm) -> str:
    return f"{'norm' if norm is not QkNorm.NONE else 'none'}, rate x {multiple}"
