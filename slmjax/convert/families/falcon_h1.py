"""Falcon-H1: attention and Mamba-2 side by side in each layer, and multipliers in the manner of muP."""

import dataclasses
import math
from typing import Any

from slmjax.convert.family import Family, Rule, TensorMap, expect_kind, linear, norm, same
from slmjax.convert.gguf import mamba2_settings as gguf_mamba2
from slmjax.convert.gguf import settings as gguf_settings
from slmjax.convert.gguf import tensors as gguf_tensors
from slmjax.convert.hf import mamba2_settings
from slmjax.convert.hf.mamba2_settings import mamba2_rules, read_mamba2, write_mamba2
from slmjax.convert.hf.settings import (
    read_attention,
    read_biases,
    read_decoder,
    read_mlp,
    write_attention,
    write_biases,
    write_decoder,
    write_mlp,
)
from slmjax.convert.settings import Settings
from slmjax.models.architecture import BlockConfig, ModelConfig
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.mixers.attention import AttentionConfig, Biases
from slmjax.models.mixers.mamba2 import PROJECTIONS, GatedNorm, Mamba2Config
from slmjax.models.mixers.parallel import ParallelMixerConfig

# Defaults of keys that a config.json may leave out.
DEFAULTS = {
    "vocab_size": 128_000,
    "tie_word_embeddings": False,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "mamba_d_ssm": 1024,
    "mamba_norm_before_gate": True,
    "mamba_rms_norm": False,
    "projectors_bias": False,
    "lm_head_multiplier": 1.0,
    "embedding_multiplier": 1.0,
    "key_multiplier": 1.0,
    "attention_in_multiplier": 1.0,
    "attention_out_multiplier": 1.0,
    "ssm_in_multiplier": 1.0,
    "ssm_out_multiplier": 1.0,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_theta": 10_000.0,
    **mamba2_settings.HYBRID_DEFAULTS,
}
# Keys of releases that the class in transformers does not read.
UNREAD = ("attn_layer_indices", "mamba_use_mlp", "mlp_expansion_factor", "num_logits_to_keep")


def read(settings: Settings) -> ModelConfig:
    """Read a config.json as a `ModelConfig`."""
    settings.ignore(*UNREAD)
    # The activation of the convolutions and of the gate too.
    settings.expect("hidden_act", "silu")
    activation, output = settings.take("mlp_multipliers", [1.0, 1.0])
    ffn = read_mlp(
        settings,
        bias=settings.take("mlp_bias"),
        activation_multiplier=float(activation),
        output_multiplier=float(output),
    )
    mixer = ParallelMixerConfig(
        mixers=(_read_attention(settings), _read_mamba2(settings)),
        input_multipliers=_take_floats(settings, "attention_in_multiplier", "ssm_in_multiplier"),
        output_multipliers=_take_floats(settings, "attention_out_multiplier", "ssm_out_multiplier"),
    )
    return read_decoder(
        settings,
        [BlockConfig(mixer=mixer, ffn=ffn)] * settings.take("num_hidden_layers"),
        embed_multiplier=float(settings.take("embedding_multiplier")),
        logit_multiplier=float(settings.take("lm_head_multiplier")),
    )


def _take_floats(settings: Settings, *names: str) -> tuple[float, ...]:
    return tuple(float(settings.take(name)) for name in names)


def _read_attention(settings: Settings) -> AttentionConfig:
    attention = read_attention(settings, biases=read_biases(settings))
    assert attention.head_dim is not None
    # Keys are multiplied, so that scores are.
    scale = attention.head_dim**-0.5 * float(settings.take("key_multiplier"))
    return dataclasses.replace(attention, scale=scale)


def _read_mamba2(settings: Settings) -> Mamba2Config:
    expanded = settings.positive("mamba_expand") * settings.positive("hidden_size")
    is_first = settings.take("mamba_norm_before_gate")
    is_normed = settings.take("mamba_rms_norm")
    kind = GatedNorm.BEFORE_GATE if is_first else GatedNorm.AFTER_GATE
    multipliers = settings.take("ssm_multipliers", [1.0] * len(PROJECTIONS))
    return read_mamba2(
        settings,
        inner_dim=settings.positive("mamba_d_ssm", null=expanded),
        output_bias=settings.take("projectors_bias"),
        norm=kind if is_normed else GatedNorm.NONE,
        projection_multipliers=tuple(map(float, multipliers)),
    )


def parallel_parts(block: BlockConfig) -> tuple[AttentionConfig, Mamba2Config]:
    """Return the two mixers of a layer. Raises Inexpressible if they are of other kinds."""
    mixer = expect_kind(block.mixer, ParallelMixerConfig, "layer 0's mixer")
    attention = expect_kind(mixer.mixers[0], AttentionConfig, "the first of the parallel mixers")
    return attention, expect_kind(mixer.mixers[1], Mamba2Config, "the second of the parallel mixers")


