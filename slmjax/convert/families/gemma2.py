"""Gemma 2: sandwich norms, centered scales, windows in every other layer, soft caps on scores and logits."""

from typing import Any

from slmjax.convert.family import Family, TensorMap, first_block, with_windows
from slmjax.convert.gguf import settings as gguf_settings
from slmjax.convert.gguf import tensors as gguf_tensors
from slmjax.convert.hf.settings import (
    check_width,
    read_attention,
    read_biases,
    read_decoder,
    read_mlp,
    read_windows,
    write_attention,
    write_biases,
    write_decoder,
    write_mlp,
    write_windows,
)
from slmjax.convert.hf.tensors import ATTENTION, EMBEDDING, GATED_MLP, SANDWICH_NORMS
from slmjax.convert.settings import Settings
from slmjax.models.architecture import HeadKind, ModelConfig, NormPlacement
from slmjax.models.ffn.mlp import Activation
from slmjax.models.layers import NormKind
from slmjax.models.mixers.attention import AttentionConfig, Biases

# Defaults of keys that a config.json may leave out.
DEFAULTS = {
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "rope_theta": 10_000.0,
}


def read(settings: Settings) -> ModelConfig:
    """Read a config.json as a `ModelConfig`."""
    # Set in models for embeddings, which have no causal mask.
    settings.expect("use_bidirectional_attention", False)
    num_layers = settings.take("num_hidden_layers")
    attention = read_attention(
        settings,
        scale=settings.positive("query_pre_attn_scalar") ** -0.5,
        softcap=settings.optional("attn_logit_softcapping"),
        biases=read_biases(settings),
    )
    settings.ignore("hidden_act")  # older name of hidden_activation, which takes precedence
    ffn = read_mlp(settings, activation="hidden_activation")
    windows = read_windows(
        settings,
        num_layers=num_layers,
        window=settings.optional("sliding_window"),
        # Older files have no layer_types: the first layer is windowed, the second full, and so on.
        default=[i % 2 == 0 for i in range(num_layers)],
    )
    blocks = with_windows(attention, ffn, windows, norm=NormPlacement.SANDWICH)
    return read_decoder(
        settings,
        blocks,
        # Scales are stored as differences from one.
        norm_kind=NormKind.CENTERED_RMS,
        # A constant of the library's code.
        embed_multiplier=settings.take("hidden_size") ** 0.5,
        logit_softcap=settings.optional("final_logit_softcapping"),
    )


def write(model: ModelConfig) -> dict[str, Any]:
    """Write a model as the keys of a config.json."""
    attention, ffn = first_block(model)
    check_width(model, attention.num_heads)
    keys = {
        **write_decoder(model),
        **write_attention(attention),
        **write_mlp(ffn, activation="hidden_activation"),
    }
    return {"model_type": "gemma2", **keys, **write_windows(model), **write_scores(model, attention)}


def write_scores(model: ModelConfig, attention: AttentionConfig) -> dict[str, Any]:
    """Write the keys of scores and logits, which Gemma 3 shares."""
    # Scores are divided by the root of this number; 12 digits restore what was written in the file.
    scalar = float(f"{(attention.scale or 1.0) ** -2:.12g}")
    return {
        "query_pre_attn_scalar": int(scalar) if scalar.is_integer() else scalar,
        "attn_logit_softcapping": attention.softcap,
        "final_logit_softcapping": model.logit_softcap,
        **write_biases(attention),
    }


HF = Family(
    architecture="Gemma2ForCausalLM",
    read=read,
    write=write,
    defaults=DEFAULTS,
    tensor_map=TensorMap(around=EMBEDDING, layer=(*SANDWICH_NORMS, *ATTENTION, *GATED_MLP)),
)


# GGUF -------------------------------------------------------------------------------------------------------
LARGEST = gguf_settings.NamedSize(name="Gemma 2 27B", num_layers=46)


def read_gguf(settings: Settings) -> ModelConfig:
    """Read GGUF metadata as a `ModelConfig`."""
    # The pattern of windows, the scale of scores and the use of soft caps are constants in llama.cpp's code.
    settings.expect("attention.sliding_window_pattern", 2)
    num_layers = settings.take("block_count")
    attention = gguf_settings.read_attention(
        settings,
        softcap=float(settings.take("attn_logit_softcapping", 50.0)) or None,
        scale=gguf_settings.read_named_scale(settings, LARGEST),
    )
    windows = gguf_settings.pattern_windows(
        num_layers, settings.positive("attention.sliding_window", 4096), 2
    )
    ffn = gguf_settings.read_mlp(settings, Activation.GELU)
    return gguf_settings.read_decoder(
        settings,
        with_windows(attention, ffn, windows, norm=NormPlacement.SANDWICH),
        norm_kind=NormKind.CENTERED_RMS,
        embed_multiplier=settings.take("embedding_length") ** 0.5,
        logit_softcap=float(settings.nonzero("final_logit_softcapping", 30.0)),
    )


def write_gguf(model: ModelConfig) -> dict[str, Any]:
    """Write a model as GGUF metadata."""
    attention, ffn = first_block(model)
    gguf_settings.check_biases(attention, Biases.NONE)
    gguf_settings.check_head(model, HeadKind.TIED)
    gguf_settings.check_named_scale(model, attention, LARGEST)
    caps = {"attn_logit_softcapping": attention.softcap, "final_logit_softcapping": model.logit_softcap}
    window = {"attention.sliding_window": gguf_settings.common_window(model)}
    return {
        **gguf_settings.write_decoder(model),
        **gguf_settings.write_attention(attention),
        **gguf_settings.write_mlp(ffn),
        **caps,
        **window,
    }


GGUF_RULES = (*gguf_tensors.PRE_NORMS, *gguf_tensors.POST_NORMS, *gguf_tensors.ATTENTION, *gguf_tensors.MLP)
GGUF_TENSOR_MAP = gguf_tensors.tensor_map(
    *gguf_tensors.with_centered_norms(GGUF_RULES),
    around=gguf_tensors.with_centered_norms(gguf_tensors.AROUND),
)
GGUF = Family(architecture="gemma2", read=read_gguf, write=write_gguf, tensor_map=GGUF_TENSOR_MAP)
