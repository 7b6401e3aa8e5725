"""Qwen3.5: the layers of Qwen3-Next with other names, and MLPs or experts in all of them.

Releases have a vision tower, of which only the language model is imported.
"""

from typing import Any

from slmjax.convert.families import qwen3_moe, qwen3_next
from slmjax.convert.families.qwen3_next import (
    IGNORED,
    gated_attention_rules,
    group_counts,
    layer_map,
    read_hybrid,
    write_hybrid,
)
from slmjax.convert.family import Family, Inexpressible, TensorMap, joined, matrix, norm, same
from slmjax.convert.hf.settings import IGNORED as IGNORED_KEYS
from slmjax.convert.hf.settings import read_mlp, write_mlp
from slmjax.convert.settings import Settings
from slmjax.models.architecture import ModelConfig
from slmjax.models.ffn.mlp import MlpConfig

# Defaults of keys that a config.json may leave out.
DEFAULTS = {
    **qwen3_next.HYBRID_DEFAULTS,
    "vocab_size": 248_320,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 32,
    "num_key_value_heads": 4,
}
MOE_DEFAULTS = {
    **qwen3_next.HYBRID_DEFAULTS,
    "vocab_size": 248_320,
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts_per_tok": 8,
    "num_experts": 256,
}
# Positions in an image have three coordinates, which are equal for text.
IMAGE_ROPE = ("mrope_section", "mrope_interleaved")


# Dense ------------------------------------------------------------------------------------------------------
def read(settings: Settings) -> ModelConfig:
    """Read a config.json as a `ModelConfig`."""
    _take_constants(settings)
    ffns = [read_mlp(settings)] * settings.take("num_hidden_layers")
    return read_hybrid(settings, ffns, rope_ignored=IMAGE_ROPE)


def _take_constants(settings: Settings) -> None:
    """Take keys that releases have and their library does not read."""
    settings.expect("attn_output_gate", True)
    settings.expect("mlp_only_layers", [])
    # The dtype of a state, and heads of prediction for further tokens.
    settings.ignore("mamba_ssm_dtype", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")


def write(model: ModelConfig) -> dict[str, Any]:
    """Write a model as the keys of a config.json."""
    mlp = next((block.ffn for block in model.blocks()), None)
    return {"model_type": "qwen3_5_text", **write_hybrid(model), **write_mlp(mlp)}


def tensor_map(model: ModelConfig, **more: Any) -> TensorMap:
    """Return the tensor map of a model, which depends on its number of heads.

    Args:
      more: fields of the `TensorMap`.
    """
    num_heads, _ = group_counts(model)
    projections = [f"mixer/heads/{name}/weight" for name in ("query", "key", "value")]
    delta_net = (
        joined(projections, "linear_attn.in_proj_qkv.weight"),
        matrix("mixer/gate/weight", "linear_attn.in_proj_z.weight"),
        matrix("mixer/heads/strength/weight", "linear_attn.in_proj_b.weight"),
        matrix("mixer/decay/weight", "linear_attn.in_proj_a.weight"),
    )
    return layer_map(gated_attention_rules(num_heads), delta_net, **more)


HF = Family(
    architecture="Qwen3_5ForCausalLM", read=read, write=write, defaults=DEFAULTS, tensor_map=tensor_map
)


# With experts -----------------------------------------------------------------------------------------------
def read_moe(settings: Settings) -> ModelConfig:
    """Read the config.json of a model with experts as a `ModelConfig`."""
    _take_constants(settings)
    settings.ignore("intermediate_size")  # of MLPs, of which there are none
    experts = qwen3_next.read_shared_experts(settings)
    ffns = [experts] * settings.take("num_hidden_layers")
    return read_hybrid(settings, ffns, rope_ignored=IMAGE_ROPE)


def write_moe(model: ModelConfig) -> dict[str, Any]:
    """Write a model as the config.json of a model with experts."""
    experts = qwen3_moe.write_sparse_layers(model)
    if any(isinstance(block.ffn, MlpConfig) for block in model.blocks()):
        raise Inexpressible("all layers have experts")
    # Keys of families with other layers too; here the weights of experts always sum to one.
    for name in ("mlp_only_layers", "decoder_sparse_step", "intermediate_size", "norm_topk_prob"):
        del experts[name]
    shared = qwen3_next.write_shared_expert(model)
    return {"model_type": "qwen3_5_moe_text", **write_hybrid(model), **experts, **shared}


HF_MOE = Family(
    architecture="Qwen3_5MoeForCausalLM",
    read=read_moe,
    write=write_moe,
    defaults=MOE_DEFAULTS,
    tensor_map=tensor_map,
)


# With a vision tower ----------------------------------------------------------------------------------------
# Keys outside text_config, which do not affect the language model.
VISION_KEYS = (
    "vision_config",
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "language_model_only",
)
AROUND = (
    same("embed/table", "model.language_model.embed_tokens.weight"),
    *norm("final_norm", "model.language_model.norm"),
    same("head/weight", "lm_head.weight"),
)


def with_vision(family: Family, architecture: str) -> Family:
    """Return the family of vision models whose language model belongs to `family`."""

    def read(settings: Settings) -> ModelConfig:
        values = settings.take("text_config", {})
        # The library uses this key, whatever text_config says.
        tied = settings.take("tie_word_embeddings", False)
        inner = settings.nested(
            "text_config", {**values, "tie_word_embeddings": tied}, defaults=family.defaults
        )
        model = family.read(inner)
        inner.finish()
        settings.ignore(*IGNORED_KEYS, *VISION_KEYS)
        return model

    def refuse(model: ModelConfig) -> dict[str, Any]:
        raise Inexpressible("it has a vision tower")

    return Family(
        architecture=architecture,
        read=read,
        write=refuse,
        tensor_map=lambda model: tensor_map(
            model,
            around=AROUND,
            prefix="model.language_model.layers.{i}.",
            ignored=(*IGNORED, r"model\.visual\..*"),
        ),
    )


HF_WITH_VISION = with_vision(HF, "Qwen3_5ForConditionalGeneration")
HF_MOE_WITH_VISION = with_vision(HF_MOE, "Qwen3_5MoeForConditionalGeneration")
