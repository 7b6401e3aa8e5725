"""Qwen3-Next: Gated DeltaNet in three of four layers, gated attention in the fourth; experts in all.

Attention rotates a quarter of each head. A shared expert has a gate of its own. Heads of prediction for
further tokens, which releases store too, are not imported.
"""

from collections.abc import Sequence
from typing import Any

from slmjax.convert.families import qwen3_moe
from slmjax.convert.family import (
    Family,
    Inexpressible,
    Rule,
    TensorMap,
    convolution,
    interleaved,
    linear,
    matrix,
    norm,
)
from slmjax.convert.hf import delta_net_settings
from slmjax.convert.hf.delta_net_settings import FULL, LINEAR, read_delta_net, read_layer_kinds
from slmjax.convert.hf.settings import (
    mixer_of_kind,
    read_attention,
    read_biases,
    read_decoder,
    read_rope,
    rotary_factor,
    write_decoder,
)
from slmjax.convert.hf.tensors import ATTENTION, EMBEDDING, GATED_MLP, MOE, PRE_NORMS
from slmjax.convert.settings import Settings
from slmjax.models.architecture import BlockConfig, ModelConfig
from slmjax.models.ffn.moe import MoeConfig
from slmjax.models.layers import NormKind
from slmjax.models.mixers.attention import AttentionConfig, OutputGate, QkNorm
from slmjax.models.mixers.delta_net import GatedDeltaNetConfig
from slmjax.models.protocols import FfnConfig

# Defaults of keys that a config.json may leave out.
HYBRID_DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "num_attention_heads": 16,
    "rope_theta": 10_000.0,
}
# Constants of the library's code.
ROTARY_FACTOR = 0.25
FULL_INTERVAL = 4
DEFAULTS = {
    **HYBRID_DEFAULTS,
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts_per_tok": 10,
    "num_experts": 512,
    "norm_topk_prob": True,
}


def read(settings: Settings) -> ModelConfig:
    """Read a config.json as a `ModelConfig`."""
    settings.expect("use_sliding_window", False)
    experts = read_shared_experts(settings, normalize_weights=settings.take("norm_topk_prob"))
    return read_hybrid(settings, qwen3_moe.read_sparse_layers(settings, experts))


def read_shared_experts(settings: Settings, **more: Any) -> MoeConfig:
    """Read routed experts and the shared one; `more` are fields of the `MoeConfig` set by the family."""
    return qwen3_moe.read_experts(
        settings,
        num_experts=settings.take("num_experts"),
        shared_hidden_dim=settings.positive("shared_expert_intermediate_size"),
        shared_gate=True,
        **more,
    )


def read_hybrid(
    settings: Settings, ffns: Sequence[FfnConfig], *, rope_ignored: Sequence[str] = ()
) -> ModelConfig:
    """Read the model around its feed-forward layers.

    Args:
      rope_ignored: keys of rotary positions that do not affect text.
    """
    attention = read_attention(
        settings,
        qk_norm=QkNorm.PER_HEAD,
        output_gate=OutputGate.PER_ELEMENT,
        biases=read_biases(settings),
        **read_rope(settings, is_partial=True, fraction=ROTARY_FACTOR, ignored=rope_ignored),
    )
    mixers = {LINEAR: read_delta_net(settings), FULL: attention}
    interval = settings.positive("full_attention_interval", FULL_INTERVAL)
    default = [LINEAR if (layer + 1) % interval else FULL for layer in range(len(ffns))]
    kinds = read_layer_kinds(settings, default=default)
    blocks = [BlockConfig(mixer=mixers[kind], ffn=ffn) for kind, ffn in zip(kinds, ffns, strict=True)]
    return read_decoder(settings, blocks, norm_kind=NormKind.CENTERED_RMS)


def write(model: ModelConfig) -> dict[str, Any]:
    """Write a model as the keys of a config.json."""
    experts = qwen3_moe.write_sparse_layers(model)
    return {"model_type": "qwen3_next", **write_hybrid(model), **experts, **write_shared_expert(model)}


