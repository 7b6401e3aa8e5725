"""Released models with recurrent layers or convolutions, at their released sizes.

As in `released.py`, each function names the page whose config.json it follows.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from slmjax.models.architecture import BlockConfig, HeadKind, ModelConfig, NormPlacement, stack_of
from slmjax.models.ffn.mlp import Activation, MlpConfig
from slmjax.models.ffn.moe import MoeConfig
from slmjax.models.layers import NormKind
from slmjax.models.mixers.attention import AttentionConfig, Biases, OutputGate, QkNorm
from slmjax.models.mixers.delta_net import GatedDeltaNetConfig
from slmjax.models.mixers.griffin import RgLruConfig
from slmjax.models.mixers.mamba2 import GatedNorm, Mamba2Config
from slmjax.models.mixers.parallel import ParallelMixerConfig
from slmjax.models.mixers.short_convolution import ShortConvolutionConfig
from slmjax.models.protocols import FfnConfig


# Mamba-2 ----------------------------------------------------------------------------------------------------
def mamba2_130m() -> ModelConfig:
    """Mamba-2 130M (https://huggingface.co/state-spaces/mamba2-130m)."""
    return _mamba2(layers=24, embed_dim=768)


def mamba2_370m() -> ModelConfig:
    """Mamba-2 370M (https://huggingface.co/state-spaces/mamba2-370m)."""
    return _mamba2(layers=48, embed_dim=1024)


def mamba2_1_3b() -> ModelConfig:
    """Mamba-2 1.3B (https://huggingface.co/state-spaces/mamba2-1.3b)."""
    return _mamba2(layers=48, embed_dim=2048)


def _mamba2(*, layers: int, embed_dim: int) -> ModelConfig:
    return ModelConfig(
        embed_dim=embed_dim,
        stack=stack_of([BlockConfig(mixer=Mamba2Config(), ffn=None)] * layers),
        # The length of the texts of its training; the model itself has no bound.
        context_length=2048,
        # 50,277 tokens, padded to a multiple of 16.
        vocab_size=50_288,
        norm_eps=1e-5,
    )


# LFM2 -------------------------------------------------------------------------------------------------------
def lfm2_350m() -> ModelConfig:
    """LFM2-350M (https://huggingface.co/LiquidAI/LFM2-350M)."""
    return _lfm2(embed_dim=1024, heads=16, hidden_dim=4608)


def lfm2_700m() -> ModelConfig:
    """LFM2-700M (https://huggingface.co/LiquidAI/LFM2-700M)."""
    return _lfm2(embed_dim=1536, heads=24, hidden_dim=6912)


def lfm2_1_2b() -> ModelConfig:
    """LFM2-1.2B (https://huggingface.co/LiquidAI/LFM2-1.2B)."""
    return _lfm2(embed_dim=2048, heads=32, hidden_dim=8192)


def _lfm2(*, embed_dim: int, heads: int, hidden_dim: int) -> ModelConfig:
    attention = AttentionConfig(num_heads=heads, num_kv_heads=8, rope_base=1e6, qk_norm=QkNorm.PER_HEAD)
    full = (2, 5, 8, 10, 12, 14)
    mixers = [attention if layer in full else ShortConvolutionConfig() for layer in range(16)]
    ffn = MlpConfig(hidden_dim=hidden_dim)
    return ModelConfig(
        embed_dim=embed_dim,
        stack=stack_of([BlockConfig(mixer=mixer, ffn=ffn) for mixer in mixers]),
        context_length=128_000,
        vocab_size=65_536,
        norm_eps=1e-5,
    )


# Granite 4 --------------------------------------------------------------------------------------------------
def granite4_h_350m() -> ModelConfig:
    """Granite 4.0 H 350M (https://huggingface.co/ibm-granite/granite-4.0-h-350m)."""
    config = _granite4(
        embed_dim=768,
        layers=32,
        full=(10, 13, 17, 27),
        mixer=Mamba2Config(head_dim=32),
        ffn=MlpConfig(hidden_dim=2048),
        residual_multiplier=0.246,
    )
    return dataclasses.replace(config, context_length=32_768)


def granite4_h_1b() -> ModelConfig:
    """Granite 4.0 H 1B (https://huggingface.co/ibm-granite/granite-4.0-h-1b)."""
    return _granite4(embed_dim=1536, ffn=MlpConfig(hidden_dim=4096))


def granite4_h_tiny() -> ModelConfig:
    """Granite 4.0 H Tiny (https://huggingface.co/ibm-granite/granite-4.0-h-tiny): experts in each layer."""
    ffn = MoeConfig(num_experts=64, num_selected=6, hidden_dim=512, shared_hidden_dim=1024)
    return _granite4(embed_dim=1536, ffn=ffn)


def _granite4(
    *,
    embed_dim: int,
    ffn: FfnConfig,
    layers: int = 40,
    full: Sequence[int] = (5, 15, 25, 35),
    mixer: Mamba2Config | None = None,
    residual_multiplier: float = 0.22,
) -> ModelConfig:
    """Return a model whose layers `full` have attention, without positions: the recurrent ones know them."""
    # One over the width of a head, as in muP (Yang et al. 2022).
    attention = AttentionConfig(num_heads=12, num_kv_heads=4, rope_base=None, scale=12 / embed_dim)
    recurrent = mixer or Mamba2Config()
    mixers = [attention if layer in full else recurrent for layer in range(layers)]
    return ModelConfig(
        embed_dim=embed_dim,
        stack=stack_of([BlockConfig(mixer=mixer, ffn=ffn) for mixer in mixers]),
        context_length=131_072,
        vocab_size=100_352,
        norm_eps=1e-5,
        embed_multiplier=12.0,
        residual_multiplier=residual_multiplier,
        logit_multiplier=256 / embed_dim,
    )


# Falcon-H1 --------------------------------------------------------------------------------------------------
def falcon_h1_0_5b() -> ModelConfig:
    """Falcon-H1-0.5B (https://huggingface.co/tiiuae/Falcon-H1-0.5B-Base)."""
    # The multipliers were tuned with the learning rates of each part (Zuo et al. 2025).
    attention = AttentionConfig(
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        rope_base=1e11,
        scale=0.39062499999999994 * 64**-0.5,
    )
    mamba2 = Mamba2Config(
        inner_dim=1536,
        norm=GatedNorm.NONE,
        projection_multipliers=(
            0.3535533905932738,
            0.25,
            0.3535533905932738,
            0.5,
            0.3535533905932738,
        ),
    )
    mixer = ParallelMixerConfig(
        mixers=(attention, mamba2),
        input_multipliers=(1.0, 1.25),
        output_multipliers=(0.9375, 0.23570226039551587),
    )
    ffn = MlpConfig(hidden_dim=2048, activation_multiplier=0.8838834764831844, output_multiplier=0.5859375)
    return ModelConfig(
        embed_dim=1024,
        stack=stack_of([BlockConfig(mixer=mixer, ffn=ffn)] * 36),
        context_length=16_384,
        vocab_size=32_784,
        head=HeadKind.UNTIED,
        norm_eps=1e-5,
        embed_multiplier=5.656854249492381,
        logit_multiplier=0.0390625,
    )


# Qwen3-Next and Qwen3.5 -------------------------------------------------------------------------------------
def qwen3_5_0_8b() -> ModelConfig:
    """Qwen3.5-0.8B without its vision tower (https://huggingface.co/Qwen/Qwen3.5-0.8B)."""
    attention = AttentionConfig(num_heads=8, num_kv_heads=2, rope_base=1e7, **QWEN_ATTENTION)
    delta_net = GatedDeltaNetConfig(num_heads=16, num_value_heads=16, key_dim=128)
    return _qwen_hybrid(
        embed_dim=1024, layers=24, attention=attention, delta_net=delta_net, ffn=MlpConfig(hidden_dim=3584)
    )


def qwen3_5_4b() -> ModelConfig:
    """Qwen3.5-4B without its vision tower (https://huggingface.co/Qwen/Qwen3.5-4B)."""
    attention = AttentionConfig(num_heads=16, num_kv_heads=4, rope_base=1e7, **QWEN_ATTENTION)
    return _qwen_hybrid(embed_dim=2560, layers=32, attention=attention, ffn=MlpConfig(hidden_dim=9216))


def qwen3_next_80b_a3b() -> ModelConfig:
    """Qwen3-Next-80B-A3B (https://huggingface.co/Qwen/Qwen3-Next-80B-A3B-Instruct)."""
    attention = AttentionConfig(num_heads=16, num_kv_heads=2, rope_base=1e7, **QWEN_ATTENTION)
    ffn = MoeConfig(num_experts=512, num_selected=10, hidden_dim=512, shared_hidden_dim=512, shared_gate=True)
    config = _qwen_hybrid(embed_dim=2048, layers=48, attention=attention, ffn=ffn)
    return dataclasses.replace(config, vocab_size=151_936, head=HeadKind.UNTIED)


# Rotating a quarter of each head leaves the rest to match contents at any distance.
QWEN_ATTENTION: Mapping[str, Any] = {
    "head_dim": 256,
    "rotary_dim": 64,
    "qk_norm": QkNorm.PER_HEAD,
    "output_gate": OutputGate.PER_ELEMENT,
}


def _qwen_hybrid(
    *,
    embed_dim: int,
    layers: int,
    attention: AttentionConfig,
    ffn: FfnConfig,
    delta_net: GatedDeltaNetConfig | None = None,
) -> ModelConfig:
    """Return a model with attention in each fourth layer."""
    recurrent = delta_net or GatedDeltaNetConfig(num_heads=16, num_value_heads=32, key_dim=128)
    blocks = [BlockConfig(mixer=mixer, ffn=ffn) for mixer in (*(recurrent,) * 3, attention)]
    return ModelConfig(
        embed_dim=embed_dim,
        stack=stack_of(blocks * (layers // 4)),
        context_length=262_144,
        vocab_size=248_320,
        norm_kind=NormKind.CENTERED_RMS,
    )


# OLMo Hybrid ------------------------------------------------------------------------------------------------
def olmo_hybrid_7b() -> ModelConfig:
    """OLMo-Hybrid-7B (https://huggingface.co/allenai/Olmo-Hybrid-7B)."""
    ffn = MlpConfig(hidden_dim=11_008)
    delta_net = GatedDeltaNetConfig(
        num_heads=30, key_dim=96, value_dim=192, negative_eigenvalues=True, head_norm_eps=1e-5
    )
    attention = AttentionConfig(num_heads=30, rope_base=None, qk_norm=QkNorm.ALL_HEADS)
    blocks = [BlockConfig(mixer=delta_net, ffn=ffn)] * 3
    blocks.append(BlockConfig(mixer=attention, ffn=ffn, norm=NormPlacement.POST))
    return ModelConfig(
        embed_dim=3840,
        stack=stack_of(blocks * 8),
        context_length=65_536,
        vocab_size=100_352,
        head=HeadKind.UNTIED,
    )


# RecurrentGemma ---------------------------------------------------------------------------------------------
def recurrentgemma_2b() -> ModelConfig:
    """RecurrentGemma-2B (https://huggingface.co/google/recurrentgemma-2b)."""
    recurrence = RgLruConfig(inner_dim=2560, num_blocks=10, bias=True)
    attention = AttentionConfig(
        num_heads=10, num_kv_heads=1, head_dim=256, window=2048, rotary_dim=128, biases=Biases.OUTPUT
    )
    ffn = MlpConfig(hidden_dim=7680, activation=Activation.GELU, bias=True)
    mixers = [attention if layer % 3 == 2 else recurrence for layer in range(26)]
    return ModelConfig(
        embed_dim=2560,
        stack=stack_of([BlockConfig(mixer=mixer, ffn=ffn) for mixer in mixers]),
        context_length=8192,
        vocab_size=256_000,
        norm_kind=NormKind.CENTERED_RMS,
        # The root of the width, which the library rounds to bfloat16.
        embed_multiplier=50.5,
        logit_softcap=30.0,
    )


# By name, families together, small models before large ones.
RELEASED_HYBRIDS: Mapping[str, Callable[[], ModelConfig]] = {
    build.__name__: build
    for build in (
        mamba2_130m,
        mamba2_370m,
        mamba2_1_3b,
        lfm2_350m,
        lfm2_700m,
        lfm2_1_2b,
        granite4_h_350m,
        granite4_h_1b,
        granite4_h_tiny,
        falcon_h1_0_5b,
        qwen3_5_0_8b,
        qwen3_5_4b,
        qwen3_next_80b_a3b,
        olmo_hybrid_7b,
        recurrentgemma_2b,
    )
}
