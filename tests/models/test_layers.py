"""Norms, dropout, embeddings and the MLP, against numbers worked by hand and flax's own modules."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slmjax.models import layers
from slmjax.models.ffn.mlp import Activation, MlpConfig, gated
from slmjax.models.layers import CenteredRmsNorm, Embedding, LayerNorm, Linear, ModelDims, NormKind, RmsNorm

DIMS = ModelDims(embed_dim=4, num_layers=8, norm_eps=1e-6, init_std=0.02, dtype=jnp.float32)


def draw(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def silu(x):
    return x / (1 + math.exp(-x))


def normal_cdf(x):
    return (1 + math.erf(x / math.sqrt(2))) / 2


def test_rms_norm_of_three_and_four():
    # The mean square of (3, 4) is 12.5; the scale doubles the first entry.
    y = layers.rms_norm(jnp.array([3.0, 4.0]), jnp.array([2.0, 1.0]), eps=0.0)
    np.testing.assert_allclose(y, [6 / math.sqrt(12.5), 4 / math.sqrt(12.5)], rtol=1e-6)


def test_rms_norm_equals_flax_and_keeps_the_dtype():
    x = jnp.asarray(5 * draw(2, 3, 16))
    theirs = nnx.RMSNorm(16, epsilon=1e-3, rngs=nnx.Rngs(0))
    ours = RmsNorm(16, eps=1e-3)
    ours.scale[...] = theirs.scale[...] = jnp.asarray(draw(16))
    np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-5)
    half = ours(x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    # Computed in float32 from the rounded input: only the result is rounded.
    np.testing.assert_array_equal(half, ours(x.astype(jnp.bfloat16).astype(jnp.float32)).astype(jnp.bfloat16))


def test_layer_norm_of_one_two_and_six():
    # The mean is 3 and the variance (4 + 1 + 9) / 3; scales 1, 2, 3 and a bias of 10.
    y = layers.layer_norm(jnp.array([1.0, 2.0, 6.0]), jnp.array([1.0, 2.0, 3.0]), jnp.full(3, 10.0), eps=0.0)
    np.testing.assert_allclose(y, 10 + np.array([-2.0, -2.0, 9.0]) / math.sqrt(14 / 3), rtol=1e-6)


def test_layer_norm_equals_flax_and_keeps_the_dtype():
    # Far from zero, where a variance computed as mean(x^2) - mean(x)^2 would lose its digits.
    x = jnp.asarray(100 + 5 * draw(2, 3, 16))
    theirs = nnx.LayerNorm(16, epsilon=1e-3, use_fast_variance=False, rngs=nnx.Rngs(0))
    ours = LayerNorm(16, eps=1e-3)
    ours.scale[...] = theirs.scale[...] = jnp.asarray(draw(16))
    ours.bias[...] = theirs.bias[...] = jnp.asarray(draw(16)[::-1])
    np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert ours(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_centered_scale_starts_at_zero_and_adds_one():
    norm = CenteredRmsNorm(4, eps=1e-6)
    plain = RmsNorm(4, eps=1e-6)
    x = jnp.asarray(draw(3, 4))
    assert not np.any(norm.scale[...])
    np.testing.assert_array_equal(norm(x), plain(x))
    norm.scale[...] = jnp.array([0.5, 0.0, -1.0, 2.0])
    plain.scale[...] = jnp.array([1.5, 1.0, 0.0, 3.0])
    np.testing.assert_array_equal(norm(x), plain(x))


@pytest.mark.parametrize(
    ("kind", "names"),
    [(NormKind.RMS, {"scale"}), (NormKind.CENTERED_RMS, {"scale"}), (NormKind.LAYER, {"scale", "bias"})],
)
def test_norms_of_a_model_are_of_its_kind(kind, names):
    norm = dataclasses.replace(DIMS, norm_kind=kind).norm(6)
    assert {path[0] for path, _ in nnx.to_flat_state(nnx.state(norm))} == names
    assert norm.eps == DIMS.norm_eps and norm.scale[...].shape == (6,)


def test_rms_norm_of_zeros_has_a_finite_gradient():
    gradient = jax.grad(lambda x: jnp.sum(layers.rms_norm(x, jnp.ones(4), eps=1e-6)))(jnp.zeros((2, 4)))
    assert np.all(np.isfinite(gradient))


def test_truncated_normal_has_the_stated_spread():
    draws = np.asarray(layers.truncated_normal(jax.random.key(0), (400, 500), 0.02))
    assert np.max(np.abs(draws)) <= 0.06
    np.testing.assert_allclose(np.mean(draws), 0.0, atol=2e-4)
    # A normal cut at three deviations keeps 0.98658 of its own.
    np.testing.assert_allclose(np.std(draws), 0.98658 * 0.02, rtol=5e-3)


def test_outputs_into_the_residual_stream_start_smaller_by_depth():
    np.testing.assert_allclose(DIMS.output_std, 0.02 / 4, rtol=1e-12)
    dims = ModelDims(embed_dim=256, num_layers=8, norm_eps=1e-6, init_std=0.02, dtype=jnp.float32)
    mlp = MlpConfig(hidden_dim=256).build(dims, rngs=nnx.Rngs(params=0))
    for linear, std in ((mlp.gate, 0.02), (mlp.up, 0.02), (mlp.down, 0.005)):
        np.testing.assert_allclose(np.std(np.asarray(linear.weight[...])), 0.98658 * std, rtol=1e-2)


def test_linear_adds_its_bias_and_computes_in_the_input_dtype():
    linear = Linear(2, 2, std=1.0, bias=True, rngs=nnx.Rngs(params=0))
    assert np.all(linear.bias[...] == 0)
    linear.weight[...] = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    linear.bias[...] = jnp.array([10.0, 20.0])
    np.testing.assert_array_equal(linear(jnp.array([[1.0, -1.0]])), [[8.0, 18.0]])
    assert linear(jnp.ones((3, 2), jnp.bfloat16)).dtype == jnp.bfloat16
    assert linear.weight[...].dtype == linear.bias[...].dtype == jnp.float32


@pytest.mark.parametrize(
    ("activation", "gated", "expected"),
    [
        (Activation.SILU, True, 2 * (silu(1.0) * 6) + 2 * (silu(-2.0) * 2)),
        # GELU by its tanh approximation: gelu(1) = 0.841192, gelu(-2) = -0.045402.
        (Activation.GELU, True, 2 * (0.841192 * 6) + 2 * (-0.045402 * 2)),
        (Activation.RELU2, True, 2 * (1.0 * 6) + 0.0),
        # With the error function gelu(x) is x times the normal distribution function.
        (Activation.GELU_EXACT, True, 2 * (normal_cdf(1.0) * 6) + 2 * (-2 * normal_cdf(-2.0) * 2)),
        (Activation.RELU, True, 2 * (1.0 * 6) + 0.0),
        # Both halves are clipped to 7 (neither is above that here), and one is added to the other half.
        (
            Activation.CLAMPED_SILU,
            True,
            2 * (1 / (1 + math.exp(-1.702)) * 7) + 2 * (-2 / (1 + math.exp(2 * 1.702)) * 3),
        ),
        (Activation.SILU, False, 2 * silu(6.0) + 2 * silu(2.0)),
        (Activation.GELU_EXACT, False, 2 * 6 * normal_cdf(6.0) + 2 * 2 * normal_cdf(2.0)),
        (Activation.RELU2, False, 2 * 36.0 + 2 * 4.0),
    ],
)
def test_mlp_by_hand(activation, gated, expected):
    dims = ModelDims(embed_dim=1, num_layers=1, norm_eps=1e-6, init_std=0.02, dtype=jnp.float32)
    mlp = MlpConfig(hidden_dim=2, activation=activation, gated=gated).build(dims, rngs=nnx.Rngs(params=0))
    # On x = 2 the gate gives (1, -2), the other projection (6, 2), and the output is twice the sum.
    mlp.up.weight[...] = jnp.array([[3.0, 1.0]])
    mlp.down.weight[...] = jnp.array([[2.0], [2.0]])
    if gated:
        mlp.gate.weight[...] = jnp.array([[0.5, -1.0]])
    y, aux = mlp(jnp.full((1, 1, 1), 2.0), segment_ids=jnp.ones((1, 1), jnp.int32))
    np.testing.assert_allclose(y.item(), expected, rtol=1e-5)
    assert not aux.losses and not aux.metrics
    assert (mlp.gate is not None) == gated


def test_clamped_halves():
    gate = jnp.array([9.0, 9.0, -9.0])
    up = jnp.array([9.0, -9.0, 1.0])
    seven = 7 / (1 + math.exp(-7 * 1.702))
    expected = [seven * 8, seven * -6, -9 / (1 + math.exp(9 * 1.702)) * 2]  # the gate has no lower bound
    np.testing.assert_allclose(gated(Activation.CLAMPED_SILU, gate, up), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="needs two projections: set ffn.gated"):
        MlpConfig(hidden_dim=2, activation=Activation.CLAMPED_SILU, gated=False)


def test_mlp_biases_and_bad_width():
    mlp = MlpConfig(hidden_dim=3, bias=True).build(DIMS, rngs=nnx.Rngs(params=0))
    assert all(linear.bias is not None for linear in (mlp.gate, mlp.up, mlp.down))
    with pytest.raises(ValueError, match="hidden_dim must be at least 1"):
        MlpConfig(hidden_dim=0)


def test_embedding_gradient_of_a_frequent_token_is_exact_in_bfloat16():
    # A sum kept in bfloat16 stops growing at 256.
    graphdef, params = nnx.split(Embedding(3, 2, std=0.02, rngs=nnx.Rngs(params=0)))

    def total(params):
        rows = nnx.merge(graphdef, params)(jnp.ones((2, 1000), jnp.int32), dtype=jnp.bfloat16)
        assert rows.dtype == jnp.bfloat16
        return jnp.sum(rows.astype(jnp.float32))

    gradient = jax.grad(total)(params)["table"][...]
    np.testing.assert_array_equal(gradient, [[0.0, 0.0], [2000.0, 2000.0], [0.0, 0.0]])


def test_dropout_keeps_the_expectation_at_the_given_rate():
    x = jnp.full((1000, 100), 3.0)
    key = jax.random.key(0)
    y = np.asarray(layers.dropout(x, key, rate=0.2))
    dropped = y == 0
    np.testing.assert_allclose(dropped.mean(), 0.2, atol=0.005)  # four deviations of a mean of 100,000 draws
    np.testing.assert_allclose(y[~dropped], 3.0 / 0.8, rtol=1e-6)
    np.testing.assert_array_equal(y, layers.dropout(x, key, rate=0.2))
    assert np.any(y != layers.dropout(x, jax.random.key(1), rate=0.2))


def test_dropout_without_key_or_rate_changes_nothing():
    x = jnp.asarray(draw(4, 4))
    np.testing.assert_array_equal(layers.dropout(x, None, rate=0.9), x)
    np.testing.assert_array_equal(layers.dropout(x, jax.random.key(0), rate=0.0), x)
