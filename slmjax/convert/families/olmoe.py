"""OLMoE: experts whose weights need not sum to one; queries and keys normalized over all heads."""

from typing import Any

from slmjax.convert.family import Family, Inexpressible, TensorMap, expect_kind, first_block
from slmjax.convert.hf.settings import (
    read_activation,
    read_attention,
    read_biases,
    read_decoder,
    write_activation,
    write_attention,
    write_biases,
    write_decoder,
)
from slmjax.convert.hf.tensors import ATTENTION, EMBEDDING, MOE, PRE_NORMS
from slmjax.convert.settings import Settings
from slmjax.models.architecture import BlockConfig, ModelConfig
from slmjax.models.ffn.moe import MoeConfig
from slmjax.models.mixers.attention import QkNorm

# Defaults of keys that a config.json may leave out.
DEFAULTS = {
    "vocab_size": 50_304,
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "num_experts_per_tok": 8,
    "num_experts": 64,
    "norm_topk_prob": False,
    "rope_theta": 10_000.0,
}


def read(settings: Settings) -> ModelConfig:
    """Read a config.json as a `ModelConfig`."""
    settings.expect("clip_qkv")  # must be null: our layers do not clip queries, keys and values
    biases = read_biases(settings)
    attention = read_attention(settings, qk_norm=QkNorm.ALL_HEADS, biases=biases)
    moe = MoeConfig(
        num_experts=settings.take("num_experts"),
        num_selected=settings.take("num_experts_per_tok"),
        hidden_dim=settings.positive("intermediate_size"),
        activation=read_activation(settings),
        normalize_weights=settings.take("norm_topk_prob"),
    )
    blocks = [BlockConfig(mixer=attention, ffn=moe)] * settings.take("num_hidden_layers")
    return read_decoder(settings, blocks)


def write(model: ModelConfig) -> dict[str, Any]:
    """Write a model as the keys of a config.json."""
    attention, ffn = first_block(model)
    heads = attention.num_heads
    head_dim = attention.head_dim or 0
    # The library's norm of queries has the model's width.
    if heads * head_dim != model.embed_dim:
        raise Inexpressible(
            f"its width, {model.embed_dim}, must equal that of its {heads} heads together, {heads * head_dim}"
        )
    moe = expect_kind(ffn, MoeConfig, "a feed-forward layer")
    experts = {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_selected,
        "intermediate_size": moe.hidden_dim,
        "norm_topk_prob": moe.normalize_weights,
        "hidden_act": write_activation(moe.activation),
    }
    biases = write_biases(attention)
    return {"model_type": "olmoe", **write_decoder(model), **write_attention(attention), **experts, **biases}


HF = Family(
    architecture="OlmoeForCausalLM",
    read=read,
    write=write,
    defaults=DEFAULTS,
    tensor_map=TensorMap(around=EMBEDDING, layer=(*PRE_NORMS, *ATTENTION, *MOE)),
)
