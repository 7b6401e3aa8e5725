"""Differential attention: values worked out elsewhere, and its dims in a stack of layers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slmjax import kernels
from slmjax.models.layers import ModelDims
from slmjax.models.mixers.differential import (
    DifferentialAttentionConfig,
    differential_attention,
    lambda_of,
)
from slmjax.models.protocols import MixerContext
from tests.models.mixers.test_attention import KEYS, QUERIES, VALUES

DIMS = ModelDims(embed_dim=8, num_layers=2, norm_eps=1e-5, init_std=0.5, dtype=jnp.float32)
VECTORS = np.array([[0.1, -0.2], [0.3, 0.2], [-0.1, 0.4], [0.2, 0.1]], np.float32)


def test_lambda_by_hand():
    assert float(lambda_of(jnp.asarray(VECTORS), 0.2)) == pytest.approx(0.1698485, abs=2e-7)


@pytest.mark.parametrize(
    ("segments", "rows", "expected"),
    [
        (
            [1, 1, 1, 2, 2],
            slice(None),
            [
                [1.0119171, 0.5059586],
                [0.2522495, 1.102881],
                [0.4929595, 1.0183079],
                [-1.1188498, 0.1678275],
                [-1.1305292, 0.0434167],
            ],
        ),
        ([1] * 5, slice(3, None), [[1.0284468, 0.4709165], [-1.0052485, 0.5189737]]),
    ],
    ids=["two documents", "one document"],
)
def test_one_head_in_layer_0_has_known_values(segments, rows, expected):
    """The queries of the second map have reversed dims; its keys too, and are half as long.

    A value has as many dims as a query here, so that only the function takes them, not the module.
    """
    queries = np.stack([QUERIES, QUERIES[:, ::-1]], axis=1)[None, :, None]
    keys = np.stack([KEYS, KEYS[:, ::-1] / 2], axis=1)[None, :, None]
    segment_ids = jnp.array([segments])
    positions = jnp.arange(5)[None]
    head = differential_attention(
        jnp.asarray(queries),
        jnp.asarray(keys),
        jnp.asarray(VALUES[None, :, None]),
        weight=lambda_of(jnp.asarray(VECTORS), 0.2),
        attend=functools.partial(
            kernels.reference_attention,
            q_segments=segment_ids,
            k_segments=segment_ids,
            q_positions=positions,
            k_positions=positions,
            window=None,
            scale=2**-0.5,
        ),
    )
    normed = np.asarray(head[0, :, 0])
    normed = 0.8 * normed / np.sqrt(np.mean(normed**2, axis=-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(normed[rows], expected, atol=2e-6)


def test_the_module_equals_numpy():
    """Two heads of two maps on one key-value head, without positions, in the layer of index 2."""
    config = DifferentialAttentionConfig(num_heads=2, num_kv_heads=1, rope_base=None)
    mixer = config.build(DIMS, rngs=nnx.Rngs(params=0))
    x = np.random.default_rng(0).normal(size=(1, 6, 8)).astype(np.float32)
    constants = config.layer_constants(DIMS, index=2, num_layers=3)
    lambda_init = 0.8 - 0.6 * np.exp(-0.6)
    assert constants == {"lambda_init": pytest.approx(lambda_init)}
    mixer.head_norm.scale[...] = jnp.arange(1.0, 5.0)
    y, _ = mixer(
        jnp.asarray(x),
        segment_ids=jnp.ones((1, 6), jnp.int32),
        positions=jnp.arange(6)[None],
        state=None,
        context=MixerContext(constants={"lambda_init": jnp.float32(constants["lambda_init"])}),
    )
    q, k, v = ((x[0] @ np.asarray(linear.weight[...])) for linear in (mixer.query, mixer.key, mixer.value))
    vectors = [
        np.asarray(vector[...])
        for vector in (mixer.lambda_query1, mixer.lambda_key1, mixer.lambda_query2, mixer.lambda_key2)
    ]
    weight = np.exp(vectors[0] @ vectors[1]) - np.exp(vectors[2] @ vectors[3]) + lambda_init
    heads = []
    for head in range(2):
        maps = []
        for index in range(2):
            scores = q.reshape(6, 2, 2, 2)[:, head, index] @ k.reshape(6, 2, 2)[:, index].T / np.sqrt(2)
            powers = np.tril(np.exp(scores))
            maps.append(powers / powers.sum(-1, keepdims=True))
        mixed = (maps[0] - weight * maps[1]) @ v
        mixed = mixed / np.sqrt(np.mean(mixed**2, axis=-1, keepdims=True) + 1e-5) * np.arange(1.0, 5.0)
        heads.append((1 - lambda_init) * mixed)
    expected = np.concatenate(heads, axis=-1) @ np.asarray(mixer.output.weight[...])
    np.testing.assert_allclose(y[0], expected, rtol=1e-4, atol=1e-5)


def test_vectors_of_lambda_begin_small_and_differ():
    mixer = DifferentialAttentionConfig(num_heads=1, head_dim=4096).build(DIMS, rngs=nnx.Rngs(params=0))
    first = np.asarray(mixer.lambda_query1[...])
    assert np.std(first) == pytest.approx(0.1, rel=0.05)
    assert not np.array_equal(first, mixer.lambda_query2[...])


def test_costs_are_those_of_the_arrays():
    config = DifferentialAttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6, window=3)
    cache = jax.eval_shape(lambda: config.build(DIMS, rngs=nnx.Rngs(params=0)).init_state(1, max_length=9))
    assert config.state_size(DIMS, length=9).bytes(4) == 4 * (cache.keys.size + cache.values.size)
    # A token sees 8 / 3 others on average; each of two maps has scores of 6 dims, padded to 12,
    # and a sum of 12.
    full = dataclasses.replace(config, window=None)
    assert full.mixing_flops(DIMS, length=9) == 2 * 4 * 5 * (2 * 12 + 2 * 12)
    assert config.mixing_flops(DIMS, length=9) == pytest.approx(2 * 4 * (24 / 9) * (2 * 12 + 2 * 12))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads=3"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"num_heads": 2, "head_dim": 0}, "head_dim must be at least 1"),
        ({"num_heads": 2, "window": 0}, "window must be at least 1"),
        ({"num_heads": 2, "rope_base": 0.0}, "rope_base must be positive"),
        ({"num_heads": 3}, "twice num_heads=3"),
        ({"num_heads": 2, "head_dim": 3}, "rotated in pairs"),
    ],
)
def test_errors_of_bad_settings_name_what_to_change(settings, message):
    with pytest.raises(ValueError, match=message):
        DifferentialAttentionConfig(**settings).build(DIMS, rngs=nnx.Rngs(params=0))
