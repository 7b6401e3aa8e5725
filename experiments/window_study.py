"""How many layers may see a sliding window alone?

    slmjax ablate experiments/window_study.py

Layers with a window of an eighth of the sequence alternate with layers that see all of it: none, 1, 3 and 5
for each. Parameters, tokens and initial parameters are the same; the cache is smaller with more windows.
"""

import dataclasses

from study_base import SIZES, attention, base

from slmjax.models import BlockConfig, MlpConfig, stack_of
from slmjax.studies import Arm, Study
from slmjax.training import Experiment

NUM_LAYERS = 6  # divisible by all patterns
RATIOS = (0, 1, 3, 5)  # layers with a window for each layer that sees everything


def with_windows(experiment: Experiment, size: str, ratio: int) -> Experiment:
    """Return the experiment with `ratio` windowed layers before each one that sees everything."""
    dims = SIZES[size]
    full = BlockConfig(mixer=attention(size), ffn=MlpConfig(hidden_dim=dims.hidden_dim))
    window = dims.sequence_length // 8
    windowed = dataclasses.replace(full, mixer=dataclasses.replace(attention(size), window=window))
    # Of 3 to 1 with six layers, the last one sees everything too.
    blocks = [
        full if (layer + 1) % (ratio + 1) == 0 or layer == NUM_LAYERS - 1 else windowed
        for layer in range(NUM_LAYERS)
    ]
    return dataclasses.replace(
        experiment, model=dataclasses.replace(experiment.model, stack=stack_of(blocks))
    )


def study(size: str = "small") -> Study:
    """Return the study of four ratios."""
    arms = tuple(
        Arm(name=f"{ratio}:1", changes=lambda start, ratio=ratio: with_windows(start, size, ratio))
        for ratio in RATIOS
    )
    return Study(
        name=f"windows-{size}",
        question="How many layers may see a sliding window alone, without a loss of quality?",
        base=base(size),
        arms=arms,
        seeds=(0, 1, 2),
        baseline="0:1",
        equal_within=0.015,
        smallest_effect=0.015,
    )
