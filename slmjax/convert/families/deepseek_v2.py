"""DeepSeek-V2 and V2-Lite: latent attention; after some dense layers, routed experts and a shared expert."""

from typing import Any

from slmjax.convert.family import Family, Inexpressible, TensorMap, expect_kind, linear, paired
from slmjax.convert.hf.latent_settings import TENSORS, read_latent_attention, write_latent_attention
from slmjax.convert.hf.settings import (
    check_width,
    read_activation,
    read_decoder,
    read_mlp,
    write_activation,
    write_decoder,
)
from slmjax.convert.hf.tensors import EMBEDDING, GATED_MLP, MOE, PRE_NORMS
from slmjax.convert.settings import Settings
from slmjax.models.architecture import BlockConfig, ModelConfig
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.ffn.moe import MoeConfig
from slmjax.models.mixers.latent import LatentAttentionConfig

# Defaults of keys that a config.json may leave out.
DEFAULTS = {
    "vocab_size": 102_400,
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
    "first_k_dense_replace": 0,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "routed_scaling_factor": 1.0,
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "v_head_dim": 128,
    "moe_intermediate_size": 1407,
    "rope_theta": 10_000.0,
}


def read(settings: Settings) -> ModelConfig:
    """Read a config.json as a `ModelConfig`."""
    # Variants of the router that our experts do not have.
    for key, value in {
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "moe_layer_freq": 1,
    }.items():
        settings.expect(key, value)
    # Groups of experts only matter to the other routing methods; the rest is about training.
    settings.ignore("n_group", "topk_group", "ep_size", "aux_loss_alpha", "seq_aux")
    settings.expect("mlp_bias", False)
    width = settings.positive("moe_intermediate_size")
    moe = MoeConfig(
        num_experts=settings.take("n_routed_experts"),
        num_selected=settings.take("num_experts_per_tok"),
        hidden_dim=width,
        activation=read_activation(settings),
        normalize_weights=False,
        routed_scale=float(settings.take("routed_scaling_factor")),
        # Several shared experts that are summed are one wider expert.
        shared_hidden_dim=width * settings.take("n_shared_experts"),
    )
    dense = read_mlp(settings)
    mixer = read_latent_attention(settings)
    num_dense = settings.take("first_k_dense_replace")
    blocks = [
        BlockConfig(mixer=mixer, ffn=dense if layer < num_dense else moe)
        for layer in range(settings.take("num_hidden_layers"))
    ]
    return read_decoder(settings, blocks)


def write(model: ModelConfig) -> dict[str, Any]:
    """Write a model as the keys of a config.json."""
    blocks = list(model.blocks())
    mixer = expect_kind(blocks[0].mixer, LatentAttentionConfig, "layer 0's mixer")
    check_width(model, mixer.num_heads)
    moe = next((block.ffn for block in blocks if isinstance(block.ffn, MoeConfig)), None)
    dense = [block.ffn for block in blocks if isinstance(block.ffn, MlpConfig)]
    # config.json has the number of shared experts, not their width.
    if moe is None or moe.shared_hidden_dim % moe.hidden_dim:
        raise Inexpressible("it has routed experts, and a shared expert whose width is a multiple of theirs")
    experts = {
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_selected,
        "moe_intermediate_size": moe.hidden_dim,
        "n_shared_experts": moe.shared_hidden_dim // moe.hidden_dim,
        "routed_scaling_factor": moe.routed_scale,
        "norm_topk_prob": False,
        "topk_method": "greedy",
        # Dense layers elsewhere than at the start are found when the keys are read back.
        "first_k_dense_replace": len(dense),
        "hidden_act": write_activation(moe.activation),
        "intermediate_size": dense[0].hidden_dim if dense else moe.hidden_dim,
    }
    return {"model_type": "deepseek_v2", **write_decoder(model), **write_latent_attention(mixer), **experts}


def tensor_map(model: ModelConfig) -> TensorMap:
    """Return the tensor map of a model, which depends on its number of heads."""
    mixer = expect_kind(next(model.blocks()).mixer, LatentAttentionConfig, "layer 0's mixer")
    # The rotated key is shared by all heads: it counts as one.
    reordered = (
        *(
            paired(rule, num_heads=mixer.num_heads, rope_dim=mixer.rope_dim)
            for name in ("query", "query_up")
            for rule in TENSORS
            if rule.ours[0].startswith(f"mixer/{name}/")
        ),
        *(
            paired(rule, num_heads=1, rope_dim=mixer.rope_dim)
            for rule in TENSORS
            if rule.ours[0].startswith("mixer/latent_down/")
        ),
    )
    shared = (
        *linear("ffn/shared/gate", "mlp.shared_experts.gate_proj"),
        *linear("ffn/shared/up", "mlp.shared_experts.up_proj"),
        *linear("ffn/shared/down", "mlp.shared_experts.down_proj"),
    )
    return TensorMap(around=EMBEDDING, layer=(*PRE_NORMS, *reordered, *TENSORS, *MOE, *shared, *GATED_MLP))


HF = Family(
    architecture="DeepseekV2ForCausalLM", read=read, write=write, defaults=DEFAULTS, tensor_map=tensor_map
)
