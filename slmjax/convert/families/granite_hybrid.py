"""Granite 4: Mamba-2, attention in a few layers, with or without experts, and Granite's multipliers.

Dense models with attention alone are of this family too.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from slmjax.config import ConfigError
from slmjax.convert.families import granite
from slmjax.convert.family import (
    Arrays,
    Family,
    Inexpressible,
    Rule,
    Shapes,
    TensorMap,
    expect_kind,
    joined,
    linear,
    matrix,
    stacked_experts,
)
from slmjax.convert.gguf import mamba2_settings as gguf_mamba2
from slmjax.convert.gguf import settings as gguf_settings
from slmjax.convert.gguf import tensors as gguf_tensors
from slmjax.convert.hf import mamba2_settings
from slmjax.convert.hf.mamba2_settings import mamba2_rules, read_mamba2, write_expansion, write_mamba2
from slmjax.convert.hf.settings import layer_kinds, mixer_of_kind, read_activation, read_mlp, write_activation
from slmjax.convert.hf.tensors import ATTENTION, EMBEDDING, PRE_NORMS
from slmjax.convert.settings import Settings
from slmjax.models.architecture import BlockConfig, ModelConfig
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.ffn.moe import MoeConfig
from slmjax.models.mixers.attention import AttentionConfig
from slmjax.models.mixers.mamba2 import Mamba2Config
from slmjax.models.protocols import FfnConfig

# Defaults of keys that a config.json may leave out.
DEFAULTS = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": 1024,
    "rope_theta": 10_000.0,
    **mamba2_settings.HYBRID_DEFAULTS,
}
# Released files have the first name of each kind, transformers writes the second.
ATTENTION_NAMES = ("attention", "full_attention")
RECURRENT_NAMES = ("mamba", "linear_attention")
KINDS: Mapping[str, type] = {"attention": AttentionConfig, "mamba": Mamba2Config}


def read(settings: Settings) -> ModelConfig:
    """Read a config.json as a `ModelConfig`."""
    settings.ignore("normalization_function", "init_method", "num_experts")
    # "nope" is another spelling of the library's default: no positions.
    has_rope = settings.take("position_embedding_type", "nope") == "rope"
    if not has_rope:
        settings.ignore("rope_theta", "rope_scaling", "rope_parameters")
    attention = granite.read_attention_with_scale(settings, **({} if has_rope else {"rope_base": None}))
    kinds = _read_kinds(settings)
    # Files of models without such layers may state sizes that do not fit.
    mamba2 = _read_mamba2(settings) if not set(kinds) <= set(ATTENTION_NAMES) else None
    settings.ignore(*MAMBA_KEYS)
    ffn = _read_ffn(settings)
    mixers = [attention if kind in ATTENTION_NAMES or mamba2 is None else mamba2 for kind in kinds]
    return granite.read_scaled_decoder(settings, [BlockConfig(mixer=mixer, ffn=ffn) for mixer in mixers])


def _read_kinds(settings: Settings) -> list[str]:
    num_layers = settings.take("num_hidden_layers")
    # transformers takes both keys, and has recurrent layers by default.
    kinds = settings.take("layer_types", settings.take("layers_block_type", ["mamba"] * num_layers))
    known = (*ATTENTION_NAMES, *RECURRENT_NAMES)
    if len(kinds) != num_layers or not set(kinds) <= set(known):
        raise ConfigError(
            f"config.json: layer_types must name {num_layers} layers, each one of {', '.join(known)}, and is "
            f"{kinds}"
        )
    return kinds


def _read_mamba2(settings: Settings) -> Mamba2Config:
    # The activation of the convolutions and of the gate.
    settings.expect("hidden_act", "silu")
    return read_mamba2(
        settings,
        inner_dim=settings.positive("mamba_expand") * settings.positive("hidden_size"),
        output_bias=settings.take("mamba_proj_bias"),
    )


def _read_ffn(settings: Settings) -> FfnConfig:
    """Read the feed-forward layer, which is called the shared expert also where there are no others."""
    num_experts = settings.take("num_local_experts")
    settings.ignore("num_experts_per_tok", "intermediate_size")
    if not num_experts:
        return read_mlp(settings, width="shared_intermediate_size")
    return MoeConfig(
        num_experts=num_experts,
        num_selected=settings.take("num_experts_per_tok"),
        hidden_dim=settings.positive("intermediate_size"),
        shared_hidden_dim=settings.positive("shared_intermediate_size"),
        activation=read_activation(settings),
        # The softmax is over the selected experts.
        normalize_weights=True,
    )


def write(model: ModelConfig) -> dict[str, Any]:
    """Write a model as the keys of a config.json."""
    kinds = layer_kinds(model, KINDS)
    attention = mixer_of_kind(model, AttentionConfig)
    mamba2 = mixer_of_kind(model, Mamba2Config)
    return {
        "model_type": "granitemoehybrid",
        **granite.write_scaled_decoder(model),
        # Without layers of attention any number of heads will do that divides the width.
        **(NO_ATTENTION if attention is None else granite.write_attention_with_scale(attention)),
        "position_embedding_type": "nope" if attention is None or attention.rope_base is None else "rope",
        **_write_mamba2(mamba2, model.embed_dim),
        **_write_ffn(next(model.blocks()).ffn),
        "layer_types": kinds,
    }


def _write_mamba2(mixer: Mamba2Config | None, embed_dim: int) -> dict[str, Any]:
    if mixer is None:
        # The library checks the sizes of recurrent layers even if there are none; one head always fits.
        return {"mamba_n_heads": 1}
    if mixer.input_bias != mixer.output_bias:
        raise Inexpressible("either both projections of a Mamba-2 layer have biases, or neither has")
    return {"mamba_expand": write_expansion(mixer, embed_dim), **write_mamba2(mixer)}


def _write_ffn(ffn: FfnConfig | None) -> dict[str, Any]:
    if isinstance(ffn, MlpConfig):
        return {
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": ffn.hidden_dim,
            # The library has both keys; only the other one is used without experts.
            "intermediate_size": ffn.hidden_dim,
            "hidden_act": write_activation(ffn.activation),
        }
    moe = expect_kind(ffn, MoeConfig, "a feed-forward layer")
    if not moe.shared_hidden_dim:
        raise Inexpressible("besides the experts there is a shared one")
    return {
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_selected,
        "shared_intermediate_size": moe.shared_hidden_dim,
        "intermediate_size": moe.hidden_dim,
        "hidden_act": write_activation(moe.activation),
    }


def stacked_pair(ours: tuple[str, str], theirs: str) -> Rule:
    """Rule for two kinds of experts' matrices [E, in, out] that are one tensor [E, 2 out, in]."""

    def read_parts(arrays: Arrays, shapes: Shapes) -> Arrays:
        return [np.swapaxes(part, 1, 2) for part in np.split(arrays[0], 2, axis=1)]

    return Rule(
        ours=ours,
        theirs=(theirs,),
        read=read_parts,
        write=lambda arrays: [np.concatenate([np.swapaxes(array, 1, 2) for array in arrays], axis=1)],
    )


