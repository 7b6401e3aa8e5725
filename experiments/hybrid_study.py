"""Which token mixers, and how many layers of attention among them, suit a small model?

    slmjax ablate experiments/hybrid_study.py

Perplexity alone cannot choose a ratio: mixers with a state of fixed size may be as good on text, and fail to
recall what they read. So the same arms are trained on text, on recall and copying, and on the tracking of a
state; each study has its own verdicts, in bits per byte of what is scored: text, or answers.

All arms need the training FLOPs of full attention, matched by the feed-forward layers. Their decoding states
have about the bytes of its cache: each layer of Mamba-2 and Gated DeltaNet has a state as large as the keys
and values of one sequence, and windows leave room for more key-value heads. A short convolution keeps a few
tokens, whatever the budget.

The accuracy of a trained member at other lengths of examples:

    slmjax eval RUN --tasks recall,copy,parity,s3
"""

import dataclasses
from collections.abc import Sequence

from study_base import SIZES, attention, base, decoder

from slmjax.models import (
    BlockConfig,
    GatedDeltaNetConfig,
    Mamba2Config,
    MixerConfig,
    ShortConvolutionConfig,
    stack_of,
)
from slmjax.studies import Arm, Dimension, Match, Quantity, Study
from slmjax.training import Experiment, SyntheticSource, SyntheticTask, WeightedSource

NUM_LAYERS = 8  # the least that have seven layers to one of attention
BASELINE = "attention"


def mixers(size: str) -> dict[str, MixerConfig]:
    """Return one layer of each kind; the states of all but the convolution are equally large."""
    dims = SIZES[size]
    full = attention(size)
    assert full.num_kv_heads is not None
    # Numbers in the cache of a layer: keys and values of all tokens.
    numbers = 2 * full.num_kv_heads * dims.head_dim * dims.sequence_length
    heads = dims.embed_dim // dims.head_dim
    value_dim = 2 * dims.head_dim
    return {
        "attention": full,
        # Three windows and a full layer with twice the heads have the cache of four full layers.
        "window": attention(size, num_kv_heads=2 * full.num_kv_heads, window=dims.sequence_length // 3),
        "wide attention": attention(size, num_kv_heads=2 * full.num_kv_heads),
        "Mamba-2": Mamba2Config(head_dim=dims.head_dim, state_dim=numbers // (2 * dims.embed_dim)),
        "Gated DeltaNet": GatedDeltaNetConfig(
            num_heads=heads, key_dim=numbers // (heads * value_dim), value_dim=value_dim
        ),
        "convolution": ShortConvolutionConfig(),
    }


def with_layers(experiment: Experiment, layers: Sequence[MixerConfig]) -> Experiment:
    """Return the experiment with these mixers, first to last."""
    ffn = experiment.model.stack[0].pattern[0].ffn
    stack = stack_of([BlockConfig(mixer=mixer, ffn=ffn) for mixer in layers])
    return dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, stack=stack))


def layers_of(size: str) -> dict[str, list[MixerConfig]]:
    """Return the mixers of every arm, first layer to last."""
    kinds = mixers(size)
    full = kinds["attention"]
    delta = kinds["Gated DeltaNet"]

    def one_in(period: int, other: MixerConfig, attention: MixerConfig = full) -> list[MixerConfig]:
        return ([other] * (period - 1) + [attention]) * (NUM_LAYERS // period)

    return {
        BASELINE: [full] * NUM_LAYERS,
        "windows 3:1": one_in(4, kinds["window"], kinds["wide attention"]),
        "Mamba-2": [kinds["Mamba-2"]] * NUM_LAYERS,
        "Gated DeltaNet": [delta] * NUM_LAYERS,
        "convolution": [kinds["convolution"]] * NUM_LAYERS,
        "delta 1:1": one_in(2, delta),
        "delta 3:1": one_in(4, delta),
        "delta 7:1": one_in(8, delta),
    }


def on_tasks(experiment: Experiment, tasks: Sequence[SyntheticTask]) -> Experiment:
    """Return the experiment on examples of synthetic tasks instead of text."""
    sources = tuple(WeightedSource(source=SyntheticSource(task=task)) for task in tasks)
    data = dataclasses.replace(experiment.data, sources=sources)
    return dataclasses.replace(experiment, data=data)


def study(size: str = "small") -> tuple[Study, ...]:
    """Return three studies of the same arms: on text, on recall and copying, on tracking a state."""
    start = dataclasses.replace(base(size), model=decoder(size, num_layers=NUM_LAYERS))
    text = Study(
        name=f"hybrids-text-{size}",
        question="Which mixers, and how many layers of attention among them, predict text best?",
        base=start,
        arms=tuple(
            Arm(name=name, changes=lambda experiment, layers=layers: with_layers(experiment, layers))
            for name, layers in layers_of(size).items()
        ),
        seeds=(0, 1, 2),
        baseline=BASELINE,
        matched=(Match(quantity=Quantity.FLOPS, by=Dimension.FFN),),
        smallest_effect=0.015,
    )
    recall = dataclasses.replace(
        text,
        name=f"hybrids-recall-{size}",
        question="Which mixers, and how many layers of attention among them, recall and copy what they read?",
        base=on_tasks(start, (SyntheticTask.RECALL, SyntheticTask.COPY)),
    )
    tracking = dataclasses.replace(
        text,
        name=f"hybrids-tracking-{size}",
        question="Which mixers, and how many layers of attention among them, track a state?",
        base=on_tasks(start, (SyntheticTask.PARITY, SyntheticTask.S3)),
    )
    return text, recall, tracking
