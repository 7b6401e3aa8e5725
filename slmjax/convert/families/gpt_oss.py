"""GPT-OSS: attention sinks, biases everywhere, windows in every other layer, clamped experts."""

from typing import Any

import numpy as np

from slmjax.convert.family import (
    Arrays,
    Family,
    Inexpressible,
    Rule,
    Shapes,
    TensorMap,
    expect_kind,
    first_block,
    linear,
    norm,
    same,
    with_windows,
)
from slmjax.convert.gguf import settings as gguf_settings
from slmjax.convert.gguf import tensors as gguf_tensors
from slmjax.convert.hf.settings import (
    read_attention,
    read_decoder,
    read_rope,
    read_windows,
    write_attention,
    write_decoder,
    write_windows,
)
from slmjax.convert.hf.tensors import ATTENTION, EMBEDDING, PRE_NORMS
from slmjax.convert.settings import Settings
from slmjax.models.architecture import HeadKind, ModelConfig
from slmjax.models.ffn.mlp import CLAMP, STEEPNESS, Activation
from slmjax.models.ffn.moe import MoeConfig
from slmjax.models.mixers.attention import Biases

# Defaults of keys that a config.json may leave out.
DEFAULTS = {
    "num_hidden_layers": 36,
    "num_local_experts": 128,
    "vocab_size": 201_088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "head_dim": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "sliding_window": 128,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "num_experts_per_tok": 4,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "attention_bias": True,
    "rope_theta": 150_000.0,
}
# Rotary positions of a config.json without any.
ANGLES = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def read(settings: Settings) -> ModelConfig:
    """Read a config.json as a `ModelConfig`."""
    settings.expect("hidden_act", "silu")
    settings.expect("attention_bias", True)
    # Constants of the activation, which our CLAMPED_SILU has with these values only.
    settings.expect("swiglu_limit", CLAMP)
    settings.expect("swiglu_alpha", STEEPNESS)
    settings.ignore("initial_context_length")  # repeats a key of the scaling
    num_layers = settings.take("num_hidden_layers")
    selected = settings.take("num_experts_per_tok")
    settings.expect("experts_per_token", selected)  # name in the release, in addition to that of transformers
    attention = read_attention(settings, biases=Biases.ALL, sinks=True, **read_rope(settings, default=ANGLES))
    ffn = MoeConfig(
        num_experts=settings.take("num_local_experts"),
        num_selected=selected,
        hidden_dim=settings.take("intermediate_size"),
        activation=Activation.CLAMPED_SILU,
        bias=True,
    )
    windows = read_windows(
        settings,
        num_layers=num_layers,
        window=settings.optional("sliding_window"),
        default=[i % 2 == 0 for i in range(num_layers)],
    )
    blocks = with_windows(attention, ffn, windows)
    return read_decoder(settings, blocks)


def write(model: ModelConfig) -> dict[str, Any]:
    """Write a model as the keys of a config.json."""
    attention, ffn = first_block(model)
    moe = expect_kind(ffn, MoeConfig, "a feed-forward layer")
    if moe.activation is not Activation.CLAMPED_SILU:
        raise Inexpressible(f"the activation is {moe.activation.value}, but must be clamped_silu")
    sizes = {
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_selected,
        "intermediate_size": moe.hidden_dim,
        "hidden_act": "silu",
        "attention_bias": True,
        "swiglu_limit": CLAMP,
    }
    keys = {
        "model_type": "gpt_oss",
        **write_decoder(model),
        **write_attention(attention),
        **sizes,
        **write_windows(model),
    }
    # A file without scaling would get the library's default, YaRN (`ANGLES`).
    return keys if keys["rope_scaling"] else {**keys, "rope_scaling": {"rope_type": "default"}}


def interleaved(ours: tuple[str, str], theirs: str) -> Rule:
    """Rule for two parameters interleaved along the last dim."""

    # Gate and up alternate; the matrices are [E, in, out] as ours, not transposed as in other families.
    def read_halves(arrays: Arrays, _: Shapes) -> Arrays:
        return [arrays[0][..., 0::2], arrays[0][..., 1::2]]

    def write_halves(arrays: Arrays) -> Arrays:
        return [np.stack(arrays, axis=-1).reshape(*arrays[0].shape[:-1], -1)]

    return Rule(ours=ours, theirs=(theirs,), read=read_halves, write=write_halves)


LAYER = (
    *PRE_NORMS,
    *ATTENTION,
    same("mixer/sinks", "self_attn.sinks"),
    *linear("ffn/router", "mlp.router"),
    interleaved(("ffn/experts/gate", "ffn/experts/up"), "mlp.experts.gate_up_proj"),
    interleaved(("ffn/experts/gate_bias", "ffn/experts/up_bias"), "mlp.experts.gate_up_proj_bias"),
    same("ffn/experts/down", "mlp.experts.down_proj"),
    same("ffn/experts/down_bias", "mlp.experts.down_proj_bias"),
)
HF = Family(
    architecture="GptOssForCausalLM",
    read=read,
    write=write,
    defaults=DEFAULTS,
    tensor_map=TensorMap(around=EMBEDDING, layer=LAYER),
)


# GGUF -------------------------------------------------------------------------------------------------------
def read_gguf(settings: Settings) -> ModelConfig:
    """Read GGUF metadata as a `ModelConfig`."""
    # The windows of every other layer and the activation are constants in llama.cpp's code.
    settings.expect("attention.sliding_window_pattern", 2)
    attention = gguf_settings.read_attention(settings, biases=Biases.ALL, sinks=True)
    windows = gguf_settings.pattern_windows(
        settings.take("block_count"), settings.positive("attention.sliding_window"), 2
    )
    ffn = gguf_settings.read_moe(settings, activation=Activation.CLAMPED_SILU, bias=True)
    return gguf_settings.read_decoder(settings, with_windows(attention, ffn, windows))


def write_gguf(model: ModelConfig) -> dict[str, Any]:
    """Write a model as GGUF metadata."""
    attention, ffn = first_block(model)
    gguf_settings.check_biases(attention, Biases.ALL)
    gguf_settings.check_head(model, HeadKind.UNTIED)
    gguf_settings.check_plain_scale(attention)
    keys = {
        **gguf_settings.write_decoder(model),
        **gguf_settings.write_attention(attention),
        **gguf_settings.write_moe(ffn),
    }
    window = gguf_settings.common_window(model)
    # llama.cpp requires the key, and windows cannot be turned off.
    if window is None:
        raise Inexpressible("every other layer has a window")
    return {**keys, "attention.sliding_window": window}


GGUF_LAYER = (
    *norm("mixer_norm", "attn_norm"),
    # The norm before the experts, in spite of llama.cpp's name: it comes after attention.
    *norm("ffn_norm", "post_attention_norm"),
    *gguf_tensors.ATTENTION,
    same("mixer/sinks", "attn_sinks.weight"),
    *gguf_tensors.MOE,
)
GGUF = Family(
    architecture="gpt-oss", read=read_gguf, write=write_gguf, tensor_map=gguf_tensors.tensor_map(*GGUF_LAYER)
)
