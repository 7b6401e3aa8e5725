"""Conversion of latent attention, in both directions, shared by DeepSeek-V2 and MiniCPM3."""

import math
from typing import Any

from slmjax.convert.family import Rule, linear, norm
from slmjax.convert.hf.settings import read_rope, rope_table, write_scaling, yarn_magnitude
from slmjax.convert.settings import Settings
from slmjax.models.mixers.latent import LatentAttentionConfig
from slmjax.models.rope import YarnScaling

LATENT_NORM_EPS = 1e-6  # fixed in their libraries, whatever rms_norm_eps is
TENSORS: tuple[Rule, ...] = (
    *linear("mixer/query", "self_attn.q_proj"),
    *linear("mixer/query_down", "self_attn.q_a_proj"),
    *norm("mixer/query_norm", "self_attn.q_a_layernorm"),
    *linear("mixer/query_up", "self_attn.q_b_proj"),
    *linear("mixer/latent_down", "self_attn.kv_a_proj_with_mqa"),
    *norm("mixer/latent_norm", "self_attn.kv_a_layernorm"),
    *linear("mixer/latent_up", "self_attn.kv_b_proj"),
    *linear("mixer/output", "self_attn.o_proj"),
)


def read_latent_attention(settings: Settings) -> LatentAttentionConfig:
    """Read the mixer. With YaRN, scores are also multiplied by the square of its magnitude."""
    settings.ignore("num_key_value_heads", "head_dim", "qk_head_dim")  # without effect in latent attention
    # Heads have a part without positions and a rotated one; the latter's key is shared by all heads.
    plain = settings.take("qk_nope_head_dim")
    rotated = settings.positive("qk_rope_head_dim")
    heads = settings.positive("num_attention_heads")
    value_dim = settings.positive("v_head_dim", settings.positive("hidden_size") // heads)
    rope = read_rope(settings)
    scale = (plain + rotated) ** -0.5
    # Queries and keys are both multiplied, so that scores have the square of the magnitude.
    if isinstance(rope["rope_scaling"], YarnScaling):
        scale *= (
            yarn_magnitude(rope["rope_scaling"].factor, rope_table(settings).take("mscale_all_dim", 0.0)) ** 2
        )
    return LatentAttentionConfig(
        num_heads=heads,
        latent_dim=settings.positive("kv_lora_rank"),
        plain_dim=plain,
        rope_dim=rotated,
        value_dim=value_dim,
        query_rank=settings.optional("q_lora_rank"),
        rope_base=rope["rope_base"],
        rope_scaling=rope["rope_scaling"],
        scale=scale,
        bias=settings.take("attention_bias"),
        latent_norm_eps=LATENT_NORM_EPS,
    )


def write_latent_attention(mixer: LatentAttentionConfig) -> dict[str, Any]:
    """Write the keys of `read_latent_attention`."""
    scaling = write_scaling(mixer.rope_scaling)
    if isinstance(mixer.rope_scaling, YarnScaling) and scaling is not None:
        # The scale of scores contains m ** 2, with m = 0.1 weight ln(factor) + 1; the factor of the angles is
        # a quotient of two such magnitudes.
        magnitude = math.sqrt((mixer.scale or 1.0) * mixer.key_dim**0.5)
        scaling["mscale_all_dim"] = _weight(magnitude, mixer.rope_scaling.factor)
        scaling["mscale"] = _weight(
            magnitude * mixer.rope_scaling.attention_factor, mixer.rope_scaling.factor
        )
        # The library computes the factor from the two weights: it is written only once.
        if scaling["mscale"] and scaling["mscale_all_dim"]:
            del scaling["attention_factor"]
    return {
        "num_attention_heads": mixer.num_heads,
        # Without effect in latent attention; released models have this value.
        "num_key_value_heads": mixer.num_heads,
        # The library computes rotary frequencies from this width.
        "head_dim": mixer.rope_dim,
        "kv_lora_rank": mixer.latent_dim,
        "q_lora_rank": mixer.query_rank,
        "qk_nope_head_dim": mixer.plain_dim,
        "qk_rope_head_dim": mixer.rope_dim,
        "v_head_dim": mixer.value_dim,
        "attention_bias": mixer.bias,
        "rope_theta": mixer.rope_base,
        "rope_scaling": scaling,
    }


def _weight(magnitude: float, factor: float) -> float:
    """Return the weight that gives YaRN's magnitude for a factor, rounded to the decimals of the original."""
    # Without scaling the magnitude is 1 for any weight.
    return 0.0 if factor <= 1 else float(f"{(magnitude - 1.0) / (0.1 * math.log(factor)):.10g}")
