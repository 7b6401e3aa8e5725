"""The base of the architecture studies in this folder: a decoder like `nano`'s, at two sizes.

    base("small")                     # 4 layers of width 128, 0.4M tokens: half a minute on 2 CPU cores
    base("large")                     # 8 layers of width 384, 10M tokens: minutes on an accelerator
    decoder("small", num_layers=6)    # the model alone, with other dims

The text is Python's standard library, so that no download is needed; the metric is bits per byte of held-out
documents.
"""

import dataclasses
from typing import Any

import slmjax
from slmjax.models import (
    AttentionConfig,
    BlockConfig,
    LayerGroup,
    MlpConfig,
    ModelConfig,
    Precision,
    QkNorm,
)
from slmjax.training import BpeTokenizer, DataConfig, Experiment


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """Dims of the model and length of the training."""

    embed_dim: int
    num_layers: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    sequence_length: int
    batch_size: int
    steps: int
    precision: Precision


SIZES = {
    "small": Size(
        embed_dim=128,
        num_layers=4,
        head_dim=32,
        hidden_dim=320,
        vocab_size=2048,
        sequence_length=256,
        batch_size=4,
        steps=360,
        precision=Precision.FLOAT32,
    ),
    "large": Size(
        embed_dim=384,
        num_layers=8,
        head_dim=64,
        hidden_dim=1024,
        vocab_size=4096,
        sequence_length=512,
        batch_size=32,
        steps=600,
        precision=Precision.BFLOAT16,
    ),
}


def attention(size: str, **changes: Any) -> AttentionConfig:
    """Return grouped-query attention with two query heads for each key-value head."""
    dims = SIZES[size]
    num_heads = dims.embed_dim // dims.head_dim
    config = AttentionConfig(
        num_heads=num_heads,
        num_kv_heads=num_heads // 2,
        head_dim=dims.head_dim,
        qk_norm=QkNorm.PER_HEAD,
    )
    return dataclasses.replace(config, **changes)


def decoder(size: str, *, num_layers: int | None = None, **changes: Any) -> ModelConfig:
    """Return a decoder of equal layers.

    Args:
      size: "small" or "large".
      num_layers: other than the size's own.
      changes: further fields of the model.
    """
    dims = SIZES[size]
    block = BlockConfig(mixer=attention(size), ffn=MlpConfig(hidden_dim=dims.hidden_dim))
    stack = (LayerGroup(pattern=(block,), repeats=num_layers or dims.num_layers),)
    model = ModelConfig(
        embed_dim=dims.embed_dim,
        stack=stack,
        context_length=dims.sequence_length,
        precision=dims.precision,
    )
    return dataclasses.replace(model, **changes)


def base(size: str) -> Experiment:
    """Return the experiment that arms change."""
    dims = SIZES[size]
    nano = slmjax.load_experiment("nano")
    return dataclasses.replace(
        nano,
        model=decoder(size),
        tokenizer=BpeTokenizer(vocab_size=dims.vocab_size),
        data=DataConfig(
            sequence_length=dims.sequence_length,
            batch_size=dims.batch_size,
            heldout_fraction=nano.data.heldout_fraction,
        ),
        eval=dataclasses.replace(nano.eval, every=dims.steps // 6, sample=False),
        run=dataclasses.replace(nano.run, name="member", steps=dims.steps, sample_prompts=()),
    )