def layer_rules(block: BlockConfig) -> tuple[Rule, ...]:
    """Return the rules of a layer, whose feed-forward layer has the name of the shared expert."""
    shared = "ffn/shared" if isinstance(block.ffn, MoeConfig) else "ffn"
    return (
        *PRE_NORMS,
        *(ATTENTION if isinstance(block.mixer, AttentionConfig) else mamba2_rules("mamba")),
        matrix("ffn/router/weight", "block_sparse_moe.router.layer.weight"),
        stacked_pair(("ffn/experts/gate", "ffn/experts/up"), "block_sparse_moe.input_linear.weight"),
        stacked_experts("ffn/experts/down", "block_sparse_moe.output_linear.weight"),
        joined((f"{shared}/gate/weight", f"{shared}/up/weight"), "shared_mlp.input_linear.weight"),
        *linear(f"{shared}/down", "shared_mlp.output_linear"),
    )


NO_ATTENTION = {"num_attention_heads": 1, "num_key_value_heads": 1}
MAMBA_KEYS = (*mamba2_settings.HYBRID_DEFAULTS, *mamba2_settings.IGNORED)
HF = Family(
    architecture="GraniteMoeHybridForCausalLM",
    read=read,
    write=write,
    defaults=DEFAULTS,
    tensor_map=TensorMap(around=EMBEDDING, layer=layer_rules),
)


# GGUF -------------------------------------------------------------------------------------------------------
def read_gguf(settings: Settings) -> ModelConfig:
    """Read GGUF metadata as a `ModelConfig`."""
    kinds = gguf_settings.has_attention(settings)
    attention = granite.read_gguf_attention(settings, is_hybrid=True)
    mamba2 = gguf_mamba2.read_mamba2(settings)
    ffn: FfnConfig = (
        gguf_settings.read_moe(
            settings,
            width="feed_forward_length",
            shared_hidden_dim=settings.take("expert_shared_feed_forward_length"),
        )
        if settings.take("expert_count", 0)
        else gguf_settings.read_mlp(settings)
    )
    settings.ignore("expert_used_count")
    blocks = [BlockConfig(mixer=attention if kind else mamba2, ffn=ffn) for kind in kinds]
    return granite.read_gguf_decoder(settings, blocks)


def write_gguf(model: ModelConfig) -> dict[str, Any]:
    """Write a model as GGUF metadata."""
    layer_kinds(model, KINDS)
    attention = mixer_of_kind(model, AttentionConfig)
    mamba2 = mixer_of_kind(model, Mamba2Config)
    if attention is None or mamba2 is None:
        raise Inexpressible("there are layers of both kinds")
    ffn = next(model.blocks()).ffn
    if isinstance(ffn, MoeConfig):
        shared = {"expert_shared_feed_forward_length": ffn.shared_hidden_dim}
        widths = {**gguf_settings.write_moe(ffn), **shared}
    else:
        widths = gguf_settings.write_mlp(ffn)
    return {
        **gguf_settings.write_decoder(model),
        **gguf_settings.write_hybrid_attention(model),
        **granite.write_gguf_multipliers(model, attention),
        **gguf_mamba2.write_mamba2(mamba2),
        **widths,
    }


GGUF_SHARED = (
    *linear("ffn/shared/gate", "ffn_gate_shexp"),
    *linear("ffn/shared/up", "ffn_up_shexp"),
    *linear("ffn/shared/down", "ffn_down_shexp"),
)


def gguf_layer_rules(block: BlockConfig) -> tuple[Rule, ...]:
    """Return the rules of a layer."""
    mixer = (
        gguf_tensors.paired_rules(block.mixer, gguf_tensors.ATTENTION)
        if isinstance(block.mixer, AttentionConfig)
        else gguf_mamba2.mamba2_rules(expect_kind(block.mixer, Mamba2Config, "a mixer").num_groups)
    )
    ffn = (*gguf_tensors.MLP, *gguf_tensors.MOE, *GGUF_SHARED)
    return (*mixer, *gguf_tensors.PRE_NORMS, *ffn)


GGUF = Family(
    architecture="granitehybrid",
    read=read_gguf,
    write=write_gguf,
    tensor_map=gguf_tensors.tensor_map(rules=gguf_layer_rules),
)
