"""OLMo 2: norms only after each sublayer; queries and keys normalized over all heads together."""

import dataclasses
from typing import Any

from slmjax.convert.family import Family, TensorMap, attentions, first_block
from slmjax.convert.gguf import settings as gguf_settings
from slmjax.convert.gguf import tensors as gguf_tensors
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
from slmjax.convert.hf.tensors import ATTENTION, EMBEDDING, GATED_MLP, POST_NORMS
from slmjax.convert.settings import Settings
from slmjax.models.architecture import BlockConfig, HeadKind, ModelConfig, NormPlacement
from slmjax.models.mixers.attention import Biases, QkNorm

# Defaults of keys that a config.json may leave out.
DEFAULTS = {
    "vocab_size": 50_304,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
}


def read(settings: Settings) -> ModelConfig:
    """Read a config.json as a `ModelConfig`."""
    biases = read_biases(settings)
    # The norm is over all heads together: its scale has the width of the projection.
    attention = read_attention(settings, qk_norm=QkNorm.ALL_HEADS, biases=biases)
    block = BlockConfig(mixer=attention, ffn=read_mlp(settings), norm=NormPlacement.POST)
    return read_decoder(settings, [block] * settings.take("num_hidden_layers"))


def write(model: ModelConfig) -> dict[str, Any]:
    """Write a model as the keys of a config.json."""
    attention, ffn = first_block(model)
    biases = write_biases(attention)
    return {
        "model_type": "olmo2",
        **write_decoder(model),
        **write_attention(attention),
        **write_mlp(ffn),
        **biases,
    }


TENSOR_MAP = TensorMap(around=EMBEDDING, layer=(*POST_NORMS, *ATTENTION, *GATED_MLP))
HF = Family(architecture="Olmo2ForCausalLM", read=read, write=write, defaults=DEFAULTS, tensor_map=TENSOR_MAP)


# GGUF -------------------------------------------------------------------------------------------------------
def read_gguf(settings: Settings) -> ModelConfig:
    """Read GGUF metadata as a `ModelConfig`, also of OLMo 3."""
    # In llama.cpp's code, with a window every fourth layer is full, and only full layers have scaled angles.
    settings.expect("attention.sliding_window_pattern", 4)
    attention = gguf_settings.read_attention(settings, qk_norm=QkNorm.ALL_HEADS)
    windows = gguf_settings.pattern_windows(
        settings.take("block_count"), settings.take("attention.sliding_window", None), 4
    )
    local = dataclasses.replace(attention, rope_scaling=None)
    ffn = gguf_settings.read_mlp(settings)
    mixers = [
        attention if window is None else dataclasses.replace(local, window=window) for window in windows
    ]
    return gguf_settings.read_decoder(
        settings, [BlockConfig(mixer=mixer, ffn=ffn, norm=NormPlacement.POST) for mixer in mixers]
    )


def write_gguf(model: ModelConfig) -> dict[str, Any]:
    """Write a model as GGUF metadata."""
    attention, ffn = first_block(model)
    gguf_settings.check_biases(attention, Biases.NONE)
    gguf_settings.check_plain_scale(attention)
    gguf_settings.check_square(model, attention)
    gguf_settings.check_head(model, HeadKind.UNTIED)
    mixers = attentions(model)
    # The scaling in the metadata is that of full layers.
    full = next((mixer for mixer in mixers if mixer.window is None), mixers[0])
    window = gguf_settings.common_window(model)
    keys = {
        **gguf_settings.write_decoder(model),
        **gguf_settings.write_attention(full),
        **gguf_settings.write_mlp(ffn),
    }
    return keys if window is None else {**keys, "attention.sliding_window": window}


GGUF = Family(
    architecture="olmo2",
    read=read_gguf,
    write=write_gguf,
    tensor_map=gguf_tensors.tensor_map(*gguf_tensors.POST_NORMS, *gguf_tensors.ATTENTION, *gguf_tensors.MLP),
)
