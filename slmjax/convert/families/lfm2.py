"""LFM2: gated short convolutions, and attention with norms of queries and keys in a few layers."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from slmjax.config import ConfigError
from slmjax.convert.family import (
    Family,
    Rule,
    TensorMap,
    convolution,
    joined,
    linear,
    norm,
    same,
)
from slmjax.convert.gguf import settings as gguf_settings
from slmjax.convert.gguf import tensors as gguf_tensors
from slmjax.convert.hf.settings import (
    layer_kinds,
    mixer_of_kind,
    read_attention,
    read_decoder,
    write_attention,
    write_decoder,
    write_mlp,
)
from slmjax.convert.settings import Settings
from slmjax.models.architecture import BlockConfig, HeadKind, ModelConfig
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.mixers.attention import AttentionConfig, Biases, QkNorm
from slmjax.models.mixers.short_convolution import ShortConvolutionConfig

# Defaults of keys that a config.json may leave out.
DEFAULTS = {
    "vocab_size": 65_536,
    "hidden_size": 2560,
    "intermediate_size": 12_288,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128_000,
    "norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "conv_bias": False,
    "conv_L_cache": 3,
    "block_multiple_of": 256,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": True,
    "rope_theta": 1e6,
}
KINDS: Mapping[str, type] = {"full_attention": AttentionConfig, "conv": ShortConvolutionConfig}
# Initial values of weights.
INITIAL = (
    "block_mlp_init_scale",
    "block_out_init_scale",
    "block_use_xavier_init",
    "conv_use_xavier_init",
)


def read(settings: Settings) -> ModelConfig:
    """Read a config.json as a `ModelConfig`."""
    settings.ignore(*INITIAL, "full_attn_idxs", "layer_types")
    _check_repeated(settings)
    mixers = {
        "full_attention": read_attention(settings, qk_norm=QkNorm.PER_HEAD),
        "conv": ShortConvolutionConfig(
            width=settings.positive("conv_L_cache"), bias=settings.take("conv_bias")
        ),
    }
    ffn = MlpConfig(hidden_dim=_hidden_dim(settings))
    blocks = [BlockConfig(mixer=mixers[kind], ffn=ffn) for kind in _read_kinds(settings)]
    # The older spelling takes precedence, as in transformers.
    is_tied = settings.take("tie_embedding", settings.take("tie_word_embeddings"))
    head = HeadKind.TIED if is_tied else HeadKind.UNTIED
    return dataclasses.replace(read_decoder(settings, blocks, eps="norm_eps"), head=head)


def _check_repeated(settings: Settings) -> None:
    """Raise ConfigError unless keys that repeat others have the same values; transformers ignores them."""
    width = settings.positive("hidden_size")
    for name in ("block_dim", "conv_dim", "conv_dim_out"):
        settings.expect(name, width, None)
    settings.expect("num_heads", settings.positive("num_attention_heads"), None)
    settings.expect("block_norm_eps", settings.take("norm_eps"), None)
    for name in ("block_use_swiglu", "use_pos_enc"):
        settings.expect(name, True, None)
    settings.ignore("theta")


def _read_kinds(settings: Settings) -> list[str]:
    num_layers = settings.take("num_hidden_layers")
    kinds = settings.take("layer_types", None)
    if kinds is None:
        # A list of the layers with attention, or all of them.
        full = settings.take("full_attn_idxs", range(num_layers))
        kinds = ["full_attention" if layer in full else "conv" for layer in range(num_layers)]
    if len(kinds) != num_layers or not set(kinds) <= set(KINDS):
        raise ConfigError(
            f"config.json: layer_types must name {num_layers} layers, each {' or '.join(KINDS)}, and is "
            f"{kinds}"
        )
    return kinds


def _hidden_dim(settings: Settings) -> int:
    """Return the width of the feed-forward layers, which files state as if they had no gate."""
    width = settings.positive("block_ff_dim", settings.positive("intermediate_size"))
    settings.ignore("intermediate_size")
    multiplier = settings.take("block_ffn_dim_multiplier")
    multiple = settings.positive("block_multiple_of")
    if not settings.take("block_auto_adjust_ff_dim"):
        return width
    # A gated layer of two thirds of the width has as many parameters as one without a gate.
    width = int(multiplier * int(2 * width / 3))
    return -(-width // multiple) * multiple


def write(model: ModelConfig) -> dict[str, Any]:
    """Write a model as the keys of a config.json."""
    kinds = layer_kinds(model, KINDS)
    attention = mixer_of_kind(model, AttentionConfig)
    short = mixer_of_kind(model, ShortConvolutionConfig)
    # Without layers of attention any number of heads will do that divides the width.
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    taps = {} if short is None else {"conv_L_cache": short.width, "conv_bias": short.bias}
    return {
        "model_type": "lfm2",
        **write_decoder(model, eps="norm_eps"),
        **(heads if attention is None else write_attention(attention)),
        **taps,
        "layer_types": kinds,
        "intermediate_size": write_mlp(next(model.blocks()).ffn)["intermediate_size"],
        "block_auto_adjust_ff_dim": False,
    }


def layer_rules(block: BlockConfig) -> tuple[Rule, ...]:
    """Return the rules of a layer: its mixer's, then those of all layers."""
    return (*(ATTENTION if isinstance(block.mixer, AttentionConfig) else SHORT_CONVOLUTION), *LAYER)


