"""Convolutions over packed rows equal those of each document alone, in any split, and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax import kernels
from slmjax.parallel.mesh import MeshConfig, make_mesh

# Each row: documents, one of a single token, then padding.
SEGMENTS = np.array([[1] * 5 + [2] + [3] * 9 + [0], [4] * 12 + [5] * 4])


def random_arrays(width: int, *, channels: int = 4, rows: int = 2, length: int = 16):
    rng = np.random.default_rng(width)
    shapes = ((rows, length, channels), (width, channels), (channels,))
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def loop(x, taps, bias, segments):
    """The convolution by its definition, in numpy."""
    x, taps, bias, segments = (np.asarray(array) for array in (x, taps, bias, segments))
    out = np.tile(bias, (*x.shape[:2], 1)).astype(np.float64)
    for row, time, back in np.ndindex(*x.shape[:2], len(taps)):
        if time >= back and segments[row, time] == segments[row, time - back]:
            out[row, time] += taps[len(taps) - 1 - back] * x[row, time - back]
    return out


def test_golden_values():
    """The gated convolution of LFM2, computed by hand: `C * conv(B * x)`."""
    q = np.array([[0.1, -0.3], [0.3, 0.4], [-0.5, 0.6], [0.7, -0.6], [0.9, 1.0]])
    k = np.array([[0.2, 0.1], [-0.4, 0.3], [0.6, -0.5], [0.8, 0.7], [-1.0, 0.9]])
    v = np.array([[1.0, 0.5], [-0.5, 2.0], [1.5, -1.0], [-2.0, 0.3], [0.4, -0.7]])
    taps = jnp.asarray([[0.5, -0.3], [0.2, 0.4], [1.0, 0.7]])
    x = jnp.asarray(q * v, jnp.float32)[None]
    packed, _ = kernels.depthwise_convolution(x, taps, segment_ids=jnp.asarray([[1, 1, 1, 2, 2]]))
    expected = [[0.02, -0.0105], [0.052, 0.15], [-0.438, 0.0275], [-1.12, -0.0882], [-0.08, -0.5058]]
    np.testing.assert_allclose(k * packed[0], expected, atol=1e-7)
    single, _ = kernels.depthwise_convolution(x, taps, segment_ids=jnp.ones((1, 5), int))
    np.testing.assert_allclose((k * single[0])[3:], [[-1.3, -0.4242], [0.295, -0.3438]], atol=1e-7)


@pytest.mark.parametrize("width", [2, 4])
def test_packed_rows_equal_a_loop_over_taps(width):
    x, taps, bias = random_arrays(width)
    y, history = kernels.depthwise_convolution(x, taps, segment_ids=jnp.asarray(SEGMENTS), bias=bias)
    np.testing.assert_allclose(y, loop(x, taps, bias, SEGMENTS), atol=1e-5)
    assert history is None


def test_other_documents_get_no_gradient():
    x, taps, _ = random_arrays(4)

    def first_of_third_document(x):
        return kernels.depthwise_convolution(x, taps, segment_ids=jnp.asarray(SEGMENTS))[0][0, 6].sum()

    gradient = np.array(jax.grad(first_of_third_document)(x))
    np.testing.assert_allclose(gradient[0, 6], taps[-1])
    gradient[0, 6] = 0
    assert not gradient.any()


def test_sums_are_float32_and_the_result_has_the_dtype_of_the_input():
    """In bfloat16 a sum of 256 and 1 would be 256, and so would be the second sum."""
    x = jnp.asarray([[[256.0], [1.0], [-256.0]]], jnp.bfloat16)
    taps = jnp.ones((3, 1))
    y, _ = kernels.depthwise_convolution(x, taps, segment_ids=jnp.ones((1, 3), int))
    assert y.dtype == jnp.bfloat16
    assert y[0, 2, 0] == 1.0


@pytest.mark.parametrize("split", [1, 2, 5])
def test_any_split_and_single_tokens_equal_one_call(split):
    """Prompts of unequal lengths, padded on the right; two calls of several tokens, then one by one."""
    x, taps, bias = random_arrays(4)
    lengths = np.array([16, 11])
    segments = np.where(np.arange(16)[None] < lengths[:, None], 1, 0)
    expected = loop(x, taps, bias, segments)
    history = kernels.empty_history(2, width=4, channels=4, dtype=jnp.float32)
    # The second prompt is shorter: its part of the first call ends in padding, which is not consumed.
    starts = np.zeros(2, int)
    for counts in ([split, max(1, split - 2)], [4, 4], *[[1, 1]] * 16):
        counts = np.minimum(counts, lengths - starts)
        longest = max(counts.max(), 1)
        index = np.minimum(starts[:, None] + np.arange(longest), 15)
        real = np.arange(longest)[None] < counts[:, None]
        tokens = jnp.where(real[..., None], jnp.take_along_axis(x, index[..., None], axis=1), 99.0)
        ids = jnp.asarray(real.astype(np.int32))
        if longest == 1:
            y, history = kernels.convolve_token(
                tokens[:, 0], taps, segment_ids=ids[:, 0], bias=bias, history=history
            )
            y = y[:, None]
        else:
            y, history = kernels.depthwise_convolution(
                tokens, taps, segment_ids=ids, bias=bias, history=history
            )
        for row in range(2):
            wanted = expected[row, starts[row] : starts[row] + counts[row]]
            np.testing.assert_allclose(y[row, : counts[row]], wanted, atol=1e-5)
        starts += counts
    assert (starts == lengths).all()


def test_token_shift_is_the_convolution_with_the_older_tap_alone():
    x, _, _ = random_arrays(2)
    taps = jnp.stack([jnp.ones(4), jnp.zeros(4)])
    history = kernels.ConvolutionHistory(inputs=x[:, :1] + 1, segments=jnp.asarray(SEGMENTS[:, :1]))
    arguments = {"segment_ids": jnp.asarray(SEGMENTS), "history": history}
    shifted = kernels.token_shift(x, **arguments)
    convolved = kernels.depthwise_convolution(x, taps, **arguments)
    jax.tree.map(np.testing.assert_array_equal, shifted, convolved)
    # With the history of the same document, the first token has one before it.
    np.testing.assert_array_equal(shifted[0][:, 0], x[:, 0] + 1)


@pytest.mark.parametrize("length", [16, 4])
def test_sharded_sequences_equal_one_device(length):
    """Also where a shard has fewer tokens than the convolution sees, and with a history before the row."""
    x, taps, bias = random_arrays(4, length=length)
    history = kernels.ConvolutionHistory(
        inputs=x[:, :3] * 2 + 1, segments=jnp.asarray([[0, 1, 1], [4, 4, 4]])
    )
    segments = jnp.asarray(SEGMENTS[:, :length])

    def value_and_gradients(x, taps, bias):
        def total(x, taps, bias):
            y, after = kernels.depthwise_convolution(
                x, taps, segment_ids=segments, bias=bias, history=history
            )
            return jnp.sum(jnp.sin(y)), (y, after)

        return jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(x, taps, bias)

    expected = jax.jit(value_and_gradients)(x, taps, bias)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, context=4, tensor=2))):
        actual = jax.jit(value_and_gradients)(x, taps, bias)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), actual, expected)