def write_shared_expert(model: ModelConfig) -> dict[str, Any]:
    """Write the key of the shared expert. Raises Inexpressible if there is none, or without a gate."""
    moe = next(block.ffn for block in model.blocks() if isinstance(block.ffn, MoeConfig))
    if not moe.shared_gate:
        raise Inexpressible("experts have a shared expert with a gate")
    return {"shared_expert_intermediate_size": moe.shared_hidden_dim}


def write_hybrid(model: ModelConfig) -> dict[str, Any]:
    """Write the keys of `read_hybrid`."""
    attention = mixer_of_kind(model, AttentionConfig)
    keys = {**write_decoder(model), **delta_net_settings.write_layers(model)}
    if attention is not None and attention.rope_base is not None:
        # Written if all dims are rotated too, which is not the library's default.
        keys["partial_rotary_factor"] = rotary_factor(attention.rotary_dim or 0, attention.head_dim or 1)
    return keys


def group_counts(model: ModelConfig) -> tuple[int, int]:
    """Return the query heads of attention, and the heads of queries and keys of Gated DeltaNet.

    1 stands for a kind of layer that the model lacks.
    """
    attention = mixer_of_kind(model, AttentionConfig)
    delta_net = mixer_of_kind(model, GatedDeltaNetConfig)
    return 1 if attention is None else attention.num_heads, 1 if delta_net is None else delta_net.num_heads


def gated_attention_rules(num_heads: int) -> tuple[Rule, ...]:
    """Return the rules of attention whose queries and gates are one tensor, by head."""
    gated_queries = tuple(
        interleaved(
            (f"mixer/query/{kind}", f"mixer/output_gate/{kind}"),
            f"self_attn.q_proj.{kind}",
            num_groups=num_heads,
        )
        for kind in ("weight", "bias")
    )
    return (*gated_queries, *ATTENTION)


def layer_map(attention: tuple[Rule, ...], delta_net: tuple[Rule, ...], **more: Any) -> TensorMap:
    """Return the tensor map of a model of both kinds of layers; `more` are fields of the `TensorMap`.

    Args:
      attention: rules of attention.
      delta_net: rules of the projections of Gated DeltaNet.
    """
    delta_net = (
        *delta_net,
        *delta_net_settings.TENSORS,
        convolution(delta_net_settings.TAPS, "linear_attn.conv1d.weight"),
        *norm("mixer/norm", "linear_attn.norm"),
        *linear("mixer/output", "linear_attn.out_proj"),
    )

    def layer(block: BlockConfig) -> tuple[Rule, ...]:
        mixer = delta_net if isinstance(block.mixer, GatedDeltaNetConfig) else attention
        return (*PRE_NORMS, *mixer, *MOE, *SHARED_EXPERT, *GATED_MLP)

    return TensorMap(**{"around": EMBEDDING, "layer": layer, "ignored": IGNORED, **more})


def tensor_map(model: ModelConfig) -> TensorMap:
    """Return the tensor map of a model, which depends on its numbers of heads."""
    num_heads, num_key_heads = group_counts(model)
    projections = [f"mixer/heads/{name}/weight" for name in ("query", "key", "value")]
    delta_net = (
        # A group has one head of queries and keys, and the heads of values that share it.
        interleaved(
            [*projections, "mixer/gate/weight"], "linear_attn.in_proj_qkvz.weight", num_groups=num_key_heads
        ),
        interleaved(
            ("mixer/heads/strength/weight", "mixer/decay/weight"),
            "linear_attn.in_proj_ba.weight",
            num_groups=num_key_heads,
        ),
    )
    return layer_map(gated_attention_rules(num_heads), delta_net)


# Heads of prediction for further tokens, and rotary frequencies.
IGNORED = (r"mtp\..*", r".*rotary_emb\.inv_freq")
SHARED_EXPERT = (
    *linear("ffn/shared/gate", "mlp.shared_expert.gate_proj"),
    *linear("ffn/shared/up", "mlp.shared_expert.up_proj"),
    *linear("ffn/shared/down", "mlp.shared_expert.down_proj"),
    matrix("ffn/shared_gate/weight", "mlp.shared_expert_gate.weight"),
)
HF = Family(
    architecture="Qwen3NextForCausalLM", read=read, write=write, defaults=DEFAULTS, tensor_map=tensor_map
)
