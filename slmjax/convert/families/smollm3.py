"""SmolLM3: a Llama in which every fourth layer has no positions."""

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
    read_rope,
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
from slmjax.models.mixers.attention import Biases

# Defaults of keys that a config.json may leave out.
DEFAULTS = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 11_008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
    "no_rope_layer_interval": 4,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "rope_theta": 2e6,
}


def read(settings: Settings) -> ModelConfig:
    """Read a config.json as a `ModelConfig`."""
    num_layers = settings.take("num_hidden_layers")
    every = settings.positive("no_rope_layer_interval")
    # 1 for layers with rotary positions, in spite of the name
    rotated = settings.take("no_rope_layers", [int((layer + 1) % every != 0) for layer in range(num_layers)])
    window = settings.optional("sliding_window") if settings.take("use_sliding_window") else None
    settings.ignore("sliding_window", "max_window_layers")
    windows = read_windows(
        settings,
        num_layers=num_layers,
        window=window,
        default=[window is not None and not has_rope for has_rope in rotated],
    )
    biases = read_biases(settings)
    # Every fourth layer has no positions (Yang et al., 2025, "RoPE to NoRoPE and Back Again").
    plain = read_attention(settings, rope_base=None, biases=biases)
    rotary = dataclasses.replace(plain, **read_rope(settings))
    ffn = read_mlp(settings, bias=settings.take("mlp_bias"))
    mixers = [
        dataclasses.replace(rotary if has_rope else plain, window=size)
        for has_rope, size in zip(rotated, windows, strict=True)
    ]
    return read_decoder(settings, [BlockConfig(mixer=mixer, ffn=ffn) for mixer in mixers])


def write(model: ModelConfig) -> dict[str, Any]:
    """Write a model as the keys of a config.json."""
    attention, ffn = first_block(model)
    mixers = attentions(model)
    # Layer 0 may have no positions: the keys of angles come from the first layer that has them.
    rotary = next((mixer for mixer in mixers if mixer.rope_base is not None), attention)
    windows = write_windows(model)
    extra = {
        "no_rope_layers": [int(mixer.rope_base is not None) for mixer in mixers],
        "use_sliding_window": "sliding_attention" in windows["layer_types"],
        **write_biases(attention),
        "mlp_bias": getattr(ffn, "bias", False),
    }
    keys = {**write_decoder(model), **write_attention(rotary), **write_mlp(ffn)}
    return {"model_type": "smollm3", **keys, **windows, **extra}


HF = Family(
    architecture="SmolLM3ForCausalLM",
    read=read,
    write=write,
    defaults=DEFAULTS,
    tensor_map=TensorMap(around=EMBEDDING, layer=(*PRE_NORMS, *ATTENTION, *GATED_MLP)),
)


# GGUF -------------------------------------------------------------------------------------------------------
def read_gguf(settings: Settings) -> ModelConfig:
    """Read GGUF metadata as a `ModelConfig`."""
    # In llama.cpp's code, every fourth layer has no positions.
    rotary = gguf_settings.read_attention(settings)
    plain = dataclasses.replace(rotary, rope_base=None)
    ffn = gguf_settings.read_mlp(settings)
    mixers = [plain if layer % 4 == 3 else rotary for layer in range(settings.take("block_count"))]
    return gguf_settings.read_decoder(settings, [BlockConfig(mixer=mixer, ffn=ffn) for mixer in mixers])


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


def gguf_tensor_map(model: ModelConfig) -> TensorMap:
    """Return the tensor map of a model, which depends on its number of heads."""
    return gguf_tensors.paired_tensor_map(
        model, *gguf_tensors.PRE_NORMS, *gguf_tensors.ATTENTION, *gguf_tensors.MLP
    )


GGUF = Family(architecture="smollm3", read=read_gguf, write=write_gguf, tensor_map=gguf_tensor_map)
