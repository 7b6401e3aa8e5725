"""The tiny experiment with its first block alone: what tests train that ask about the trainer and not about
the model.
"""

import dataclasses
from pathlib import Path

import slmjax


def one_layer(workplace: Path, directory: Path, *, steps: int, **optim) -> slmjax.Experiment:
    """In absolute places, with runs in `directory`/runs; it compiles in a moment."""
    tiny = slmjax.load_experiment(str(workplace / "tiny.py"))
    (segment,) = tiny.model.stack
    segment = dataclasses.replace(segment, pattern=segment.pattern[:1], repeats=1)
    return dataclasses.replace(
        tiny,
        model=dataclasses.replace(tiny.model, stack=(segment,)),
        data=dataclasses.replace(tiny.data, path=str(workplace / "text.txt")),
        optim=dataclasses.replace(tiny.optim, warmup_steps=0, **optim),
        run=dataclasses.replace(tiny.run, steps=steps, directory=str(directory / "runs"), sample_prompts=()),
    )
