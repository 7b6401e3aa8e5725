"""Is a deep and thin model better than a shallow and wide one, at equal parameters?

    slmjax ablate experiments/depth_study.py

Models of half, one and two times the base's depth have the same number of parameters outside the embedding. A
learning rate that suits one shape may not suit another, so the question is asked twice: each arm at its own
best rate, and with CompleteP, by which the base's rate holds for all shapes.
"""

import dataclasses
import math
from typing import Any

from study_base import SIZES, base

from slmjax.models import Parameterization
from slmjax.studies import Arm, Dimension, LearningRates, Match, Quantity, Study

RATES = (1e-2, 2e-2, 4e-2)  # of optim.lr; Muon's own rate is half of it, as in the base
MIXERS = "model.stack.*.pattern.*.mixer"


def shape(size: str, num_layers: int) -> dict[str, Any]:
    """Return the changes of a model of this depth, whose width keeps depth times width squared.

    The number of heads stays, so that heads are wide where the model is. The feed-forward layers are matched.
    """
    dims = SIZES[size]
    head_dim = 2 * round(dims.head_dim * math.sqrt(dims.num_layers / num_layers) / 2)
    width = head_dim * dims.embed_dim // dims.head_dim
    hidden_dim = 8 * round(dims.hidden_dim * width / dims.embed_dim / 8)
    return {
        "model.stack.0.repeats": num_layers,
        "model.embed_dim": width,
        f"{MIXERS}.head_dim": head_dim,
        "model.stack.*.pattern.*.ffn.hidden_dim": hidden_dim,
    }


def study(size: str = "small") -> tuple[Study, ...]:
    """Return two studies of the same shapes."""
    dims = SIZES[size]
    depths = (dims.num_layers, dims.num_layers // 2, 2 * dims.num_layers)
    shapes = {f"{depth} layers": shape(size, depth) for depth in depths}
    baseline, shallow, deep = shapes
    completep = {
        "model.parameterization": Parameterization.COMPLETEP,
        "model.base_width": dims.embed_dim,
        "model.base_depth": dims.num_layers,
        "model.base_head_dim": dims.head_dim,
    }
    question = "Is a deep and thin model better than a shallow and wide one, at equal parameters"
    tuned = Study(
        name=f"depth-tuned-{size}",
        question=f"{question}, each at its own best learning rate?",
        base=base(size),
        arms=tuple(Arm(name=name, changes=changes) for name, changes in shapes.items()),
        seeds=(0, 1, 2),
        baseline=baseline,
        matched=(Match(quantity=Quantity.NON_EMBEDDING_PARAMETERS, by=Dimension.FFN),),
        tune=LearningRates(rates=RATES, seeds=(1000,)),
        comparisons=((deep, shallow),),
        smallest_effect=0.015,
    )
    return tuned, dataclasses.replace(
        tuned,
        name=f"depth-completep-{size}",
        question=f"{question}, with CompleteP?",
        arms=tuple(Arm(name=name, changes=changes | completep) for name, changes in shapes.items()),
        tune=None,
    )
