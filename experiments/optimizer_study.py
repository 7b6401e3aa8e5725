"""Is Muon better than AdamW, each at its own best learning rate?

    slmjax ablate experiments/optimizer_study.py

Each optimizer is first trained at five learning rates with a seed that does not judge.
"""

from study_base import base

from slmjax.studies import Arm, LearningRates, Study
from slmjax.training import Optimizer

RATES = (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2)  # of optim.lr; Muon's own rate is half of it, as in the base


def study(size: str = "small") -> Study:
    """Return the study of two optimizers."""
    return Study(
        name=f"optimizers-{size}",
        question="Is Muon better than AdamW, each at its own best learning rate?",
        base=base(size),
        arms=(
            Arm(name="AdamW", changes={"optim.kind": Optimizer.ADAMW}),
            Arm(name="Muon", changes={"optim.kind": Optimizer.MUON}),
        ),
        seeds=(0, 1, 2),
        baseline="AdamW",
        tune=LearningRates(rates=RATES, seeds=(1000,)),
        smallest_effect=0.015,
    )
