"""llama.cpp's names of tensors: rules for the tensor maps of families."""

import dataclasses
from collections.abc import Callable

from slmjax.convert.family import (
    Rule,
    TensorMap,
    expect_kind,
    joined,
    linear,
    norm,
    paired,
    same,
    stacked_experts,
)
from slmjax.models.architecture import BlockConfig, ModelConfig
from slmjax.models.mixers.attention import AttentionConfig

AROUND: tuple[Rule, ...] = (
    same("embed/table", "token_embd.weight"),
    *norm("final_norm", "output_norm"),
    same("head/weight", "output.weight"),
)
ATTENTION: tuple[Rule, ...] = (
    *linear("mixer/query", "attn_q"),
    *linear("mixer/key", "attn_k"),
    *linear("mixer/value", "attn_v"),
    *linear("mixer/output", "attn_output"),
    *norm("mixer/query_norm", "attn_q_norm"),
    *norm("mixer/key_norm", "attn_k_norm"),
)
# Families whose own libraries join these projections keep them joined in GGUF.
JOINED_ATTENTION: tuple[Rule, ...] = (
    joined(("mixer/query/weight", "mixer/key/weight", "mixer/value/weight"), "attn_qkv.weight"),
    joined(("mixer/query/bias", "mixer/key/bias", "mixer/value/bias"), "attn_qkv.bias"),
    *linear("mixer/output", "attn_output"),
)
MLP: tuple[Rule, ...] = (
    *linear("ffn/gate", "ffn_gate"),
    *linear("ffn/up", "ffn_up"),
    *linear("ffn/down", "ffn_down"),
)
# llama.cpp has one tensor for all experts, for its grouped matrix product.
MOE: tuple[Rule, ...] = (
    *linear("ffn/router", "ffn_gate_inp"),
    stacked_experts("ffn/experts/gate", "ffn_gate_exps.weight"),
    stacked_experts("ffn/experts/up", "ffn_up_exps.weight"),
    stacked_experts("ffn/experts/down", "ffn_down_exps.weight"),
    same("ffn/experts/gate_bias", "ffn_gate_exps.bias"),
    same("ffn/experts/up_bias", "ffn_up_exps.bias"),
    same("ffn/experts/down_bias", "ffn_down_exps.bias"),
)
PRE_NORMS: tuple[Rule, ...] = (*norm("mixer_norm", "attn_norm"), *norm("ffn_norm", "ffn_norm"))
POST_NORMS: tuple[Rule, ...] = (
    *norm("mixer_post_norm", "post_attention_norm"),
    *norm("ffn_post_norm", "post_ffw_norm"),
)


def tensor_map(
    *layer: Rule,
    around: tuple[Rule, ...] = AROUND,
    rules: Callable[[BlockConfig], tuple[Rule, ...]] | None = None,
) -> TensorMap:
    """Return the tensor map of a family, with the rules of a layer, or a function that returns them."""
    return TensorMap(
        around=around,
        layer=layer if rules is None else rules,
        prefix="blk.{i}.",
        base="",
        # They are settings, read by `gguf_model`.
        ignored=(r"rope_(freqs|factors_long|factors_short)\.weight",),
    )


def paired_tensor_map(model: ModelConfig, *layer: Rule) -> TensorMap:
    """Return the tensor map of a family whose rotated pairs are interleaved in llama.cpp, such as Llama."""
    attention = expect_kind(next(model.blocks()).mixer, AttentionConfig, "layer 0's mixer")
    return tensor_map(*paired_rules(attention, layer))


def paired_rules(attention: AttentionConfig, layer: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Return the rules of a layer, with those of queries and keys for interleaved pairs."""
    heads = {"mixer/query/": attention.num_heads, "mixer/key/": attention.kv_heads}
    # llama.cpp rotates neighbouring dims in these architectures, other libraries dims half a head apart.
    reordered = tuple(
        paired(rule, num_heads=count, rope_dim=attention.head_dim or 0)
        for name, count in heads.items()
        for rule in layer
        if rule.ours[0].startswith(name)
    )
    # Of two rules for a parameter the first is used.
    return (*reordered, *layer)


def centered(rule: Rule) -> Rule:
    """Convert a norm's scale, of which ours is the difference from one."""
    # llama.cpp's converter adds the one, so that its norms are plain ones.
    return dataclasses.replace(
        rule, read=lambda arrays, _: [arrays[0] - 1], write=lambda arrays: [arrays[0] + 1]
    )


def with_centered_norms(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Return the rules with `centered` applied to the scales of all norms."""
    return tuple(centered(rule) if rule.ours[0].endswith("/scale") else rule for rule in rules)
