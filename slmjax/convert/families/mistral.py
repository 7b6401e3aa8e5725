"""Mistral: a Llama whose layers may all have a window."""

from typing import Any

from slmjax.convert.family import Family, TensorMap, first_block
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

# Defaults of keys that a config.json may leave out.
DEFAULTS = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "sliding_window": 4096,
    "rope_theta": 10_000.0,
}


def read(settings: Settings) -> ModelConfig:
    """Read a config.json as a `ModelConfig`."""
    block = BlockConfig(
        # A null window, as from Mistral 0.2 on, means full attention.
        mixer=read_attention(settings, window=settings.optional("sliding_window")),
        ffn=read_mlp(settings),
    )
    return read_decoder(settings, [block] * settings.take("num_hidden_layers"))


def write(model: ModelConfig) -> dict[str, Any]:
    """Write a model as the keys of a config.json."""
    attention, ffn = first_block(model)
    keys = {**write_decoder(model), **write_attention(attention), **write_mlp(ffn)}
    return {"model_type": "mistral", **keys, "sliding_window": attention.window}


HF = Family(
    architecture="MistralForCausalLM",
    read=read,
    write=write,
    defaults=DEFAULTS,
    tensor_map=TensorMap(around=EMBEDDING, layer=(*PRE_NORMS, *ATTENTION, *GATED_MLP)),
)
