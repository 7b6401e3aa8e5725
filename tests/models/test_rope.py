"""Rotary positions against angles worked by hand, and scalings against the formulas of the papers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.models import rope
from slmjax.models.rope import (
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    YarnScaling,
    document_lengths,
    sequence_lengths,
)
from slmjax.parallel.mesh import MeshConfig, make_mesh

rotary = jax.jit(rope.rotary, static_argnames=("base", "rotary_dim", "scaling"))


def draw(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_rotary_rotates_pairs_by_known_angles():
    # Base 100 over 4 dims: pair (0, 2) turns by 1 radian per position, pair (1, 3) by a tenth of one.
    x = np.array([1.0, 2.0, 3.0, 4.0], np.float32).reshape(1, 1, 1, 4)
    y = rotary(x, np.array([[2]]), base=100.0)
    cos = [math.cos(2.0), math.cos(0.2)]
    sin = [math.sin(2.0), math.sin(0.2)]
    expected = [
        1 * cos[0] - 3 * sin[0],
        2 * cos[1] - 4 * sin[1],
        3 * cos[0] + 1 * sin[0],
        4 * cos[1] + 2 * sin[1],
    ]
    np.testing.assert_allclose(y.ravel(), expected, rtol=1e-6)


def test_rotary_at_position_zero_is_the_identity():
    x = draw(1, 3, 2, 8)
    np.testing.assert_array_equal(rotary(x, np.zeros((1, 3), np.int32), base=10_000.0), x)


def test_partial_rotary_rotates_only_the_first_dims():
    x = draw(2, 5, 3, 8)
    positions = np.array([range(5), range(5)])
    y = np.asarray(rotary(x, positions, base=50.0, rotary_dim=4))
    np.testing.assert_array_equal(y[..., 4:], x[..., 4:])
    np.testing.assert_allclose(y[..., :4], rotary(x[..., :4], positions, base=50.0), rtol=1e-6)


def test_rotary_products_depend_only_on_distance():
    query, key = draw(2, 1, 1, 1, 16)

    def product(query_position, key_position):
        rotated = (
            np.asarray(rotary(x, np.array([[p]]), base=1e4))
            for x, p in ((query, query_position), (key, key_position))
        )
        return np.sum(next(rotated) * next(rotated))

    np.testing.assert_allclose(product(5, 2), product(105, 102), rtol=1e-4)
    assert abs(product(5, 2) - product(6, 2)) > 1e-3


def test_rotary_angles_are_float32_for_bfloat16_inputs():
    # At position 1000, bfloat16 angles would be off by up to 4 radians.
    x = jnp.ones((1, 1, 1, 2), jnp.bfloat16)
    y = rotary(x, np.array([[1001]]), base=1e4)
    assert y.dtype == jnp.bfloat16
    expected = [math.cos(1001) - math.sin(1001), math.cos(1001) + math.sin(1001)]
    np.testing.assert_allclose(y.astype(jnp.float32).ravel(), expected, rtol=2**-8)


# Scalings ---------------------------------------------------------------------------------------------------
def frequencies(scaling, *, base, num_rotated, length=1):
    """Return the frequency of each pair and the magnitude, measured on unit vectors at position 1."""
    x = jnp.concatenate(
        [jnp.ones((1, 1, 1, num_rotated // 2)), jnp.zeros((1, 1, 1, num_rotated // 2))], axis=-1
    )
    lengths = jnp.full((1, 1), length)
    y = np.asarray(rotary(x, jnp.ones((1, 1), int), base=base, scaling=scaling, lengths=lengths)).ravel()
    cos, sin = np.split(y, 2)
    return np.arctan2(sin, cos), np.hypot(sin, cos)


def test_linear_scaling_divides_all_angles():
    scaled, magnitude = frequencies(LinearScaling(factor=8.0), base=100.0, num_rotated=4, length=2)
    np.testing.assert_allclose(scaled, [1 / 8, 0.1 / 8], rtol=1e-5)
    np.testing.assert_allclose(magnitude, 1.0, rtol=1e-6)


def test_llama3_scaling_divides_low_frequencies_only():
    # In 200 tokens, a wave of frequency f makes 200 f / 2 pi turns: 31.8, 10.1, 3.18, 1.01, 0.32 for base 10
    # ** 2.5 over 10 dims.
    scaling = Llama3Scaling(
        factor=4.0, original_context=200, low_frequency_factor=1.0, high_frequency_factor=4.0
    )
    scaled, _ = frequencies(scaling, base=10**2.5, num_rotated=10, length=2)
    original = 10 ** -np.arange(0, 2.5, 0.5)
    weight = (200 * original / (2 * math.pi) - 1) / 3
    expected = [
        1.0,
        original[1],
        *(original[i] / 4 * (1 - weight[i]) + original[i] * weight[i] for i in (2, 3)),
        original[4] / 4,
    ]
    np.testing.assert_allclose(scaled, expected, rtol=1e-5)


@pytest.mark.parametrize(("whole", "first", "last"), [(True, 1, 4), (False, None, None)])
def test_yarn_scaling_interpolates_linearly_between_dims(whole, first, last):
    scaling = YarnScaling(
        factor=10.0,
        original_context=628,
        fast_turns=32.0,
        slow_turns=1.0,
        whole_dims=whole,
        attention_factor=1.5,
    )
    scaled, magnitude = frequencies(scaling, base=100.0, num_rotated=8, length=2)
    original = 100.0 ** (-np.arange(4) / 4)

    def dim(turns):
        return 8 * math.log(628 / (2 * math.pi * turns)) / (2 * math.log(100))

    first, last = (math.floor(dim(32.0)), math.ceil(dim(1.0))) if whole else (dim(32.0), dim(1.0))
    divided = np.clip((np.arange(4) - first) / (last - first), 0, 1)
    np.testing.assert_allclose(scaled, original / 10 * divided + original * (1 - divided), rtol=1e-5)
    np.testing.assert_allclose(magnitude, 1.5, rtol=1e-6)


def test_long_scaling_depends_on_the_length_of_each_document():
    scaling = LongScaling(
        short_factors=(1.0, 2.0), long_factors=(3.0, 40.0), original_context=4, attention_factor=1.25
    )
    short, magnitude = frequencies(scaling, base=100.0, num_rotated=4, length=4)
    long, _ = frequencies(scaling, base=100.0, num_rotated=4, length=5)
    np.testing.assert_allclose(short, [1.0, 0.05], rtol=1e-5)
    np.testing.assert_allclose(long, [1 / 3, 0.0025], rtol=1e-5)
    np.testing.assert_allclose(magnitude, 1.25, rtol=1e-6)
    # The length of a document includes neither other documents of the row nor padding.
    x = draw(1, 12, 1, 4)
    positions = jnp.array([[0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7, 8]])
    segment_ids = jnp.array([[1] * 3 + [2] * 5 + [0] * 4])
    lengths = sequence_lengths(positions, segment_ids, max_lengths=None, is_decoding=False)
    both = rotary(x, positions, base=100.0, scaling=scaling, lengths=lengths)
    for part, length in ((slice(0, 3), 3), (slice(3, 8), 5)):
        settings = {"base": 100.0, "scaling": scaling, "lengths": np.array([[length]])}
        alone = rotary(x[:, part], positions[:, part], **settings)
        np.testing.assert_array_equal(both[:, part], alone)


def test_long_scaling_needs_a_length():
    scaling = LongScaling(short_factors=(1.0, 2.0), long_factors=(3.0, 40.0), original_context=4)
    row = jnp.zeros((1, 9), int)
    assert sequence_lengths(row, row + 1, max_lengths=None, is_decoding=True) is None
    with pytest.raises(ValueError, match="call the model with max_lengths"):
        rotary(draw(1, 1, 1, 4), np.zeros((1, 1), np.int32), base=1e4, scaling=scaling)


def test_long_scaling_needs_a_divisor_for_each_pair():
    with pytest.raises(ValueError, match="short_factors has 1 values, but 2 pairs of dims"):
        rotary(
            draw(1, 1, 1, 4),
            np.zeros((1, 1), np.int32),
            base=1e4,
            scaling=LongScaling(short_factors=(1.0,), long_factors=(1.0, 1.0), original_context=4),
        )


def test_document_lengths_up_to_the_end_of_the_row():
    positions = jnp.array([[0, 1, 2, 0, 0, 1], [7, 8, 9, 10, 11, 0], [0, 1, 2, 3, 4, 5]])
    segment_ids = jnp.array([[1, 1, 1, 2, 3, 3], [1, 1, 1, 1, 1, 2], [1, 1, 0, 0, 0, 0]])
    expected = [[3, 3, 3, 1, 2, 2], [12, 12, 12, 12, 12, 1], [2, 2, 6, 6, 6, 6]]
    np.testing.assert_array_equal(document_lengths(positions, segment_ids), expected)


def test_document_lengths_of_sharded_rows():
    # Two rows, each on four devices: the documents of the first begin and end on different ones.
    segment_ids = np.array([[1] * 3 + [2] * 9 + [3] * 3 + [0], [1] * 16])
    positions = np.array([[*range(3), *range(9), *range(3), 0], [*range(16)]])
    expected = document_lengths(jnp.asarray(positions), jnp.asarray(segment_ids))
    np.testing.assert_array_equal(expected, [[3] * 3 + [9] * 9 + [3] * 3 + [1], [16] * 16])
    mesh = make_mesh(MeshConfig(data=2, context=4))
    sharding = jax.NamedSharding(mesh, jax.P("data", "context"))
    positions, segment_ids = jax.device_put((positions, segment_ids), sharding)
    lengths = jax.jit(document_lengths, out_shardings=sharding)(positions, segment_ids)
    np.testing.assert_array_equal(lengths, expected)
