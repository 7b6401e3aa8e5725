"""Small architectures of this project: minutes on a CPU to a day on an accelerator.

If the vocabulary size is None, the tokenizer of the experiment sets it.
"""

import dataclasses

from slmjax.models.architecture import BlockConfig, HeadKind, LayerGroup, ModelConfig
from slmjax.models.ffn.mlp import Activation, MlpConfig
from slmjax.models.ffn.moe import MoeConfig
from slmjax.models.mixers.attention import AttentionConfig, QkNorm
from slmjax.models.protocols import FfnConfig


def nano(*, vocab_size: int | None = None) -> ModelConfig:
    """3.8M parameters with 4096 tokens, for minutes on a CPU.

    It is a Qwen3 in every detail, so that it can be exported as one.
    """
    return _nano((BlockConfig(mixer=_NANO_ATTENTION, ffn=MlpConfig(hidden_dim=640)),), vocab_size=vocab_size)


def nano_moe(*, vocab_size: int | None = None) -> ModelConfig:
    """`nano` with 8 experts; the 2 that a token selects are together as wide as the dense layer."""
    ffn = MoeConfig(num_experts=8, num_selected=2, hidden_dim=320)
    return _nano((BlockConfig(mixer=_NANO_ATTENTION, ffn=ffn),), vocab_size=vocab_size)


def nano_window(*, vocab_size: int | None = None) -> ModelConfig:
    """`nano` with three layers that have a window of 64 tokens, and a fourth that sees all."""
    mixers = (*(dataclasses.replace(_NANO_ATTENTION, window=64),) * 3, _NANO_ATTENTION)
    return _nano(
        tuple(BlockConfig(mixer=mixer, ffn=MlpConfig(hidden_dim=640)) for mixer in mixers),
        vocab_size=vocab_size,
    )


# Two query heads for each key-value head, so that small runs exercise grouped queries.
_NANO_ATTENTION = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=64, qk_norm=QkNorm.PER_HEAD)


def _nano(pattern: tuple[BlockConfig, ...], *, vocab_size: int | None) -> ModelConfig:
    # Four layers in any case: a pattern has one block or four.
    stack = (LayerGroup(pattern=pattern, repeats=4 // len(pattern)),)
    return ModelConfig(embed_dim=256, stack=stack, context_length=256, vocab_size=vocab_size)


def shakespeare_char(*, vocab_size: int | None = None) -> ModelConfig:
    """nanoGPT's character model for a CPU: 4 layers of 4 heads, width 128, context 64, and ungated GELU."""
    # nanoGPT's sizes; norms and rotary positions are those of the other models here.
    return _uniform(
        layers=4,
        embed_dim=128,
        attention=AttentionConfig(num_heads=4),
        ffn=MlpConfig(hidden_dim=512, activation=Activation.GELU, gated=False),
        context_length=64,
        vocab_size=vocab_size,
    )


def slm_12m(*, vocab_size: int | None = 4096) -> ModelConfig:
    """A decoder that a laptop trains overnight: 6 layers of width 384. The CPU benchmarks time it."""
    return _uniform(
        layers=6,
        embed_dim=384,
        attention=AttentionConfig(num_heads=6),
        # 8/3 of the width: three matrices then have the parameters of two of 4 times the width (Shazeer
        # 2020).
        ffn=MlpConfig(hidden_dim=1024),
        context_length=512,
        vocab_size=vocab_size,
    )


def slm_124m(*, vocab_size: int | None = 50_257) -> ModelConfig:
    """The size of GPT-2 small, with rotary positions, RMSNorm and SwiGLU; the table has 50,304 rows."""
    config = _uniform(
        layers=12,
        embed_dim=768,
        attention=AttentionConfig(num_heads=12),
        ffn=MlpConfig(hidden_dim=2048),
        context_length=1024,
        vocab_size=vocab_size,
    )
    # 50,304 rows, as in nanoGPT: a multiple of 128 suits the tiles of matrix units.
    return dataclasses.replace(config, vocab_multiple=128)


def _uniform(
    *,
    layers: int,
    embed_dim: int,
    attention: AttentionConfig,
    ffn: FfnConfig,
    context_length: int,
    vocab_size: int | None,
) -> ModelConfig:
    """Return a model of equal layers, with tied embeddings and RMSNorm before each sublayer."""
    stack = (LayerGroup(pattern=(BlockConfig(mixer=attention, ffn=ffn),), repeats=layers),)
    return ModelConfig(
        embed_dim=embed_dim,
        stack=stack,
        context_length=context_length,
        vocab_size=vocab_size,
        head=HeadKind.TIED,
    )
