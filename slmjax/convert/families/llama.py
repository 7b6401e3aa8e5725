"""Llama 2 and 3, and what has their shape: SmolLM2, TinyLlama, MobileLLM."""

from typing import Any

from slmjax.architecture import BlockConfig, ModelConfig
from slmjax.attention import Biases
from slmjax.convert.family import Family, Table
from slmjax.convert.hf_settings import (
    check_width,
    first_block,
    read_attention,
    read_decoder,
    read_mlp,
    write_attention,
    write_decoder,
    write_mlp,
)
from slmjax.convert.hf_tensors import ATTENTION, EMBEDDING, GATED_MLP, PRE_NORMS
from slmjax.convert.settings import Settings


def read(settings: Settings) -> ModelConfig:
    """config.json -> ModelConfig."""
    biases = Biases.ALL if settings.take("attention_bias", False) else Biases.NONE
    block = BlockConfig(mixer=read_attention(settings, biases=biases), ffn=read_mlp(settings, bias=settings.take("mlp_bias", False)))
    return read_decoder(settings, [block] * settings.take("num_hidden_layers"))


def write(model: ModelConfig) -> dict[str, Any]:
    """ModelConfig -> config.json."""
    attention, ffn = first_block(model)
    check_width(model, attention)
    biases = {"attention_bias": attention.biases is Biases.ALL, "mlp_bias": getattr(ffn, "bias", False)}
    return {"model_type": "llama", **write_decoder(model), **write_attention(attention), **write_mlp(ffn), **biases}


HF = Family(
    architecture="LlamaForCausalLM", read=read, write=write, table=Table(around=EMBEDDING, layer=(*PRE_NORMS, *ATTENTION, *GATED_MLP))
)
