"""MiniCPM3: latent attention; multipliers of embeddings, residual updates and logits from depth and width."""

import math
from typing import Any

from slmjax.convert.family import Family, TensorMap, expect_kind
from slmjax.convert.hf.latent_settings import TENSORS, read_latent_attention, write_latent_attention
from slmjax.convert.hf.settings import check_width, read_decoder, read_mlp, write_decoder, write_mlp
from slmjax.convert.hf.tensors import EMBEDDING, GATED_MLP, PRE_NORMS
from slmjax.convert.settings import Settings
from slmjax.models.architecture import BlockConfig, ModelConfig
from slmjax.models.mixers.latent import LatentAttentionConfig

# Defaults of keys that a config.json may leave out.
DEFAULTS = {
    "vocab_size": 73_448,
    "hidden_size": 2560,
    "intermediate_size": 6400,
    "num_hidden_layers": 62,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "hidden_act": "silu",
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "kv_lora_rank": 256,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 256,
    "rope_theta": 10_000.0,
}


def read(settings: Settings) -> ModelConfig:
    """Read a config.json as a `ModelConfig`."""
    num_layers = settings.take("num_hidden_layers")
    block = BlockConfig(
        mixer=read_latent_attention(settings), ffn=read_mlp(settings, bias=settings.take("mlp_bias"))
    )
    width = settings.positive("hidden_size")
    return read_decoder(
        settings,
        [block] * num_layers,
        embed_multiplier=float(settings.take("scale_emb")),
        # scale_depth / sqrt(layers), so that a null is a multiplier of 1; so is a null width below.
        residual_multiplier=settings.take("scale_depth", null=math.sqrt(num_layers)) / math.sqrt(num_layers),
        logit_multiplier=settings.nonzero("dim_model_base", null=width) / width,
    )


def write(model: ModelConfig) -> dict[str, Any]:
    """Write a model as the keys of a config.json."""
    block = next(model.blocks())
    mixer = expect_kind(block.mixer, LatentAttentionConfig, "layer 0's mixer")
    check_width(model, mixer.num_heads)
    # The library divides by width / dim_model_base.
    base = model.logit_multiplier * model.embed_dim
    multipliers = {
        "scale_emb": model.embed_multiplier,
        # 12 digits restore what was written in the file.
        "scale_depth": float(f"{model.residual_multiplier * math.sqrt(model.num_layers):.12g}"),
        # An integer in the library: another multiplier does not read back as the same, and is refused.
        "dim_model_base": round(base),
        "mlp_bias": getattr(block.ffn, "bias", False),
    }
    return {
        "model_type": "minicpm3",
        **write_decoder(model),
        **write_latent_attention(mixer),
        **write_mlp(block.ffn),
        **multipliers,
    }


HF = Family(
    architecture="MiniCPM3ForCausalLM",
    read=read,
    write=write,
    defaults=DEFAULTS,
    tensor_map=TensorMap(around=EMBEDDING, layer=(*PRE_NORMS, *TENSORS, *GATED_MLP)),
)
