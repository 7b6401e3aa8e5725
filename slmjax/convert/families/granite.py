"""Granite 3: a Llama with multipliers on embeddings, scores, residual updates and logits."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from slmjax.convert.family import Family, Inexpressible, TensorMap, first_block
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
from slmjax.convert.hf.tensors import ATTENTION, EMBEDDING, GATED_MLP, PRE_NORMS
from slmjax.convert.settings import Settings
from slmjax.models.architecture import BlockConfig, ModelConfig
from slmjax.models.mixers.attention import AttentionConfig
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
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "rope_theta": 10_000.0,
}


def read(settings: Settings) -> ModelConfig:
    """Read a config.json as a `ModelConfig`."""
    ffn = read_mlp(settings, bias=settings.take("mlp_bias"))
    block = BlockConfig(mixer=read_attention_with_scale(settings), ffn=ffn)
    return read_scaled_decoder(settings, [block] * settings.take("num_hidden_layers"))


def read_attention_with_scale(settings: Settings, **more: Any) -> AttentionConfig:
    """Read attention, whose scale is a multiplier; `more` are fields of the `AttentionConfig`."""
    biases = read_biases(settings)
    return read_attention(settings, scale=float(settings.take("attention_multiplier")), biases=biases, **more)


def read_scaled_decoder(settings: Settings, blocks: Sequence[BlockConfig]) -> ModelConfig:
    """Read the model around its layers, with the multipliers."""
    return read_decoder(
        settings,
        blocks,
        # The library divides the logits, we multiply them.
        logit_multiplier=1.0 / settings.nonzero("logits_scaling"),
        embed_multiplier=float(settings.take("embedding_multiplier")),
        residual_multiplier=float(settings.take("residual_multiplier")),
    )


def write(model: ModelConfig) -> dict[str, Any]:
    """Write a model as the keys of a config.json."""
    attention, ffn = first_block(model)
    return {
        "model_type": "granite",
        **write_scaled_decoder(model),
        **write_attention_with_scale(attention),
        **write_mlp(ffn),
        # A config without this field is no MLP: `write_mlp` has refused it.
        "mlp_bias": getattr(ffn, "bias", False),
    }


def write_attention_with_scale(attention: AttentionConfig) -> dict[str, Any]:
    """Write the keys of `read_attention_with_scale`."""
    return {
        **write_attention(attention),
        **write_biases(attention),
        "attention_multiplier": attention.scale,
    }


def write_scaled_decoder(model: ModelConfig) -> dict[str, Any]:
    """Write the keys of `read_scaled_decoder`."""
    return {
        **write_decoder(model),
        "embedding_multiplier": model.embed_multiplier,
        "residual_multiplier": model.residual_multiplier,
        "logits_scaling": divisor_of(model),
    }


def divisor_of(model: ModelConfig) -> float:
    """Return the divisor of the logits. Raises Inexpressible if there is none."""
    if model.logit_multiplier == 0.0:
        raise Inexpressible("logits are divided by a number, but logit_multiplier is 0")
    # 12 digits restore what was written in the file.
    return float(f"{1 / model.logit_multiplier:.12g}")


HF = Family(
    architecture="GraniteForCausalLM",
    read=read,
    write=write,
    defaults=DEFAULTS,
    tensor_map=TensorMap(around=EMBEDDING, layer=(*PRE_NORMS, *ATTENTION, *GATED_MLP)),
)


# GGUF -------------------------------------------------------------------------------------------------------
def read_gguf(settings: Settings) -> ModelConfig:
    """Read GGUF metadata as a `ModelConfig`."""
    block = BlockConfig(mixer=read_gguf_attention(settings), ffn=gguf_settings.read_mlp(settings))
    return read_gguf_decoder(settings, [block] * settings.take("block_count"))


def read_gguf_attention(settings: Settings, **more: Any) -> AttentionConfig:
    """Read attention with its scale; `more` are arguments of `read_attention`."""
    # llama.cpp takes a multiplier of 0 as absent.
    scale = gguf_settings.shortest(settings.take("attention.scale", 0.0)) or None
    attention = gguf_settings.read_attention(settings, scale=scale, **more)
    # In this architecture, this key means that there are no positions.
    if not settings.take("rope.scaling.finetuned", True):
        attention = dataclasses.replace(attention, rope_base=None)
    return attention


def read_gguf_decoder(settings: Settings, blocks: Sequence[BlockConfig]) -> ModelConfig:
    """Read the model around its layers, with the multipliers."""
    return gguf_settings.read_decoder(
        settings,
        blocks,
        logit_multiplier=1.0 / gguf_settings.shortest(settings.nonzero("logit_scale")),
        embed_multiplier=gguf_settings.shortest(settings.take("embedding_scale", 0.0)) or 1.0,
        residual_multiplier=gguf_settings.shortest(settings.take("residual_scale", 0.0)) or 1.0,
    )


def write_gguf(model: ModelConfig) -> dict[str, Any]:
    """Write a model as GGUF metadata, also a dense Granite 4, which computes the same."""
    attention, ffn = first_block(model)
    # llama.cpp looks for tensors of divisors in this architecture, so that all scalings can be written.
    heads = gguf_settings.write_attention(attention, scalings=(RopeScaling,))
    return {
        **gguf_settings.write_decoder(model),
        **heads,
        **gguf_settings.write_mlp(ffn, has_bias=True),
        **write_gguf_multipliers(model, attention),
    }


def write_gguf_multipliers(model: ModelConfig, attention: AttentionConfig) -> dict[str, Any]:
    """Write the keys of multipliers, and of the absence of positions.

    Raises:
      Inexpressible: a multiplier is 0.
    """
    multipliers = {
        "attention.scale": attention.scale,
        "embedding_scale": model.embed_multiplier,
        "residual_scale": model.residual_multiplier,
        "logit_scale": divisor_of(model),
    }
    # Compared as float32, in which a tiny multiplier is 0.
    for name, multiplier in multipliers.items():
        if np.float32(multiplier) == 0.0:
            raise Inexpressible(f"llama.cpp takes a multiplier of 0 as absent, but {name} is {multiplier}")
    if attention.rope_base is None:
        multipliers["rope.scaling.finetuned"] = False
    return multipliers


def gguf_tensor_map(model: ModelConfig) -> TensorMap:
    """Return the tensor map of a model, which depends on its number of heads."""
    return gguf_tensors.paired_tensor_map(
        model, *gguf_tensors.PRE_NORMS, *gguf_tensors.ATTENTION, *gguf_tensors.MLP
    )


GGUF = Family(architecture="granite", read=read_gguf, write=write_gguf, tensor_map=gguf_tensor_map)
