"""MiniCPM3: latent attention; embeddings, residual updates and logits multiplied by numbers that depend on depth and width."""

import math
from typing import Any

from slmjax.architecture import BlockConfig, ModelConfig
from slmjax.convert.family import Family, Table, expect_kind
from slmjax.convert.hf_settings import check_width, read_decoder, read_mlp, write_decoder, write_mlp
from slmjax.convert.hf_tensors import EMBEDDING, GATED_MLP, PRE_NORMS
from slmjax.convert.latent_settings import TENSORS, read_latent_attention, write_latent_attention
from slmjax.convert.settings import Settings
from slmjax.mixers.latent import LatentAttentionConfig


def read(settings: Settings) -> ModelConfig:
    """config.json -> ModelConfig."""
    num_layers = settings.take("num_hidden_layers")
    settings.add_defaults({"v_head_dim": settings.take("hidden_size") // settings.take("num_attention_heads")})
    block = BlockConfig(mixer=read_latent_attention(settings), ffn=read_mlp(settings, bias=settings.take("mlp_bias", False)))
    return read_decoder(
        settings, [block] * num_layers, tied=True, norm_eps=settings.take("rms_norm_eps", 1e-5),
        embed_multiplier=float(settings.take("scale_emb", 12)),
        residual_multiplier=settings.take("scale_depth", 1.4) / math.sqrt(num_layers),
        logit_multiplier=settings.take("dim_model_base", 256) / settings.take("hidden_size"),
    )  # fmt: skip


def write(model: ModelConfig) -> dict[str, Any]:
    """ModelConfig -> config.json."""
    block = next(model.blocks())
    mixer = expect_kind(block.mixer, LatentAttentionConfig, "layer 0's mixer")
    check_width(model, mixer.num_heads)
    base = model.logit_multiplier * model.embed_dim
    multipliers = {
        "scale_emb": model.embed_multiplier, "scale_depth": float(f"{model.residual_multiplier * math.sqrt(model.num_layers):.12g}"),
        "dim_model_base": round(base), "mlp_bias": getattr(block.ffn, "bias", False),
    }  # fmt: skip
    return {"model_type": "minicpm3", **write_decoder(model), **write_latent_attention(mixer), **write_mlp(block.ffn), **multipliers}


HF = Family(
    architecture="MiniCPM3ForCausalLM", read=read, write=write, table=Table(around=EMBEDDING, layer=(*PRE_NORMS, *TENSORS, *GATED_MLP))
)
