"""A 124M decoder for a single accelerator: bfloat16, 0.5M tokens a step.

    slmjax train experiments/slm_124m.py --data.path 'corpus/*.jsonl'

Not measured on an accelerator: steps, batch size and learning rate are the usual ones for this size.
"""

import dataclasses

from slmjax.models import Precision, Remat, zoo
from slmjax.training import BpeTokenizer, DataConfig, EvalConfig, Experiment, OptimConfig, RunConfig, Schedule


def experiment() -> Experiment:
    """Return a model of the size of GPT-2 small, with current layers."""
    model = dataclasses.replace(zoo.slm_124m(), precision=Precision.BFLOAT16, remat=Remat.DOTS)
    return Experiment(
        model=model,
        data=DataConfig(sequence_length=1024, batch_size=512, heldout_fraction=0.005),
        tokenizer=BpeTokenizer(vocab_size=50_257),
        optim=OptimConfig(lr=6e-4, warmup_steps=700, schedule=Schedule.WSD, accumulation_steps=16),
        eval=EvalConfig(every=500, batch_size=32, max_documents=1000),
        run=RunConfig(name="slm-124m", steps=19_000),
    )
