"""Where do a small model's parameters belong: in a second embedding table, or in layers of their own?

    slmjax ablate experiments/embeddings_study.py

A separate output table, and layers that are each used once, cost parameters. At equal parameters, tied
embeddings leave more for the feed-forward layers, and blocks that run twice make a model deeper.
"""

import dataclasses

from study_base import SIZES, base, decoder

from slmjax.models import HeadKind
from slmjax.studies import Arm, Dimension, Match, Quantity, Study
from slmjax.training import Experiment


def with_loops(experiment: Experiment, size: str, num_loops: int) -> Experiment:
    """Return the experiment with half of the layers, each run several times in a row."""
    (group,) = decoder(size, num_layers=SIZES[size].num_layers // 2).stack
    pattern = tuple(dataclasses.replace(block, num_loops=num_loops) for block in group.pattern)
    model = dataclasses.replace(experiment.model, stack=(dataclasses.replace(group, pattern=pattern),))
    return dataclasses.replace(experiment, model=model)


def study(size: str = "small") -> tuple[Study, ...]:
    """Return two studies: tied and untied tables, and blocks that are shared."""
    tables = Study(
        name=f"tied-embeddings-{size}",
        question="Is a separate output table worth its parameters?",
        base=base(size),
        arms=(Arm(name="tied"), Arm(name="untied", changes={"model.head": HeadKind.UNTIED})),
        seeds=(0, 1, 2),
        baseline="tied",
        matched=(Match(quantity=Quantity.PARAMETERS, by=Dimension.FFN),),
        smallest_effect=0.015,
    )
    half = SIZES[size].num_layers // 2
    sharing = Study(
        name=f"shared-blocks-{size}",
        question="Does running each block twice help a model of as many parameters?",
        base=base(size),
        arms=(
            Arm(name=f"{half} layers", changes=lambda start: with_loops(start, size, num_loops=1)),
            Arm(
                name=f"{half} layers, each twice", changes=lambda start: with_loops(start, size, num_loops=2)
            ),
            Arm(name=f"{2 * half} layers"),
        ),
        seeds=(0, 1, 2),
        baseline=f"{half} layers",
        comparisons=((f"{half} layers, each twice", f"{2 * half} layers"),),
        smallest_effect=0.015,
    )
    return tables, sharing
