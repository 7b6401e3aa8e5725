"""Routing by hand; dispatch against a loop over tokens; invariance to batch composition; sharded against one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slmjax import moe, sharding
from slmjax.layers import Shape
from slmjax.moe import Balance, MoeConfig, RouterScore

SHAPE = Shape(embed_dim=8, num_layers=2, norm_eps=1e-6, init_std=0.3, dtype=jnp.float32)
DROPLESS = MoeConfig(num_experts=4, num_selected=2, hidden_dim=6, z_weight=0.5)
CAPACITY = dataclasses.replace(DROPLESS, capacity_factor=0.75)
# What the other two leave out: sigmoid scores, a selection bias, a shared expert, a scale, weights as they are.
DEEPSEEK = MoeConfig(
    num_experts=4,
    num_selected=2,
    hidden_dim=6,
    score=RouterScore.SIGMOID,
    normalize_weights=False,
    routed_scale=2.5,
    shared_hidden_dim=10,
    balance=Balance.BIAS,
)


def inputs(rows: int = 4, length: int = 12):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(rows, length, SHAPE.embed_dim)), jnp.float32)
    # Rows of different numbers of real tokens, one of them empty; padding in the middle is padding too.
    segment_ids = jnp.asarray([[1] * 8 + [2] * 4, [1] * 5 + [0] * 7, [0] * 12, [1] * 3 + [0] + [2] * 8], jnp.int32)
    return x, segment_ids[:rows, :length]


@functools.cache
def built(config: MoeConfig):
    """Graph and state of a layer whose experts are unevenly loaded."""
    layer = config.build(SHAPE, rngs=nnx.Rngs(0))
    layer.router.weight[...] = layer.router.weight[...] + jnp.asarray([0.5, 0.1, 0.0, 0.0])[None]
    if layer.router_bias is not None:
        layer.router_bias[...] = jnp.asarray([0.3, -0.2, 0.1, 0.0])
    return nnx.split(layer)


def loss_and_outputs(graph, state, x, segment_ids):
    y, aux = nnx.merge(graph, state)(x, segment_ids=segment_ids)
    probe = jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
    return jnp.sum(y * probe) + sum(aux.losses.values()), (y, aux)


@functools.cache
def compiled(config: MoeConfig):
    run = jax.value_and_grad(functools.partial(loss_and_outputs, built(config)[0]), argnums=(0, 1), has_aux=True, allow_int=True)
    return jax.jit(run)


def run_layer(config: MoeConfig, x, segment_ids):
    return compiled(config)(built(config)[1], x, segment_ids)


def reference_outputs(layer: moe.Moe, x, segment_ids):
    """The layer as a loop over rows, tokens and experts, with every expert computed for every token."""
    config = layer.config
    act = jax.nn.silu
    gate, up, down = (getattr(layer.experts, name)[...] for name in ("gate", "up", "down"))
    logits = x @ layer.router.weight[...]
    scores = jax.nn.softmax(logits) if config.score is RouterScore.SOFTMAX else jax.nn.sigmoid(logits)
    selection = np.asarray(scores) + (0 if layer.router_bias is None else np.asarray(layer.router_bias[...])[None, None])
    every = jnp.einsum("btef,efd->bted", act(jnp.einsum("btd,edf->btef", x, gate)) * jnp.einsum("btd,edf->btef", x, up), down)
    weights, num_dropped = np.zeros(scores.shape), 0
    choice = np.zeros(scores.shape)
    for row in range(x.shape[0]):
        taken = np.zeros(config.num_experts)
        for t in range(x.shape[1]):
            if segment_ids[row, t] == 0:
                continue
            for expert in np.argsort(-selection[row, t])[: config.num_selected]:
                choice[row, t, expert] = 1
                full = config.capacity_factor is not None and taken[expert] >= config.capacity(x.shape[1])
                num_dropped += full
                weights[row, t, expert] = not full
                taken[expert] += 1
    share = scores / jnp.sum(scores * choice, axis=-1, keepdims=True) if config.normalize_weights else scores
    share = jnp.where(weights > 0, share, 0.0)  # an unused 0 / 0 of padding has no gradient
    y = config.routed_scale * jnp.einsum("bte,bted->btd", share, every)
    if layer.shared is not None:
        shared = layer.shared
        hidden = act(x @ shared.gate.weight[...]) * (x @ shared.up.weight[...])
        y = y + (hidden @ shared.down.weight[...]) * (segment_ids != 0)[:, :, None]
    return y, choice.sum((0, 1)), num_dropped


def assert_trees_close(actual, expected, *, rtol=2e-5, atol=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), actual, expected)


@pytest.mark.parametrize("config", [DROPLESS, CAPACITY, DEEPSEEK], ids=["dropless", "capacity", "deepseek"])
def test_layer_equals_a_dense_loop(config):
    x, segment_ids = inputs()
    graph, state = built(config)
    (_, (y, aux)), gradients = run_layer(config, x, segment_ids)

    def reference(state, x):
        y, counts, dropped = reference_outputs(nnx.merge(graph, state), x, segment_ids)
        return jnp.sum(y * jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)), (y, counts, dropped)

    _, (expected_y, counts, dropped) = reference(state, x)
    np.testing.assert_allclose(y, expected_y, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(aux.metrics["expert_counts"], counts)
    assert aux.metrics["dropped"] == dropped
    assert (dropped > 0) == (config is CAPACITY)
    assert not np.any(np.asarray(y)[np.asarray(segment_ids) == 0])

    # Gradients of the output alone: without the auxiliary losses, which have a test of their own.
    def output_only(state, x):
        y, _ = nnx.merge(graph, state)(x, segment_ids=segment_ids)
        return jnp.sum(y * jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))
