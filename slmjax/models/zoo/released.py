"""Released models with attention in all layers, at their released sizes, those expressed exactly.

Each function names the page whose config.json it follows, in sizes, heads, the norm's eps, rotary angles,
windows, multipliers and soft-caps. The configurations do not describe training or precision.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

from slmjax.models.architecture import BlockConfig, HeadKind, ModelConfig, NormPlacement, stack_of
from slmjax.models.ffn.mlp import Activation, MlpConfig
from slmjax.models.ffn.moe import MoeConfig
from slmjax.models.layers import NormKind
from slmjax.models.mixers.attention import AttentionConfig, Biases, QkNorm
from slmjax.models.rope import LinearScaling, Llama3Scaling, LongScaling, RopeScaling


# SmolLM, MobileLLM, TinyLlama, Llama ------------------------------------------------------------------------
def smollm2_135m() -> ModelConfig:
    """SmolLM2-135M (https://huggingface.co/HuggingFaceTB/SmolLM2-135M)."""
    return _smollm2(layers=30, embed_dim=576, heads=9, kv_heads=3, hidden_dim=1536, rope_base=100_000.0)


def smollm2_360m() -> ModelConfig:
    """SmolLM2-360M (https://huggingface.co/HuggingFaceTB/SmolLM2-360M)."""
    return _smollm2(layers=32, embed_dim=960, heads=15, kv_heads=5, hidden_dim=2560, rope_base=100_000.0)


def smollm2_1_7b() -> ModelConfig:
    """SmolLM2-1.7B (https://huggingface.co/HuggingFaceTB/SmolLM2-1.7B)."""
    return _smollm2(layers=24, embed_dim=2048, heads=32, kv_heads=32, hidden_dim=8192, rope_base=130_000.0)


def _smollm2(
    *, layers: int, embed_dim: int, heads: int, kv_heads: int, hidden_dim: int, rope_base: float
) -> ModelConfig:
    return _llama(
        layers=layers,
        embed_dim=embed_dim,
        heads=heads,
        kv_heads=kv_heads,
        hidden_dim=hidden_dim,
        rope_base=rope_base,
        vocab_size=49_152,
        context_length=8192,
    )


def smollm3_3b() -> ModelConfig:
    """SmolLM3-3B (https://huggingface.co/HuggingFaceTB/SmolLM3-3B): every fourth layer has no positions."""
    # Layers without positions among rotary ones (RNoPE, Yang et al. 2025) extrapolate to longer texts.
    rotated = AttentionConfig(num_heads=16, num_kv_heads=4, rope_base=5e6)
    mixers = (*(rotated,) * 3, dataclasses.replace(rotated, rope_base=None))
    blocks = [BlockConfig(mixer=mixer, ffn=MlpConfig(hidden_dim=11_008)) for mixer in mixers]
    return ModelConfig(embed_dim=2048, stack=stack_of(blocks * 9), context_length=65_536, vocab_size=128_256)


def mobilellm_125m() -> ModelConfig:
    """MobileLLM-125M (https://huggingface.co/facebook/MobileLLM-125M)."""
    return _mobilellm(layers=30, embed_dim=576, heads=9, kv_heads=3, hidden_dim=1536)


def mobilellm_350m() -> ModelConfig:
    """MobileLLM-350M (https://huggingface.co/facebook/MobileLLM-350M)."""
    return _mobilellm(layers=32, embed_dim=960, heads=15, kv_heads=5, hidden_dim=2560)


def mobilellm_600m() -> ModelConfig:
    """MobileLLM-600M (https://huggingface.co/facebook/MobileLLM-600M)."""
    return _mobilellm(layers=40, embed_dim=1152, heads=18, kv_heads=6, hidden_dim=3072)


def mobilellm_1b() -> ModelConfig:
    """MobileLLM-1B (https://huggingface.co/facebook/MobileLLM-1B)."""
    return _mobilellm(layers=54, embed_dim=1280, heads=20, kv_heads=5, hidden_dim=3584)


def _mobilellm(*, layers: int, embed_dim: int, heads: int, kv_heads: int, hidden_dim: int) -> ModelConfig:
    # Deep and thin: more and narrower layers than others of the size have (Liu et al. 2024).
    return _llama(
        layers=layers,
        embed_dim=embed_dim,
        heads=heads,
        kv_heads=kv_heads,
        hidden_dim=hidden_dim,
        vocab_size=32_000,
        context_length=2048,
    )


def tinyllama_1_1b() -> ModelConfig:
    """TinyLlama-1.1B (https://huggingface.co/TinyLlama/TinyLlama_v1.1)."""
    return _llama(
        layers=22,
        embed_dim=2048,
        heads=32,
        kv_heads=4,
        hidden_dim=5632,
        vocab_size=32_000,
        context_length=2048,
        head=HeadKind.UNTIED,
    )


def llama3_2_1b() -> ModelConfig:
    """Llama 3.2 1B (https://huggingface.co/meta-llama/Llama-3.2-1B)."""
    return _llama3_2(layers=16, embed_dim=2048, heads=32)


def llama3_2_3b() -> ModelConfig:
    """Llama 3.2 3B (https://huggingface.co/meta-llama/Llama-3.2-3B)."""
    return _llama3_2(layers=28, embed_dim=3072, heads=24)


def _llama3_2(*, layers: int, embed_dim: int, heads: int) -> ModelConfig:
    return _llama(
        layers=layers,
        embed_dim=embed_dim,
        heads=heads,
        kv_heads=8,
        hidden_dim=8192,
        vocab_size=128_256,
        context_length=131_072,
        rope_base=500_000.0,
        # 32 as in config.json, though the context is only 16 times the original.
        rope_scaling=Llama3Scaling(factor=32.0, original_context=8192),
    )


# Qwen -------------------------------------------------------------------------------------------------------
def qwen2_5_0_5b() -> ModelConfig:
    """Qwen2.5-0.5B (https://huggingface.co/Qwen/Qwen2.5-0.5B)."""
    return _qwen2_5(layers=24, embed_dim=896, heads=14, hidden_dim=4864)


def qwen2_5_1_5b() -> ModelConfig:
    """Qwen2.5-1.5B (https://huggingface.co/Qwen/Qwen2.5-1.5B), with the context of its page."""
    return _qwen2_5(layers=28, embed_dim=1536, heads=12, hidden_dim=8960)


def qwen2_5_3b() -> ModelConfig:
    """Qwen2.5-3B (https://huggingface.co/Qwen/Qwen2.5-3B)."""
    return _qwen2_5(layers=36, embed_dim=2048, heads=16, hidden_dim=11_008)


def _qwen2_5(*, layers: int, embed_dim: int, heads: int, hidden_dim: int) -> ModelConfig:
    return _llama(
        layers=layers,
        embed_dim=embed_dim,
        heads=heads,
        kv_heads=2,
        hidden_dim=hidden_dim,
        vocab_size=151_936,
        context_length=32_768,
        rope_base=1e6,
        # Biases of queries, keys and values, which Qwen3 replaced by norms of queries and keys.
        biases=Biases.QKV,
        norm_eps=1e-6,
    )


def qwen3_0_6b() -> ModelConfig:
    """Qwen3-0.6B (https://huggingface.co/Qwen/Qwen3-0.6B)."""
    return _qwen3(layers=28, embed_dim=1024, heads=16, hidden_dim=3072)


def qwen3_1_7b() -> ModelConfig:
    """Qwen3-1.7B (https://huggingface.co/Qwen/Qwen3-1.7B)."""
    return _qwen3(layers=28, embed_dim=2048, heads=16, hidden_dim=6144)


def qwen3_4b() -> ModelConfig:
    """Qwen3-4B (https://huggingface.co/Qwen/Qwen3-4B)."""
    return _qwen3(layers=36, embed_dim=2560, heads=32, hidden_dim=9728)


def _qwen3(*, layers: int, embed_dim: int, heads: int, hidden_dim: int) -> ModelConfig:
    return _llama(
        layers=layers,
        embed_dim=embed_dim,
        heads=heads,
        kv_heads=8,
        # The same in all sizes: heads times head_dim is not the width.
        head_dim=128,
        hidden_dim=hidden_dim,
        vocab_size=151_936,
        context_length=40_960,
        rope_base=1e6,
        qk_norm=QkNorm.PER_HEAD,
        norm_eps=1e-6,
    )


# Gemma ------------------------------------------------------------------------------------------------------
def gemma2_2b() -> ModelConfig:
    """Gemma 2 2B (https://huggingface.co/google/gemma-2-2b).

    Every other layer has a window; scores and logits have soft-caps.
    """
    # query_pre_attn_scalar is 256 as the head's width is, so the scale of the scores is the default.
    full = AttentionConfig(num_heads=8, num_kv_heads=4, head_dim=256, softcap=50.0)
    # Layers 0, 2, ... are local.
    blocks = _gemma_blocks([dataclasses.replace(full, window=4096), full] * 13, hidden_dim=9216)
    config = _gemma(blocks, embed_dim=2304, context_length=8192, vocab_size=256_000)
    return dataclasses.replace(config, logit_softcap=30.0)


def gemma3_270m() -> ModelConfig:
    """Gemma 3 270M (https://huggingface.co/google/gemma-3-270m)."""
    return _gemma3(
        layers=18, embed_dim=640, heads=4, kv_heads=1, hidden_dim=2048, window=512, context_length=32_768
    )


def gemma3_1b() -> ModelConfig:
    """Gemma 3 1B (https://huggingface.co/google/gemma-3-1b-pt)."""
    return _gemma3(
        layers=26, embed_dim=1152, heads=4, kv_heads=1, hidden_dim=6912, window=512, context_length=32_768
    )


def gemma3_4b() -> ModelConfig:
    """The text model of Gemma 3 4B (https://huggingface.co/google/gemma-3-4b-pt).

    Its table has 64 rows for images.
    """
    return _gemma3(
        layers=34,
        embed_dim=2560,
        heads=8,
        kv_heads=4,
        hidden_dim=10_240,
        window=1024,
        context_length=131_072,
        vocab_size=262_208,
        rope_scaling=LinearScaling(factor=8.0),
    )


def _gemma3(
    *,
    layers: int,
    embed_dim: int,
    heads: int,
    kv_heads: int,
    hidden_dim: int,
    window: int,
    context_length: int,
    vocab_size: int = 262_144,
    rope_scaling: RopeScaling | None = None,
) -> ModelConfig:
    """Every sixth layer sees all tokens, with rotary base 1e6; the others have a window and base 1e4."""
    local = AttentionConfig(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=256,
        qk_norm=QkNorm.PER_HEAD,
        window=window,
        rope_base=10_000.0,
    )
    # Only full layers interpolate positions: the others never look further than their window.
    full = dataclasses.replace(local, window=None, rope_base=1e6, rope_scaling=rope_scaling)
    mixers = [full if layer % 6 == 5 else local for layer in range(layers)]
    blocks = _gemma_blocks(mixers, hidden_dim=hidden_dim)
    return _gemma(blocks, embed_dim=embed_dim, context_length=context_length, vocab_size=vocab_size)


def _gemma_blocks(mixers: list[AttentionConfig], *, hidden_dim: int) -> list[BlockConfig]:
    # GeGLU with the tanh approximation (gelu_pytorch_tanh).
    ffn = MlpConfig(hidden_dim=hidden_dim, activation=Activation.GELU)
    return [BlockConfig(mixer=mixer, ffn=ffn, norm=NormPlacement.SANDWICH) for mixer in mixers]


def _gemma(blocks: list[BlockConfig], *, embed_dim: int, context_length: int, vocab_size: int) -> ModelConfig:
    return ModelConfig(
        embed_dim=embed_dim,
        stack=stack_of(blocks),
        context_length=context_length,
        vocab_size=vocab_size,
        norm_kind=NormKind.CENTERED_RMS,
        # The table is shared with the head, and multiplied on the input side, as in Vaswani et al. 2017.
        embed_multiplier=embed_dim**0.5,
    )


# OLMo, Phi, Granite -----------------------------------------------------------------------------------------
def olmo2_1b() -> ModelConfig:
    """OLMo 2 1B (https://huggingface.co/allenai/OLMo-2-0425-1B).

    Norms follow each sublayer, and those of queries and keys span all heads.
    """
    return _llama(
        layers=16,
        embed_dim=2048,
        heads=16,
        kv_heads=16,
        hidden_dim=8192,
        vocab_size=100_352,
        context_length=4096,
        rope_base=500_000.0,
        qk_norm=QkNorm.ALL_HEADS,
        # Norms of outputs, and of queries and keys: both against spikes of the loss (OLMo 2, 2025).
        norm=NormPlacement.POST,
        norm_eps=1e-6,
        head=HeadKind.UNTIED,
    )


def olmoe_1b_7b() -> ModelConfig:
    """OLMoE 1B-7B (https://huggingface.co/allenai/OLMoE-1B-7B-0924): 64 experts, of which a token uses 8."""
    attention = AttentionConfig(num_heads=16, qk_norm=QkNorm.ALL_HEADS)
    # norm_topk_prob is false: weights are probabilities among all 64 experts, and do not sum to one.
    ffn = MoeConfig(
        num_experts=64, num_selected=8, hidden_dim=1024, normalize_weights=False, balance_weight=0.01
    )
    return ModelConfig(
        embed_dim=2048,
        stack=stack_of([BlockConfig(mixer=attention, ffn=ffn)] * 16),
        context_length=4096,
        vocab_size=50_304,
        norm_eps=1e-5,
        head=HeadKind.UNTIED,
    )


def phi3_mini() -> ModelConfig:
    """Phi-3-mini with a context of 4096 (https://huggingface.co/microsoft/Phi-3-mini-4k-instruct)."""
    return _llama(
        layers=32,
        embed_dim=3072,
        heads=32,
        kv_heads=32,
        hidden_dim=8192,
        vocab_size=32_064,
        context_length=4096,
        window=2047,
        head=HeadKind.UNTIED,
    )


def phi4_mini() -> ModelConfig:
    """Phi-4-mini (https://huggingface.co/microsoft/Phi-4-mini-instruct).

    Three quarters of a head are rotated, by LongRoPE.
    """
    # LongRoPE's factor: sqrt(1 + ln(s) / ln(original)), where s = 32 is the extension.
    magnitude = math.sqrt(1 + math.log(131_072 / 4096) / math.log(4096))
    scaling = LongScaling(
        short_factors=(1.0,) * 48,
        long_factors=PHI4_MINI_FACTORS,
        original_context=4096,
        attention_factor=magnitude,
    )
    return _llama(
        layers=32,
        embed_dim=3072,
        heads=24,
        kv_heads=8,
        hidden_dim=8192,
        vocab_size=200_064,
        context_length=131_072,
        # partial_rotary_factor is 0.75, of heads of 128 dims.
        rotary_dim=96,
        rope_scaling=scaling,
    )


# Divisors of the frequency of each pair of dims, in documents of more than 4096 tokens.
PHI4_MINI_FACTORS = (
    1.0,
    1.118320672,
    1.250641126,
    1.398617824,
    1.564103225,
    1.74916897,
    1.956131817,
    2.187582649,
    2.446418898,
    2.735880826,
    3.059592084,
    3.421605075,
    3.826451687,
    4.279200023,
    4.785517845,
    5.351743533,
    5.984965424,
    6.693110555,
    7.485043894,
    8.370679318,
    9.36110372,
    10.4687158,
    11.70738129,
    13.09260651,
    14.64173252,
    16.37415215,
    18.31155283,
    20.47818807,
    22.90118105,
    25.61086418,
    28.64115884,
    32.03,
    32.1,
    32.13,
    32.23,
    32.6,
    32.61,
    32.64,
    32.66,
    32.7,
    32.71,
    32.93,
    32.97,
    33.28,
    33.49,
    33.5,
    44.16,
    47.77,
)


def granite3_3_2b() -> ModelConfig:
    """Granite 3.3 2B (https://huggingface.co/ibm-granite/granite-3.3-2b-base)."""
    return _granite(embed_dim=2048, heads=32, vocab_size=49_159)


def granite4_micro() -> ModelConfig:
    """Granite 4.0 Micro, which is dense (https://huggingface.co/ibm-granite/granite-4.0-micro-base)."""
    return _granite(embed_dim=2560, heads=40, vocab_size=100_352)


def _granite(*, embed_dim: int, heads: int, vocab_size: int) -> ModelConfig:
    """Return a Granite model, whose logits are divided by a 256th of the width."""
    config = _llama(
        layers=40,
        embed_dim=embed_dim,
        heads=heads,
        kv_heads=8,
        hidden_dim=8192,
        vocab_size=vocab_size,
        context_length=131_072,
        rope_base=1e7,
        # One over the width of a head, not over its square root, as in muP (Yang et al. 2022).
        scale=1 / 64,
    )
    return dataclasses.replace(
        # embedding_multiplier, residual_multiplier and the inverse of logits_scaling in config.json.
        config,
        embed_multiplier=12.0,
        residual_multiplier=0.22,
        logit_multiplier=256 / embed_dim,
    )


# GPT-2 ------------------------------------------------------------------------------------------------------
def gpt2_124m() -> ModelConfig:
    """GPT-2 small (https://huggingface.co/openai-community/gpt2)."""
    return _gpt2(layers=12, embed_dim=768, heads=12)


def gpt2_355m() -> ModelConfig:
    """GPT-2 medium (https://huggingface.co/openai-community/gpt2-medium)."""
    return _gpt2(layers=24, embed_dim=1024, heads=16)


def _gpt2(*, layers: int, embed_dim: int, heads: int) -> ModelConfig:
    # Positions are learned rows that are added to embeddings, not a rotation.
    attention = AttentionConfig(num_heads=heads, rope_base=None, biases=Biases.ALL)
    # gelu_new of config.json is the tanh approximation.
    ffn = MlpConfig(hidden_dim=4 * embed_dim, activation=Activation.GELU, gated=False, bias=True)
    return ModelConfig(
        embed_dim=embed_dim,
        stack=stack_of([BlockConfig(mixer=attention, ffn=ffn)] * layers),
        context_length=1024,
        vocab_size=50_257,
        learned_positions=1024,
        norm_kind=NormKind.LAYER,
        norm_eps=1e-5,
    )


# The common structure ---------------------------------------------------------------------------------------
def _llama(
    *,
    layers: int,
    embed_dim: int,
    heads: int,
    kv_heads: int,
    hidden_dim: int,
    vocab_size: int,
    context_length: int,
    norm: NormPlacement = NormPlacement.PRE,
    norm_eps: float = 1e-5,
    head: HeadKind = HeadKind.TIED,
    rope_base: float = 10_000.0,
    **attention,
) -> ModelConfig:
    """Return a model of equal layers: attention with rotary positions, gated SiLU layers, RMSNorm.

    Further settings are those of `AttentionConfig`.
    """
    mixer = AttentionConfig(num_heads=heads, num_kv_heads=kv_heads, rope_base=rope_base, **attention)
    block = BlockConfig(mixer=mixer, ffn=MlpConfig(hidden_dim=hidden_dim), norm=norm)
    return ModelConfig(
        embed_dim=embed_dim,
        stack=stack_of([block] * layers),
        context_length=context_length,
        vocab_size=vocab_size,
        norm_eps=norm_eps,
        head=head,
    )


# By name, families together, small models before large ones.
RELEASED_ATTENTION: Mapping[str, Callable[[], ModelConfig]] = {
    build.__name__: build
    for build in (
        gpt2_124m,
        gpt2_355m,
        smollm2_135m,
        smollm2_360m,
        smollm2_1_7b,
        smollm3_3b,
        mobilellm_125m,
        mobilellm_350m,
        mobilellm_600m,
        mobilellm_1b,
        tinyllama_1_1b,
        llama3_2_1b,
        llama3_2_3b,
        qwen2_5_0_5b,
        qwen2_5_1_5b,
        qwen2_5_3b,
        qwen3_0_6b,
        qwen3_1_7b,
        qwen3_4b,
        gemma2_2b,
        gemma3_270m,
        gemma3_1b,
        gemma3_4b,
        olmo2_1b,
        olmoe_1b_7b,
        phi3_mini,
        phi4_mini,
        granite3_3_2b,
        granite4_micro,
    )
}