def write(model: ModelConfig) -> dict[str, Any]:
    """Write a model as the keys of a config.json."""
    block = next(model.blocks())
    attention, mamba2 = parallel_parts(block)
    mixer = expect_kind(block.mixer, ParallelMixerConfig, "layer 0's mixer")
    assert mixer.input_multipliers is not None and mixer.output_multipliers is not None
    mlp = expect_kind(block.ffn, MlpConfig, "a feed-forward layer")
    multipliers = {
        "embedding_multiplier": model.embed_multiplier,
        "lm_head_multiplier": model.logit_multiplier,
        "key_multiplier": _key_multiplier(attention),
        "attention_in_multiplier": mixer.input_multipliers[0],
        "attention_out_multiplier": mixer.output_multipliers[0],
        "ssm_in_multiplier": mixer.input_multipliers[1],
        "ssm_out_multiplier": mixer.output_multipliers[1],
        "ssm_multipliers": list(mamba2.projection_multipliers or ()),
        "mlp_multipliers": [mlp.activation_multiplier, mlp.output_multiplier],
    }
    return {
        "model_type": "falcon_h1",
        **write_decoder(model),
        **write_attention(attention),
        **write_biases(attention),
        **write_mlp(mlp),
        "mlp_bias": mlp.bias,
        **write_mamba2(mamba2),
        "mamba_d_ssm": mamba2.inner_dim,
        "mamba_rms_norm": mamba2.norm is not GatedNorm.NONE,
        "mamba_norm_before_gate": mamba2.norm is GatedNorm.BEFORE_GATE,
        "projectors_bias": mamba2.output_bias,
        **multipliers,
    }


def _key_multiplier(attention: AttentionConfig) -> float:
    """Return the factor of keys that gives the scale of scores, to the last bit if there is one."""
    assert attention.scale is not None and attention.head_dim is not None
    default = attention.head_dim**-0.5
    factor = attention.scale / default
    # A quotient rounds: a neighbour may be the number whose product is the scale.
    near = (float(f"{factor:.12g}"), factor, math.nextafter(factor, 0), math.nextafter(factor, math.inf))
    return next((number for number in near if default * number == attention.scale), factor)


LAYER = (
    *norm("mixer_norm", "input_layernorm"),
    *norm("ffn_norm", "pre_ff_layernorm"),
    *linear("mixer/parts/0/mixer/query", "self_attn.q_proj"),
    *linear("mixer/parts/0/mixer/key", "self_attn.k_proj"),
    *linear("mixer/parts/0/mixer/value", "self_attn.v_proj"),
    *linear("mixer/parts/0/mixer/output", "self_attn.o_proj"),
    *mamba2_rules("mamba", ours="mixer/parts/1/mixer"),
    *linear("ffn/gate", "feed_forward.gate_proj"),
    *linear("ffn/up", "feed_forward.up_proj"),
    *linear("ffn/down", "feed_forward.down_proj"),
)
HF = Family(
    architecture="FalconH1ForCausalLM",
    read=read,
    write=write,
    defaults=DEFAULTS,
    tensor_map=TensorMap(
        around=(
            same("embed/table", "model.embed_tokens.weight"),
            *norm("final_norm", "model.final_layernorm"),
            same("head/weight", "lm_head.weight"),
        ),
        layer=LAYER,
    ),
)


# GGUF -------------------------------------------------------------------------------------------------------
def read_gguf(settings: Settings) -> ModelConfig:
    """Read GGUF metadata as a `ModelConfig`, without multipliers: in these files they are in the weights."""
    norm_kind = GatedNorm.AFTER_GATE if settings.take("has_ssm_norm", False) else GatedNorm.NONE
    mixer = ParallelMixerConfig(
        mixers=(
            gguf_settings.read_attention(settings),
            gguf_mamba2.read_mamba2(settings, norm=norm_kind),
        )
    )
    block = BlockConfig(mixer=mixer, ffn=gguf_settings.read_mlp(settings))
    return gguf_settings.read_decoder(settings, [block] * settings.take("block_count"))


def write_gguf(model: ModelConfig) -> dict[str, Any]:
    """Write a model without multipliers as GGUF metadata."""
    block = next(model.blocks())
    attention, mamba2 = parallel_parts(block)
    gguf_settings.check_biases(attention, Biases.NONE)
    gguf_settings.check_plain_scale(attention)
    return {
        **gguf_settings.write_decoder(model),
        **gguf_settings.write_attention(attention),
        **gguf_settings.write_mlp(block.ffn),
        **gguf_mamba2.write_mamba2(mamba2),
        "has_ssm_norm": mamba2.norm is not GatedNorm.NONE,
    }


def gguf_layer_rules(block: BlockConfig) -> tuple[Rule, ...]:
    """Return the rules of a layer."""
    _, mamba2 = parallel_parts(block)
    attention = (
        dataclasses.replace(
            rule, ours=tuple(name.replace("mixer/", "mixer/parts/0/mixer/", 1) for name in rule.ours)
        )
        for rule in gguf_tensors.ATTENTION
    )
    recurrent = gguf_mamba2.mamba2_rules(mamba2.num_groups, ours="mixer/parts/1/mixer")
    # The second norm has a name without a suffix.
    norms = (*norm("mixer_norm", "attn_norm"), same("ffn_norm/scale", "ffn_norm"))
    return (*attention, *recurrent, *norms, *gguf_tensors.MLP)


GGUF = Family(
    architecture="falcon-h1",
    read=read_gguf,
    write=write_gguf,
    tensor_map=gguf_tensors.tensor_map(rules=gguf_layer_rules),
)