ATTENTION = (
    *linear("mixer/query", "self_attn.q_proj"),
    *linear("mixer/key", "self_attn.k_proj"),
    *linear("mixer/value", "self_attn.v_proj"),
    *linear("mixer/output", "self_attn.out_proj"),
    *norm("mixer/query_norm", "self_attn.q_layernorm"),
    *norm("mixer/key_norm", "self_attn.k_layernorm"),
)
PARTS = ("mixer/input_gate", "mixer/output_gate", "mixer/inner")  # in the order of their joined matrix
SHORT_CONVOLUTION = (
    joined([f"{part}/weight" for part in PARTS], "conv.in_proj.weight"),
    joined([f"{part}/bias" for part in PARTS], "conv.in_proj.bias"),
    convolution(["mixer/conv_taps"], "conv.conv.weight"),
    same("mixer/conv_bias", "conv.conv.bias"),
    *linear("mixer/output", "conv.out_proj"),
)
LAYER = (
    *norm("mixer_norm", "operator_norm"),
    *norm("ffn_norm", "ffn_norm"),
    *linear("ffn/gate", "feed_forward.w1"),
    *linear("ffn/up", "feed_forward.w3"),
    *linear("ffn/down", "feed_forward.w2"),
)
HF = Family(
    architecture="Lfm2ForCausalLM",
    read=read,
    write=write,
    defaults=DEFAULTS,
    tensor_map=TensorMap(
        around=(
            same("embed/table", "model.embed_tokens.weight"),
            *norm("final_norm", "model.embedding_norm"),
            same("head/weight", "lm_head.weight"),
        ),
        layer=layer_rules,
    ),
)


# GGUF -------------------------------------------------------------------------------------------------------
def read_gguf(settings: Settings) -> ModelConfig:
    """Read GGUF metadata as a `ModelConfig`."""
    kinds = gguf_settings.has_attention(settings)
    attention = gguf_settings.read_attention(settings, is_hybrid=True, qk_norm=QkNorm.PER_HEAD)
    short = ShortConvolutionConfig(width=settings.positive("shortconv.l_cache"))
    ffn = gguf_settings.read_mlp(settings)
    return gguf_settings.read_decoder(
        settings, [BlockConfig(mixer=attention if kind else short, ffn=ffn) for kind in kinds]
    )


def write_gguf(model: ModelConfig) -> dict[str, Any]:
    """Write a model as GGUF metadata."""
    layer_kinds(model, KINDS)
    attention = mixer_of_kind(model, AttentionConfig)
    short = mixer_of_kind(model, ShortConvolutionConfig)
    if attention is not None:
        gguf_settings.check_biases(attention, Biases.NONE)
        gguf_settings.check_plain_scale(attention)
        gguf_settings.check_square(model, attention)
    # The key is required also where no layer has a convolution.
    width = ShortConvolutionConfig().width if short is None else short.width
    return {
        **gguf_settings.write_decoder(model),
        **gguf_settings.write_hybrid_attention(model),
        **gguf_settings.write_mlp(next(model.blocks()).ffn),
        "shortconv.l_cache": width,
    }


GGUF_AROUND = (
    same("embed/table", "token_embd.weight"),
    # The norm after the layers has the name of one that other models have before them.
    *norm("final_norm", "token_embd_norm"),
    same("head/weight", "output.weight"),
)
GGUF_SHORT_CONVOLUTION = (
    joined([f"{part}/weight" for part in PARTS], "shortconv.in_proj.weight"),
    joined(["mixer/conv_taps"], "shortconv.conv.weight"),
    *linear("mixer/output", "shortconv.out_proj"),
)


def gguf_layer_rules(block: BlockConfig) -> tuple[Rule, ...]:
    """Return the rules of a layer: its mixer's, then those of all layers."""
    is_attention = isinstance(block.mixer, AttentionConfig)
    mixer = gguf_tensors.ATTENTION if is_attention else GGUF_SHORT_CONVOLUTION
    return (*mixer, *gguf_tensors.PRE_NORMS, *gguf_tensors.MLP)


GGUF = Family(
    architecture="lfm2",
    read=read_gguf,
    write=write_gguf,
    tensor_map=gguf_tensors.tensor_map(rules=gguf_layer_rules, around=GGUF_AROUND),
)
