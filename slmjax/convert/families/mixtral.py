"""Mixtral: a Mistral with a mixture of experts, of which each token uses two."""

from typing import Any

from slmjax.convert.family import Family, TensorMap, expect_kind, experts, first_block, matrix
from slmjax.convert.hf.settings import (
    read_activation,
    read_attention,
    read_decoder,
    write_activation,
    write_attention,
    write_decoder,
)
from slmjax.convert.hf.tensors import ATTENTION, EMBEDDING, PRE_NORMS
from slmjax.convert.settings import Settings
from slmjax.models.architecture import BlockConfig, ModelConfig
from slmjax.models.ffn.moe import MoeConfig

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
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "rope_theta": 1e6,
}


def read(settings: Settings) -> ModelConfig:
    """Read a config.json as a `ModelConfig`."""
    # The library always normalizes the weights of the selected experts, which is our default too.
    ffn = MoeConfig(
        num_experts=settings.take("num_local_experts"),
        num_selected=settings.take("num_experts_per_tok"),
        hidden_dim=settings.take("intermediate_size"),
        activation=read_activation(settings),
    )
    attention = read_attention(settings, window=settings.optional("sliding_window"))
    block = BlockConfig(mixer=attention, ffn=ffn)
    return read_decoder(settings, [block] * settings.take("num_hidden_layers"))


def write(model: ModelConfig) -> dict[str, Any]:
    """Write a model as the keys of a config.json."""
    attention, ffn = first_block(model)
    moe = expect_kind(ffn, MoeConfig, "a feed-forward layer")
    sizes = {
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_selected,
        "intermediate_size": moe.hidden_dim,
        "hidden_act": write_activation(moe.activation),
        "sliding_window": attention.window,
    }
    return {"model_type": "mixtral", **write_decoder(model), **write_attention(attention), **sizes}


EXPERTS = (
    matrix("ffn/router/weight", "block_sparse_moe.gate.weight"),
    # The release's names: w1 is the gate, w3 up, w2 down.
    experts("ffn/experts/gate", "block_sparse_moe.experts.{e}.w1.weight"),
    experts("ffn/experts/up", "block_sparse_moe.experts.{e}.w3.weight"),
    experts("ffn/experts/down", "block_sparse_moe.experts.{e}.w2.weight"),
)
HF = Family(
    architecture="MixtralForCausalLM",
    read=read,
    write=write,
    defaults=DEFAULTS,
    tensor_map=TensorMap(around=EMBEDDING, layer=(*PRE_NORMS, *ATTENTION, *EXPERTS)),
)
