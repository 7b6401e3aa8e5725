"""Is a deep and thin model better than a shallow and wide one, at equal parameters?

    slmjax ablate experiments/depth_study.py

Models of 2, 4 and 8 layers have the same number of parameters outside the embedding, by their widths. A
learning rate that suits one shape may not suit another, so the question is asked twice: each arm at its own
best rate, and with CompleteP, by which the base's rate holds for all shapes.
"""

from study_base import SIZES, base

from slmjax.models import Parameterization
from slmjax.studies import Arm, Dimension, LearningRates, Match, Quantity, Study

RATES = (5e-3, 1e-2, 2e-2, 4e-2)  # of optim.lr; Muon's own rate is half of it, as in the base


def study(size: str = "small") -> tuple[Study, ...]:
    """Return two studies of the same shapes."""
    dims = SIZES[size]
    middle = dims.num_layers

    def arms(**parameterization: object) -> tuple[Arm, ...]:
        further = {f"model.{name}": value for name, value in parameterization.items()}
        return tuple(
            Arm(name=f"{depth} layers", changes={"model.stack.0.repeats": depth, **further})
            for depth in (middle, middle // 2, 2 * middle)
        )

    completep = arms(
        parameterization=Parameterization.COMPLETEP, base_width=dims.embed_dim, base_depth=middle
    )
    matched = (Match(quantity=Quantity.NON_EMBEDDING_PARAMETERS, by=Dimension.WIDTH, tolerance=0.03),)
    question = "Is a deep and thin model better than a shallow and wide one, at equal parameters"
    return (
        Study(
            name=f"depth-tuned-{size}",
            question=f"{question}, each at its own best learning rate?",
            base=base(size),
            arms=arms(),
            seeds=(0, 1, 2),
            baseline=f"{middle} layers",
            matched=matched,
            tune=LearningRates(rates=RATES, seeds=(1000,)),
            comparisons=((f"{2 * middle} layers", f"{middle // 2} layers"),),
            smallest_effect=0.01,
        ),
        Study(
            name=f"depth-completep-{size}",
            question=f"{question}, with CompleteP?",
            base=base(size),
            arms=completep,
            seeds=(0, 1, 2),
            baseline=f"{middle} layers",
            matched=matched,
            comparisons=((f"{2 * middle} layers", f"{middle // 2} layers"),),
            smallest_effect=0.01,
        ),
    )
