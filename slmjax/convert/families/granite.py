"""Granite 3: a Llama with multipliers on embeddings, scores, residual updates and logits.

Also the dense models of Granite 4, which have no recurrent layers.
"""

import dataclasses
from typing import Any

import numpy as np

from slmjax.config import ConfigError
from slmjax.convert.family import Family, Inexpressible, TensorMap, first_block, joined, linear
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
    block = BlockConfig(mixer=_read_attention(settings), ffn=ffn)
    return _read_decoder(settings, block)


def _read_attention(settings: Settings, **more: Any) -> AttentionConfig:
    biases = read_biases(settings)
    return read_attention(settings, scale=float(settings.take("attention_multiplier")), biases=biases, **more)


def _read_decoder(settings: Settings, block: BlockConfig) -> ModelConfig:
    return read_decoder(
        settings,
        [block] * settings.take("num_hidden_layers"),
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
        **_write_decoder(model, attention),
        **write_mlp(ffn),
        # A config without this field is no MLP: `write_mlp` has refused it.
        "mlp_bias": getattr(ffn, "bias", False),
    }


def _write_decoder(model: ModelConfig, attention: AttentionConfig) -> dict[str, Any]:
    return {
        **write_decoder(model),
        **write_attention(attention),
        **write_biases(attention),
        "embedding_multiplier": model.embed_multiplier,
        "residual_multiplier": model.residual_multiplier,
        "attention_multiplier": attention.scale,
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


# Granite 4 --------------------------------------------------------------------------------------------------
# Defaults of keys that a config.json of Granite 4 may leave out.
HYBRID_DEFAULTS = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "num_local_experts": 8,
    "shared_intermediate_size": 1024,
    "rope_theta": 10_000.0,
}


def read_hybrid(settings: Settings) -> ModelConfig:
    """Read the config.json of a Granite 4 with attention layers only, such as the dense micro."""
    # The feed-forward layer is called the shared expert, also in models without other experts.
    settings.expect("num_local_experts", 0)
    settings.ignore(
        *MAMBA_KEYS,
        "num_experts_per_tok",
        "intermediate_size",
        "normalization_function",
        "init_method",
        "num_experts",
    )
    kinds = set(settings.take("layer_types", ["mamba"]))
    # The library's default is a recurrent layer, so that layer_types must be present.
    if not kinds <= {"attention", "full_attention"}:
        raise ConfigError(
            f"config.json: layer_types has {sorted(kinds)[-1]!r}: only models of Granite 4 with "
            "attention layers are supported"
        )
    # "nope" is the library's default: no positions.
    has_rope = settings.take("position_embedding_type", "nope") == "rope"
    attention = _read_attention(settings, **({} if has_rope else {"rope_base": None}))
    if not has_rope:
        settings.ignore("rope_theta", "rope_scaling", "rope_parameters")
    return _read_decoder(
        settings, BlockConfig(mixer=attention, ffn=read_mlp(settings, width="shared_intermediate_size"))
    )


def write_hybrid(model: ModelConfig) -> dict[str, Any]:
    """Write a model as the config.json of a Granite 4 without recurrent layers."""
    attention, ffn = first_block(model)
    # The library checks the sizes of recurrent layers even if there are none: 2 width over mamba_n_heads.
    if 2 * model.embed_dim % 128:
        raise Inexpressible(f"its width, {model.embed_dim}, must be a multiple of 64")
    kinds = {
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "layer_types": ["attention"] * model.num_layers,
        "position_embedding_type": "nope" if attention.rope_base is None else "rope",
        "mamba_n_heads": 128,
    }
    sizes = write_mlp(ffn, width="shared_intermediate_size")
    # The library has both keys; only the other one is used without experts.
    sizes["intermediate_size"] = sizes["shared_intermediate_size"]
    return {"model_type": "granitemoehybrid", **_write_decoder(model, attention), **sizes, **kinds}


MAMBA_KEYS = (
    "mamba_n_heads",
    "mamba_n_groups",
    "mamba_d_state",
    "mamba_d_head",
    "mamba_d_conv",
    "mamba_expand",
    "mamba_chunk_size",
    "mamba_conv_bias",
    "mamba_proj_bias",
    "time_step_limit",
    "time_step_min",
    "time_step_max",
    "time_step_floor",
)
HYBRID_LAYER = (
    *PRE_NORMS,
    *ATTENTION,
    joined(("ffn/gate/weight", "ffn/up/weight"), "shared_mlp.input_linear.weight"),
    *linear("ffn/down", "shared_mlp.output_linear"),
)
HF_HYBRID = Family(
    architecture="GraniteMoeHybridForCausalLM",
    read=read_hybrid,
    write=write_hybrid,
    defaults=HYBRID_DEFAULTS,
    tensor_map=TensorMap(around=EMBEDDING, layer=HYBRID_LAYER),
)


# GGUF -------------------------------------------------------------------------------------------------------
def read_gguf(settings: Settings) -> ModelConfig:
    """Read GGUF metadata as a `ModelConfig`."""
    # llama.cpp takes a multiplier of 0 as absent.
    scale = gguf_settings.shortest(settings.take("attention.scale", 0.0)) or None
    attention = gguf_settings.read_attention(settings, scale=scale)
    # In this architecture, this key means that there are no positions.
    if not settings.take("rope.scaling.finetuned", True):
        attention = dataclasses.replace(attention, rope_base=None)
    block = BlockConfig(mixer=attention, ffn=gguf_settings.read_mlp(settings))
    return gguf_settings.read_decoder(
        settings,
        [block] * settings.take("block_count"),
        logit_multiplier=1.0 / gguf_settings.shortest(settings.nonzero("logit_scale")),
        embed_multiplier=gguf_settings.shortest(settings.take("embedding_scale", 0.0)) or 1.0,
        residual_multiplier=gguf_settings.shortest(settings.take("residual_scale", 0.0)) or 1.0,
    )


def write_gguf(model: ModelConfig) -> dict[str, Any]:
    """Write a model as GGUF metadata, also a dense Granite 4, which computes the same."""
    attention, ffn = first_block(model)
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
    # llama.cpp looks for tensors of divisors in this architecture, so that all scalings can be written.
    heads = gguf_settings.write_attention(attention, scalings=(RopeScaling,))
    return {
        **gguf_settings.write_decoder(model),
        **heads,
        **gguf_settings.write_mlp(ffn, has_bias=True),
        **multipliers,
    }


def gguf_tensor_map(model: ModelConfig) -> TensorMap:
    """Return the tensor map of a model, which depends on its number of heads."""
    return gguf_tensors.paired_tensor_map(
        model, *gguf_tensors.PRE_NORMS, *gguf_tensors.ATTENTION, *gguf_tensors.MLP
    )


GGUF = Family(architecture="granite", read=read_gguf, write=write_gguf, tensor_map=gguf_tensor_map)
