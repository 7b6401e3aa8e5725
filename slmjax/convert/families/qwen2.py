"""Qwen2 and Qwen2.5: biases of query, key and value; optional windows in some layers."""

from typing import Any

from slmjax.convert.families.qwen3 import qwen_windows, write_qwen_windows
from slmjax.convert.family import Family, TensorMap, first_block, with_windows
from slmjax.convert.gguf import settings as gguf_settings
from slmjax.convert.gguf import tensors as gguf_tensors
from slmjax.convert.hf.settings import (
    read_attention,
    read_decoder,
    read_mlp,
    write_attention,
    write_decoder,
    write_mlp,
)
from slmjax.convert.hf.tensors import ATTENTION, EMBEDDING, GATED_MLP, PRE_NORMS
from slmjax.convert.settings import Settings
from slmjax.models.architecture import BlockConfig, ModelConfig
from slmjax.models.mixers.attention import Biases

# Defaults of keys that a config.json may leave out.
DEFAULTS = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 22_016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "rope_theta": 10_000.0,
}


def read(settings: Settings) -> ModelConfig:
    """Read a config.json as a `ModelConfig`."""
    # Multimodal positions, which have three coordinates.
    settings.expect("use_mrope", False)
    # A constant of the library's code: there is no key for these biases.
    attention = read_attention(settings, biases=Biases.QKV)
    ffn = read_mlp(settings)
    return read_decoder(settings, with_windows(attention, ffn, qwen_windows(settings)))


def write(model: ModelConfig) -> dict[str, Any]:
    """Write a model as the keys of a config.json."""
    attention, ffn = first_block(model)
    keys = {
        **write_decoder(model),
        **write_attention(attention),
        **write_mlp(ffn),
        **write_qwen_windows(model),
    }
    return {"model_type": "qwen2", **keys}


HF = Family(
    architecture="Qwen2ForCausalLM",
    read=read,
    write=write,
    defaults=DEFAULTS,
    tensor_map=TensorMap(around=EMBEDDING, layer=(*PRE_NORMS, *ATTENTION, *GATED_MLP)),
)


# GGUF -------------------------------------------------------------------------------------------------------
def read_gguf(settings: Settings) -> ModelConfig:
    """Read GGUF metadata as a `ModelConfig`."""
    block = BlockConfig(
        mixer=gguf_settings.read_attention(settings, biases=Biases.QKV), ffn=gguf_settings.read_mlp(settings)
    )
    return gguf_settings.read_decoder(settings, [block] * settings.take("block_count"))


def write_gguf(model: ModelConfig) -> dict[str, Any]:
    """Write a model as GGUF metadata."""
    attention, ffn = first_block(model)
    gguf_settings.check_biases(attention, Biases.QKV)
    gguf_settings.check_plain_scale(attention)
    gguf_settings.check_square(model, attention)
    return {
        **gguf_settings.write_decoder(model),
        **gguf_settings.write_attention(attention),
        **gguf_settings.write_mlp(ffn),
    }


GGUF = Family(
    architecture="qwen2",
    read=read_gguf,
    write=write_gguf,
    tensor_map=gguf_tensors.tensor_map(*gguf_tensors.PRE_NORMS, *gguf_tensors.ATTENTION, *gguf_tensors.MLP),
)
