"""Llama 2 and 3, and models with the same architecture: SmolLM2, TinyLlama, MobileLLM."""

import dataclasses
from typing import Any

from slmjax.convert.family import Family, Inexpressible, TensorMap, first_block
from slmjax.convert.gguf import settings as gguf_settings
from slmjax.convert.gguf import tensors as gguf_tensors
from slmjax.convert.hf.settings import (
    check_width,
    read_attention,
    read_biases,
    read_decoder,
    read_mlp,
    write_attention,
    write_biases,
    write_decoder,
    write_mlp,
)
from slmjax.convert.hf.tensors import ATTENTION, EMBEDDING, GATED_MLP, PRE_NORMS
from slmjax.convert.settings import Settings
from slmjax.models.architecture import BlockConfig, HeadKind, ModelConfig
from slmjax.models.ffn.moe import MoeConfig
from slmjax.models.rope import RopeScaling

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
    "mlp_bias": False,
    "rope_theta": 10_000.0,
}


def read(settings: Settings) -> ModelConfig:
    """Read a config.json as a `ModelConfig`."""
    biases = read_biases(settings)
    block = BlockConfig(
        mixer=read_attention(settings, biases=biases), ffn=read_mlp(settings, bias=settings.take("mlp_bias"))
    )
    return read_decoder(settings, [block] * settings.take("num_hidden_layers"))


def write(model: ModelConfig) -> dict[str, Any]:
    """Write a model as the keys of a config.json."""
    attention, ffn = first_block(model)
    # transformers refuses other widths, even if head_dim is given.
    check_width(model, attention.num_heads)
    biases = {**write_biases(attention), "mlp_bias": getattr(ffn, "bias", False)}
    return {
        "model_type": "llama",
        **write_decoder(model),
        **write_attention(attention),
        **write_mlp(ffn),
        **biases,
    }


HF = Family(
    architecture="LlamaForCausalLM",
    read=read,
    write=write,
    defaults=DEFAULTS,
    tensor_map=TensorMap(around=EMBEDDING, layer=(*PRE_NORMS, *ATTENTION, *GATED_MLP)),
)


# MobileLLM --------------------------------------------------------------------------------------------------
def read_mobile(settings: Settings) -> ModelConfig:
    """Read the config.json of a MobileLLM, which has its own architecture name."""
    # MobileLLM-LS runs each layer twice.
    settings.expect("layer_sharing", False)
    settings.expect("use_flash_attn", True, False)
    # The release has its own key for a tied head.
    is_tied = settings.take("share_embedding", True)
    return dataclasses.replace(read(settings), head=HeadKind.TIED if is_tied else HeadKind.UNTIED)


def refuse_mobile(model: ModelConfig) -> dict[str, Any]:
    """Refuse to write a MobileLLM: it is a Llama, which more engines support."""
    raise Inexpressible("it is written as LlamaForCausalLM")


HF_MOBILE = Family(
    architecture="MobileLLMForCausalLM",
    read=read_mobile,
    write=refuse_mobile,
    defaults=DEFAULTS,
    tensor_map=HF.tensor_map,
)


# GGUF -------------------------------------------------------------------------------------------------------
def read_gguf(settings: Settings) -> ModelConfig:
    """Read GGUF metadata as a `ModelConfig`, also of Mistral and Mixtral, which have the same name there."""
    # Mixtral's experts use the key of dense layers for their width.
    has_experts = settings.take("expert_count", 0) > 0
    settings.ignore("expert_used_count")  # 0 in files without experts
    ffn = (
        gguf_settings.read_moe(settings, width="feed_forward_length")
        if has_experts
        else gguf_settings.read_mlp(settings)
    )
    if settings.has("attention.scale"):
        settings.ignore("attention.scale")
        settings.notes.append("attention.scale is left out, as llama.cpp does for this architecture")
    attention = gguf_settings.read_attention(settings)
    return gguf_settings.read_decoder(
        settings, [BlockConfig(mixer=attention, ffn=ffn)] * settings.take("block_count")
    )


def write_gguf(model: ModelConfig) -> dict[str, Any]:
    """Write a model as GGUF metadata."""
    attention, ffn = first_block(model)
    gguf_settings.check_plain_scale(attention)
    # llama.cpp has no key to turn positions off in this architecture.
    if attention.rope_base is None:
        raise Inexpressible("all dims of all heads are rotated")
    sizes = (
        gguf_settings.write_moe(ffn)
        if isinstance(ffn, MoeConfig)
        else gguf_settings.write_mlp(ffn, has_bias=True)
    )
    return {
        **gguf_settings.write_decoder(model),
        **gguf_settings.write_attention(attention, scalings=(RopeScaling,)),
        **sizes,
    }


def gguf_tensor_map(model: ModelConfig) -> TensorMap:
    """Return the tensor map of a model, which depends on its number of heads."""
    rules = (*gguf_tensors.PRE_NORMS, *gguf_tensors.ATTENTION, *gguf_tensors.MLP, *gguf_tensors.MOE)
    return gguf_tensors.paired_tensor_map(model, *rules)


GGUF = Family(architecture="llama", read=read_gguf, write=write_gguf, tensor_map=gguf_tensor_map)
