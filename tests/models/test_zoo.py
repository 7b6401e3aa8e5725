"""Sizes and costs of architectures, worked out by hand."""

import dataclasses

import pytest

from slmjax.models import zoo
from slmjax.models.architecture import BlockConfig, HeadKind, LayerGroup, ModelConfig
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.ffn.moe import MoeConfig
from slmjax.models.layers import NormKind
from slmjax.models.mixers.attention import AttentionConfig, QkNorm
from slmjax.models.zoo import ARCHITECTURES, LengthCosts, Summary, describe


def test_sizes_of_our_architectures() -> None:
    nano, moe, window = (describe(ARCHITECTURES[name]()) for name in ("nano", "nano_moe", "nano_window"))
    # 2048 x 256; four layers of 2 x 256 x 256 + 2 x 256 x 128 attention, 3 x 256 x 640 MLP, 2 x 256 + 2 x 64
    # norms; a final norm.
    layer = 2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 640 + 2 * 256 + 2 * 64
    assert nano.parameters == 2048 * 256 + 4 * layer + 256 == 3_279_616
    assert window == dataclasses.replace(
        nano,
        training_flops_per_token=window.training_flops_per_token,
        inference_flops_per_token=window.inference_flops_per_token,
        cache_bytes_per_token=window.cache_bytes_per_token,
        by_length=window.by_length,
    )
    assert window.cache_bytes_per_token == nano.cache_bytes_per_token * (1 + 3 * 64 / 256) / 4
    # Two of eight experts are as wide as nano's layer; a token uses only the router in addition.
    assert moe.active_parameters == nano.parameters + 4 * 256 * 8
    assert moe.parameters == moe.active_parameters + 4 * 6 * 3 * 256 * 320
    gpt2 = describe(zoo.slm_124m())
    assert gpt2.embedding_parameters == 50_304 * 768
    assert 123e6 < gpt2.parameters < 124.5e6


def test_costs_by_hand() -> None:
    """Width 8; a full layer that loops twice and a window layer with 4 experts, 1 selected; two repeats."""
    full = BlockConfig(
        mixer=AttentionConfig(num_heads=2, num_kv_heads=1, qk_norm=QkNorm.PER_HEAD),
        ffn=MlpConfig(hidden_dim=6),
        num_loops=2,
    )
    experts = MoeConfig(
        num_experts=4, num_selected=1, normalize_weights=False, hidden_dim=5, shared_hidden_dim=3
    )
    window = BlockConfig(mixer=AttentionConfig(num_heads=1, head_dim=6, window=2), ffn=experts)
    config = ModelConfig(
        embed_dim=8,
        stack=(LayerGroup(pattern=(full, window), repeats=2),),
        context_length=4,
        vocab_size=10,
        vocab_multiple=8,
        head=HeadKind.UNTIED,
    )
    tables = 2 * 16 * 8
    full_matrices = 2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 6  # query, output; key, value; gate, up, down
    window_matrices = 4 * 8 * 6 + 8 * 4 + 3 * 8 * 3  # attention; router; shared expert
    one_expert = 3 * 8 * 5
    # final; per repeat two for each layer, and for queries and keys of the first
    norms = 8 + 2 * (2 * 8 + 2 * 4 + 2 * 8)
    multiplied = 16 * 8 + 2 * (2 * full_matrices + window_matrices + one_expert)
    # Over four tokens a full layer sees 2.5 on average and a window of two 1.75; two products of 2 FLOPs per
    # head and dim.
    mixing = 2 * (2 * 4 * 2.5 * 2 * 4 + 4 * 1.75 * 1 * 6)
    shorter = 2 * (2 * 4 * 1.5 * 2 * 4 + 4 * 1.5 * 1 * 6)  # over two tokens both see 1.5
    assert describe(config, lengths=(2,)) == Summary(
        parameters=tables + 2 * (full_matrices + window_matrices + 4 * one_expert) + norms,
        active_parameters=tables + 2 * (full_matrices + window_matrices + one_expert) + norms,
        embedding_parameters=tables,
        per_layer_parameters=0,
        training_flops_per_token=6 * multiplied + 3 * mixing,
        inference_flops_per_token=2 * multiplied + mixing,
        bytes_bf16=2 * (tables + 2 * (full_matrices + window_matrices + 4 * one_expert) + norms),
        resident_bytes_bf16=2 * (tables + 2 * (full_matrices + window_matrices + 4 * one_expert) + norms),
        # Keys and values; slots, heads, dims, bytes.
        cache_bytes_per_token=2 * (2 * 2 * 4 * 1 * 4 * 2 + 2 * 2 * 1 * 6 * 2) / 4,
        by_length=(
            LengthCosts(
                length=2,
                training_flops_per_token=6 * multiplied + 3 * shorter,
                state_bytes=2 * (2 * 2 * 2 * 1 * 4 * 2 + 2 * 2 * 1 * 6 * 2),
            ),
        ),
    )


def test_a_tied_head_costs_flops_and_no_parameters() -> None:
    config = ARCHITECTURES["nano"]()
    tied = describe(config)
    untied = describe(dataclasses.replace(config, head=HeadKind.UNTIED))
    assert untied.parameters == tied.parameters + 2048 * 256
    assert untied.training_flops_per_token == tied.training_flops_per_token


def test_costs_need_a_vocabulary_size() -> None:
    assert zoo.nano().vocab_size is None
    with pytest.raises(ValueError, match="vocab_size is not set"):
        describe(zoo.nano())


def test_biases_of_experts_and_learned_positions_are_not_multiplied() -> None:
    """One layer of width 8; two experts of width 5, both selected; a table of 4 positions; all biases."""
    experts = MoeConfig(num_experts=2, num_selected=2, hidden_dim=5, bias=True)
    block = BlockConfig(mixer=AttentionConfig(num_heads=1, rope_base=None, sinks=True), ffn=experts)
    config = ModelConfig(
        embed_dim=8,
        stack=(LayerGroup(pattern=(block,)),),
        context_length=4,
        vocab_size=10,
        learned_positions=4,
        norm_kind=NormKind.LAYER,
    )
    matrices = 4 * 8 * 8 + 8 * 2 + 2 * 3 * 8 * 5
    # sink; biases of router and experts; scales and biases of norms
    vectors = 1 + 2 + 2 * (5 + 5 + 8) + 3 * 2 * 8
    costs = describe(config)
    assert costs.parameters == 10 * 8 + 4 * 8 + matrices + vectors and costs.embedding_parameters == 10 * 8
    assert costs.training_flops_per_token == 6 * (10 * 8 + matrices) + 3 * 4 * 2.5 * 8


def test_each_name_is_that_of_its_function() -> None:
    for name, build in ARCHITECTURES.items():
        assert getattr(build, "func", build) is getattr(zoo, name)
