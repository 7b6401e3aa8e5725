"""A list of layers becomes layer groups with the fewest blocks to compile, in the same order."""

import dataclasses

import pytest

from slmjax.models.architecture import BlockConfig, LayerGroup, ModelConfig, stack_of
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.mixers.attention import AttentionConfig

FULL = BlockConfig(mixer=AttentionConfig(num_heads=2), ffn=MlpConfig(hidden_dim=8))
LOCAL = dataclasses.replace(FULL, mixer=AttentionConfig(num_heads=2, window=4))
DENSE = dataclasses.replace(FULL, ffn=MlpConfig(hidden_dim=16))


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ([FULL] * 7, [(1, 7)]),
        (([LOCAL] * 5 + [FULL]) * 4 + [LOCAL] * 2, [(6, 4), (1, 2)]),  # Gemma 3 1B
        ([LOCAL, FULL] * 13, [(2, 13)]),  # Gemma 2
        ([DENSE] + [FULL] * 26, [(1, 1), (1, 26)]),  # DeepSeek-V2-Lite
        ([FULL, LOCAL, DENSE], [(3, 1)]),
    ],
)
def test_stacks_have_the_fewest_blocks(blocks, expected):
    stack = stack_of(blocks)
    assert [(len(group.pattern), group.repeats) for group in stack] == expected
    assert list(ModelConfig(embed_dim=4, stack=stack).blocks()) == blocks


def test_a_stack_needs_a_layer():
    with pytest.raises(ValueError, match="at least one layer"):
        stack_of([])
    assert stack_of([FULL]) == (LayerGroup(pattern=(FULL,)),)
