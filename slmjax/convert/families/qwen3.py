"""Qwen3: query and key norms per head, no biases; optional windows in some layers."""

from typing import Any

from slmjax.convert.family import Family, TensorMap, first_block, with_windows
from slmjax.convert.gguf import settings as gguf_settings
from slmjax.convert.gguf import tensors as gguf_tensors
from slmjax.convert.hf.settings import (
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
from slmjax.convert.hf.tensors import ATTENTION, EMBEDDING, GATED_MLP, PRE_NORMS
from slmjax.convert.settings import Settings
from slmjax.models.architecture import BlockConfig, ModelConfig
from slmjax.models.mixers.attention import Biases, QkNorm

# Defaults of keys that a config.json may leave out.
DEFAULTS = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 22_016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "rope_theta": 10_000.0,
}


def read(settings: Settings) -> ModelConfig:
    """Read a config.json as a `ModelConfig`."""
    biases = read_biases(settings)
    attention = read_attention(settings, qk_norm=QkNorm.PER_HEAD, biases=biases)
    ffn = read_mlp(settings)
    return read_decoder(settings, with_windows(attention, ffn, qwen_windows(settings)))


def qwen_windows(settings: Settings) -> list[int | None]:
    """Read the window of each layer: if windows are used, those from `max_window_layers` on have one."""
    num_layers = settings.take("num_hidden_layers")
    window = settings.optional("sliding_window")
    in_use = settings.take("use_sliding_window")
    # Despite its name, the index of the first windowed layer.
    first = settings.take("max_window_layers")
    window = window if in_use else None
    return read_windows(
        settings,
        num_layers=num_layers,
        window=window,
        default=[window is not None and layer >= first for layer in range(num_layers)],
    )


def write_qwen_windows(model: ModelConfig) -> dict[str, Any]:
    """Write the keys of `qwen_windows`."""
    windows = write_windows(model)
    # layer_types decides in newer releases, and these two keys in older ones: both are written.
    first = next(
        (layer for layer, kind in enumerate(windows["layer_types"]) if kind == "sliding_attention"),
        model.num_layers,
    )
    return {**windows, "use_sliding_window": first < model.num_layers, "max_window_layers": first}


def write(model: ModelConfig) -> dict[str, Any]:
    """Write a model as the keys of a config.json."""
    attention, ffn = first_block(model)
    windows = write_qwen_windows(model)
    biases = write_biases(attention)
    return {
        "model_type": "qwen3",
        **write_decoder(model),
        **write_attention(attention),
        **write_mlp(ffn),
        **windows,
        **biases,
    }


HF = Family(
    architecture="Qwen3ForCausalLM",
    read=read,
    write=write,
    defaults=DEFAULTS,
    tensor_map=TensorMap(around=EMBEDDING, layer=(*PRE_NORMS, *ATTENTION, *GATED_MLP)),
)


# GGUF -------------------------------------------------------------------------------------------------------
def read_gguf(settings: Settings) -> ModelConfig:
    """Read GGUF metadata as a `ModelConfig`."""
    attention = gguf_settings.read_attention(settings, qk_norm=QkNorm.PER_HEAD)
    block = BlockConfig(mixer=attention, ffn=gguf_settings.read_mlp(settings))
    return gguf_settings.read_decoder(settings, [block] * settings.take("block_count"))


def write_gguf(model: ModelConfig) -> dict[str, Any]:
    """Write a model as GGUF metadata."""
    attention, ffn = first_block(model)
    gguf_settings.check_biases(attention, Biases.NONE)
    gguf_settings.check_plain_scale(attention)
    return {
        **gguf_settings.write_decoder(model),
        **gguf_settings.write_attention(attention),
        **gguf_settings.write_mlp(ffn),
    }


GGUF = Family(
    architecture="qwen3",
    read=read_gguf,
    write=write_gguf,
    tensor_map=gguf_tensors.tensor_map(*gguf_tensors.PRE_NORMS, *gguf_tensors.ATTENTION, *gguf_tensors.MLP),
)
