"""Qwen3-MoE: Qwen3 with experts, except in layers chosen by `decoder_sparse_step` and `mlp_only_layers`."""

from typing import Any

from slmjax.convert.family import Family, Inexpressible, TensorMap, first_block
from slmjax.convert.gguf import settings as gguf_settings
from slmjax.convert.gguf import tensors as gguf_tensors
from slmjax.convert.hf.settings import (
    read_activation,
    read_attention,
    read_biases,
    read_decoder,
    read_mlp,
    write_activation,
    write_attention,
    write_biases,
    write_decoder,
)
from slmjax.convert.hf.tensors import ATTENTION, EMBEDDING, GATED_MLP, MOE, PRE_NORMS
from slmjax.convert.settings import Settings
from slmjax.models.architecture import BlockConfig, ModelConfig
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.ffn.moe import MoeConfig
from slmjax.models.mixers.attention import Biases, QkNorm
from slmjax.models.protocols import FfnConfig

# Defaults of keys that a config.json may leave out.
DEFAULTS = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_experts": 128,
    "norm_topk_prob": False,
    "rope_theta": 10_000.0,
}


def read(settings: Settings) -> ModelConfig:
    """Read a config.json as a `ModelConfig`."""
    biases = read_biases(settings)
    # Unlike in Qwen3, a window applies to all layers.
    window = settings.optional("sliding_window") if settings.take("use_sliding_window") else None
    settings.ignore("sliding_window", "max_window_layers")
    attention = read_attention(settings, qk_norm=QkNorm.PER_HEAD, biases=biases, window=window)
    num_experts = settings.take("num_experts")
    # transformers 5 renamed the key.
    if settings.has("num_local_experts") and not settings.has("num_experts"):
        num_experts = settings.take("num_local_experts")
    settings.expect("num_local_experts", num_experts)
    experts = read_experts(
        settings, num_experts=num_experts, normalize_weights=settings.take("norm_topk_prob")
    )
    return read_decoder(
        settings, [BlockConfig(mixer=attention, ffn=ffn) for ffn in read_sparse_layers(settings, experts)]
    )


def read_experts(settings: Settings, **more: Any) -> MoeConfig:
    """Read experts; `more` are fields of the `MoeConfig` set by the family."""
    return MoeConfig(
        num_selected=settings.take("num_experts_per_tok"),
        hidden_dim=settings.positive("moe_intermediate_size"),
        activation=read_activation(settings),
        **more,
    )


def read_sparse_layers(settings: Settings, experts: MoeConfig) -> list[FfnConfig]:
    """Read the feed-forward layer of each layer: experts, or an MLP in the layers without."""
    dense = read_mlp(settings)
    step = settings.positive("decoder_sparse_step")
    dense_layers = settings.take("mlp_only_layers", [])
    return [
        experts if (layer + 1) % step == 0 and layer not in dense_layers else dense
        for layer in range(settings.take("num_hidden_layers"))
    ]


def write(model: ModelConfig) -> dict[str, Any]:
    """Write a model as the keys of a config.json."""
    attention, _ = first_block(model)
    windows = {"use_sliding_window": attention.window is not None, "sliding_window": attention.window}
    biases = write_biases(attention)
    return {
        "model_type": "qwen3_moe",
        **write_decoder(model),
        **write_attention(attention),
        **write_sparse_layers(model),
        **windows,
        **biases,
    }


def write_sparse_layers(model: ModelConfig) -> dict[str, Any]:
    """Write the keys of experts and of the layers without. Raises Inexpressible if no layer has experts."""
    layers = [block.ffn for block in model.blocks()]
    moe = next((ffn for ffn in layers if isinstance(ffn, MoeConfig)), None)
    if moe is None:
        raise Inexpressible("no layer has experts")
    mlp = next((ffn for ffn in layers if isinstance(ffn, MlpConfig)), None)
    return {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_selected,
        "moe_intermediate_size": moe.hidden_dim,
        "norm_topk_prob": moe.normalize_weights,
        "hidden_act": write_activation(moe.activation),
        # Any choice of dense layers can be listed in mlp_only_layers.
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer, ffn in enumerate(layers) if isinstance(ffn, MlpConfig)],
        "intermediate_size": moe.hidden_dim if mlp is None else mlp.hidden_dim,
    }


HF = Family(
    architecture="Qwen3MoeForCausalLM",
    read=read,
    write=write,
    defaults=DEFAULTS,
    tensor_map=TensorMap(around=EMBEDDING, layer=(*PRE_NORMS, *ATTENTION, *MOE, *GATED_MLP)),
)


# GGUF -------------------------------------------------------------------------------------------------------
def read_gguf(settings: Settings) -> ModelConfig:
    """Read GGUF metadata as a `ModelConfig`."""
    # In llama.cpp's code, all layers have experts, and their weights sum to one.
    settings.ignore("expert_weights_norm")
    attention = gguf_settings.read_attention(settings, qk_norm=QkNorm.PER_HEAD)
    block = BlockConfig(mixer=attention, ffn=gguf_settings.read_moe(settings))
    return gguf_settings.read_decoder(settings, [block] * settings.take("block_count"))


def write_gguf(model: ModelConfig) -> dict[str, Any]:
    """Write a model as GGUF metadata."""
    attention, ffn = first_block(model)
    gguf_settings.check_biases(attention, Biases.NONE)
    gguf_settings.check_plain_scale(attention)
    return {
        **gguf_settings.write_decoder(model),
        **gguf_settings.write_attention(attention),
        **gguf_settings.write_moe(ffn),
    }


GGUF = Family(
    architecture="qwen3moe",
    read=read_gguf,
    write=write_gguf,
    tensor_map=gguf_tensors.tensor_map(*gguf_tensors.PRE_NORMS, *gguf_tensors.ATTENTION, *gguf_tensors.MOE),
)
