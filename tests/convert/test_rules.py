"""Rules for tensors that hold several parameters, by hand."""

import numpy as np

from slmjax.convert.family import Rule, TensorMap, bind, convolution, interleaved, logical_shapes, same
from slmjax.models.architecture import BlockConfig, ModelConfig, stack_of
from slmjax.models.mixers.attention import AttentionConfig
from slmjax.models.mixers.retention import RetentionConfig


def there_and_back(rule: Rule, ours: list[np.ndarray]) -> np.ndarray:
    """Their tensor for these parameters, after a check that it reads back as them."""
    (theirs,) = rule.write(ours)
    for array, back in zip(ours, rule.read([theirs], [array.shape for array in ours]), strict=True):
        np.testing.assert_array_equal(array, back)
    return theirs


def test_groups_of_an_interleaved_tensor() -> None:
    """Two groups: one output of the first parameter, then two of the second, in each."""
    rule = interleaved(("a", "b"), "ab", num_groups=2)
    vectors = [np.array([1, 2]), np.array([10, 11, 20, 21])]
    np.testing.assert_array_equal(there_and_back(rule, vectors), [1, 10, 11, 2, 20, 21])
    matrices = [np.stack([vector, -vector]) for vector in vectors]
    np.testing.assert_array_equal(there_and_back(rule, matrices)[:, 1], [-1, -10, -11, -2, -20, -21])


def test_taps_of_joined_convolutions() -> None:
    """Ours are [taps, channels], theirs [channels, 1, taps]."""
    rule = convolution(("a", "b"), "ab")
    theirs = there_and_back(rule, [np.array([[1], [2], [3]]), np.array([[4, 7], [5, 8], [6, 9]])])
    np.testing.assert_array_equal(theirs, [[[1, 2, 3]], [[4, 5, 6]], [[7, 8, 9]]])


def test_rules_of_a_layer_may_depend_on_its_block() -> None:
    """One name of ours is two names of theirs, by the kind of layer."""
    mixers = (AttentionConfig(num_heads=1), RetentionConfig(num_heads=1))
    blocks = [BlockConfig(mixer=mixer, ffn=None) for mixer in mixers]
    config = ModelConfig(embed_dim=4, vocab_size=3, stack=stack_of(blocks))
    names = [name for name in logical_shapes(config) if not name.startswith("layers/")]
    in_layers = {name.split("/", 2)[2] for name in logical_shapes(config) if name.startswith("layers/")}

    def rules(block: BlockConfig) -> tuple[Rule, ...]:
        kind = "attention" if isinstance(block.mixer, AttentionConfig) else "retention"
        return tuple(same(name, f"{kind}.{name}") for name in in_layers)

    around = tuple(same(name, name) for name in names)
    bound = bind(TensorMap(around=around, layer=rules, prefix="{i}."), config)
    theirs = {rule.ours[0]: rule.theirs[0] for rule in bound}
    assert theirs["layers/0/mixer/output/weight"] == "0.attention.mixer/output/weight"
    assert theirs["layers/1/mixer/output/weight"] == "1.retention.mixer/output/weight"
