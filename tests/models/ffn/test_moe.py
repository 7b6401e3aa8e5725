"""Routing by hand, dispatch against a loop over tokens, invariance to the batch, and sharding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slmjax.models.ffn import moe
from slmjax.models.ffn.mlp import Activation
from slmjax.models.ffn.moe import Balance, MoeConfig, RouterScore
from slmjax.models.layers import ModelDims
from slmjax.parallel.batches import place_batch
from slmjax.parallel.mesh import MeshConfig, make_mesh
from slmjax.parallel.rules import partition_spec

DIMS = ModelDims(embed_dim=8, num_layers=2, norm_eps=1e-6, init_std=0.3, dtype=jnp.float32)
DROPLESS = MoeConfig(num_experts=4, num_selected=2, hidden_dim=6, z_weight=0.5)
CAPACITY = dataclasses.replace(DROPLESS, capacity_factor=0.75)
# The settings that the other two leave at their defaults: sigmoid scores, a selection bias, a shared expert,
# a scale, and weights that are not normalised.
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
# As in GPT-OSS.
BIASED = dataclasses.replace(DROPLESS, bias=True, activation=Activation.CLAMPED_SILU)
BIASED_CAPACITY = dataclasses.replace(BIASED, capacity_factor=0.75)


LENGTH = 12


def inputs(rows: int = 8):
    """Return rows of different numbers of real tokens, one empty, one with padding in the middle."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(rows, LENGTH, DIMS.embed_dim)), jnp.float32)
    patterns = [[1] * 8 + [2] * 4, [1] * 5 + [0] * 7, [0] * 12, [1] * 3 + [0] + [2] * 8]
    return x, jnp.asarray((patterns * 2)[:rows], jnp.int32)


@functools.cache
def built(config: MoeConfig):
    """Return graph and state of a layer whose experts are unevenly loaded."""
    layer = config.build(DIMS, rngs=nnx.Rngs(0))
    layer.router.weight[...] = layer.router.weight[...] + jnp.asarray([0.4, 0.2, 0.0, 0.0])[None]
    if layer.router_bias is not None:
        layer.router_bias[...] = jnp.asarray([0.3, -0.2, 0.1, 0.0])
    graph, state = nnx.split(layer)
    draw = np.random.default_rng(1)

    def with_bias(path, leaf):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        return (
            jnp.asarray(draw.normal(size=leaf.shape), leaf.dtype)
            if names[-1].endswith("bias") and names[0] != "router_bias"
            else leaf
        )

    return graph, jax.tree_util.tree_map_with_path(with_bias, state)


def probe(y):
    """A scalar that depends on every output in its own way."""
    return jnp.sum(y * jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))


@functools.cache
def compiled(config: MoeConfig):
    def loss(state, x, segment_ids):
        y, aux = nnx.merge(built(config)[0], state)(x, segment_ids=segment_ids)
        return probe(y) + sum(aux.losses.values()), (y, aux)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def run_layer(config: MoeConfig, x, segment_ids):
    """Return the loss, y, aux, and the gradients of the parameters and of `x`."""
    (loss, (y, aux)), gradients = compiled(config)(built(config)[1], x, segment_ids)
    return loss, y, aux, gradients


def assert_trees_close(actual, expected, *, rtol=2e-5, atol=2e-5):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def name_of(config):
    names = {
        "deepseek": config.balance is Balance.BIAS,
        "biased": config.bias,
        "capacity": config.capacity_factor is not None,
    }
    return " ".join(name for name, holds in names.items() if holds) or "dropless"


# Dispatch ---------------------------------------------------------------------------------------------------
def scores_of(layer, x):
    logits = jnp.dot(x, layer.router.weight[...]) + (
        layer.router.bias[...][None, None] if layer.config.bias else 0
    )
    return logits, jax.nn.softmax(logits) if layer.config.score is RouterScore.SOFTMAX else jax.nn.sigmoid(
        logits
    )


def selected_and_computed(layer, x, segment_ids):
    """Return [B, T, E] of 0 and 1, token by token: selected experts, and those that do not drop the token."""
    config = layer.config
    scores = np.asarray(scores_of(layer, x)[1])
    bias = 0.0 if layer.router_bias is None else np.asarray(layer.router_bias[...])
    selected = np.zeros(scores.shape, np.float32)
    computed = np.zeros(scores.shape, np.float32)
    for row, t in np.ndindex(scores.shape[:2]):
        if segment_ids[row, t] != 0:
            best = np.argsort(-(scores[row, t] + bias))[: config.num_selected]
            capacity = np.inf if config.capacity_factor is None else config.capacity(scores.shape[1])
            computed[row, t, best] = selected[row, :t, best].sum(axis=1) < capacity
            selected[row, t, best] = 1
    return selected, computed


def dense_loss(layer, x, segment_ids, selected, computed):
    """Compute the layer with every expert for every token."""
    config = layer.config
    real = (np.asarray(segment_ids) != 0).astype(np.float32)
    gate, up, down = (getattr(layer.experts, name)[...] for name in ("gate", "up", "down"))
    gate_bias, up_bias, down_bias = (
        getattr(layer.experts, f"{name}_bias")[...][None, None] if config.bias else jnp.zeros(())
        for name in ("gate", "up", "down")
    )
    gate, up = (
        jnp.einsum("btd,edf->btef", x, matrix) + bias for matrix, bias in ((gate, gate_bias), (up, up_bias))
    )
    hidden = jax.nn.silu(gate) * up
    if config.activation is Activation.CLAMPED_SILU:  # none of the values is above 7 in magnitude
        hidden = gate / (1 + jnp.exp(-1.702 * gate)) * (up + 1)
    logits, scores = scores_of(layer, x)
    weights = scores * selected
    if config.normalize_weights:
        weights = weights / jnp.where(real[:, :, None] > 0, jnp.sum(weights, axis=-1, keepdims=True), 1.0)
    outputs = jnp.einsum("btef,efd->bted", hidden, down) + down_bias
    y = config.routed_scale * jnp.einsum("bte,bted->btd", weights * computed, outputs)
    if layer.shared is not None:
        hidden = jax.nn.silu(x @ layer.shared.gate.weight[...]) * (x @ layer.shared.up.weight[...])
        y = y + jnp.dot(hidden, layer.shared.down.weight[...]) * real[:, :, None]
    loss = probe(y) + config.z_weight * jnp.sum(real * jnp.log(jnp.sum(jnp.exp(logits), axis=-1)) ** 2)
    if config.balance is Balance.AUX_LOSS:
        count = np.maximum(real.sum(axis=1, keepdims=True), 1.0)
        load = selected.sum(axis=1) / (count * config.num_selected)
        mean_score = jnp.einsum("bte,bt->be", scores, real / count)
        loss += config.balance_weight * config.num_experts * jnp.sum(load * mean_score * count)
    return loss, y


@pytest.mark.parametrize("config", [DROPLESS, CAPACITY, DEEPSEEK, BIASED, BIASED_CAPACITY], ids=name_of)
def test_layer_equals_a_dense_loop(config):
    x, segment_ids = inputs()
    graph, state = built(config)
    selected, computed = selected_and_computed(nnx.merge(graph, state), x, segment_ids)

    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def dense(state, x):
        return dense_loss(nnx.merge(graph, state), x, segment_ids, selected, computed)

    (expected_loss, expected_y), expected_gradients = jax.jit(dense)(state, x)
    loss, y, aux, gradients = run_layer(config, x, segment_ids)
    assert_trees_close((loss, y, gradients), (expected_loss, expected_y, expected_gradients))
    np.testing.assert_array_equal(aux.metrics["expert_counts"], selected.sum(axis=(0, 1)))
    assert aux.metrics["dropped"] == (selected - computed).sum()
    assert (aux.metrics["dropped"] > 0) == (config.capacity_factor is not None)
    assert not np.any(np.asarray(y)[np.asarray(segment_ids) == 0])


@pytest.mark.parametrize("config", [DROPLESS, CAPACITY], ids=["dropless", "capacity"])
def test_a_sequence_does_not_depend_on_the_others(config):
    x, segment_ids = inputs()
    expected = run_layer(config, x, segment_ids)
    first = (jnp.arange(8) < 3)[:, None]
    parts = [run_layer(config, x, jnp.where(rows, segment_ids, 0)) for rows in (first, ~first)]
    summed = jax.tree.map(lambda a, b: a + b, *parts)
    assert_trees_close(summed, expected)


DATA_EXPERT_TENSOR = MeshConfig(data=2, expert=2, tensor=2)
FSDP_EXPERT = MeshConfig(fsdp=2, expert=4, data=1)


@pytest.mark.parametrize(
    ("config", "mesh_config", "rows"),
    [
        (DROPLESS, DATA_EXPERT_TENSOR, 8),
        (DROPLESS, FSDP_EXPERT, 8),
        (DROPLESS, DATA_EXPERT_TENSOR, 3),  # a batch that does not divide is replicated
        (CAPACITY, DATA_EXPERT_TENSOR, 8),
        (CAPACITY, FSDP_EXPERT, 8),
        (BIASED, DATA_EXPERT_TENSOR, 8),
        (BIASED_CAPACITY, DATA_EXPERT_TENSOR, 8),
    ],
)
def test_sharded_equals_one_device(config, mesh_config, rows):
    x, segment_ids = inputs(rows)
    expected = run_layer(config, x, segment_ids)
    mesh = make_mesh(mesh_config)

    def place(keys, leaf):
        path = "layers/0/ffn/" + "/".join(key.key for key in keys if isinstance(key, jax.tree_util.DictKey))
        return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, partition_spec(path, leaf.shape, mesh)))

    with jax.set_mesh(mesh):
        state = jax.tree_util.tree_map_with_path(place, built(config)[1])
        assert len(state.experts.gate[...].sharding.device_set) == 8
        batch = place_batch((np.asarray(x), np.asarray(segment_ids)), mesh)
        (loss, (y, aux)), gradients = compiled(config)(state, *batch)
    assert_trees_close((loss, y, aux, gradients), expected)


def test_capacity_slots_by_hand():
    # Two sequences of three tokens that select one of two experts; 2 is on another device. The capacity is
    # one token per expert and sequence.
    experts = jnp.asarray([[1, 0, 1], [2, 1, 1]])[:, :, None]
    slots = moe.capacity_slots(experts, 2, capacity=1)
    # Expert 0: sequence 0, sequence 1; expert 1: sequence 0, sequence 1.
    np.testing.assert_array_equal(slots.selection, [1, 6, 0, 4])
    np.testing.assert_array_equal(slots.slot[:, 0], [2, 0, 4, 4, 3, 4])


def test_sorted_slots_by_hand():
    slots = moe.sorted_slots(jnp.asarray([[1, 2], [2, 0], [1, 0]]), 2)
    np.testing.assert_array_equal(slots.selection, [3, 5, 0, 4, 6, 6])
    np.testing.assert_array_equal(slots.slot, [[2, 6], [6, 0], [3, 1]])
    np.testing.assert_array_equal(slots.group_sizes, [2, 2])


# Routing ----------------------------------------------------------------------------------------------------
LOGITS = jnp.log(jnp.asarray([[[1.0, 2.0, 3.0, 4.0], [6.0, 1.0, 2.0, 1.0]]]))
REAL = jnp.ones((1, 2), bool)


def test_softmax_routing_by_hand():
    config = dataclasses.replace(DROPLESS, routed_scale=2.0)
    routing = moe.route(LOGITS, REAL, None, config=config)
    np.testing.assert_array_equal(routing.experts, [[[3, 2], [0, 2]]])
    np.testing.assert_allclose(routing.weights, [[[8 / 7, 6 / 7], [12 / 8, 4 / 8]]], rtol=1e-6)
    plain = moe.route(LOGITS, REAL, None, config=dataclasses.replace(DROPLESS, normalize_weights=False))
    np.testing.assert_allclose(plain.weights, [[[0.4, 0.3], [0.6, 0.2]]], rtol=1e-6)


ONE = dataclasses.replace(DROPLESS, num_selected=1)


@pytest.mark.parametrize("score", RouterScore)
def test_one_expert_with_normalized_weights(score):
    """Its weight is exactly 1 and has no gradient, even for tiny scores; auxiliary losses have gradients."""
    config = dataclasses.replace(ONE, score=score, routed_scale=2.5)
    logits = LOGITS - 43.0
    routing = moe.route(logits, REAL, None, config=config)
    np.testing.assert_array_equal(routing.experts, [[[3], [0]]])
    np.testing.assert_array_equal(routing.weights, [[[2.5], [2.5]]])
    loss_gradient = jax.grad(lambda x: jnp.sum(jnp.sin(moe.route(x, REAL, None, config=config).weights)))(
        logits
    )
    balance_gradient = jax.grad(lambda x: moe.balance_loss(moe.route(x, REAL, None, config=config), REAL))(
        LOGITS
    )
    assert not np.any(loss_gradient) and np.abs(balance_gradient).max() > 0.01
    padding = moe.route(logits, jnp.asarray([[False, True]]), None, config=config)
    assert not np.any(padding.weights[0, 0]) and padding.experts[0, 0, 0] == 4


def test_the_router_of_one_expert_learns_only_from_auxiliary_losses():
    """Without them the router's gradient is exactly 0, here with a capacity and sharded experts."""
    quiet = dataclasses.replace(ONE, balance=Balance.NONE, z_weight=0.0, capacity_factor=0.75)
    x, segment_ids = inputs()
    graph, state = built(quiet)
    layer = nnx.merge(graph, state)
    expected_y = dense_loss(layer, x, segment_ids, *selected_and_computed(layer, x, segment_ids))[1]
    mesh = make_mesh(DATA_EXPERT_TENSOR)
    with jax.set_mesh(mesh):
        batch = place_batch((np.asarray(x), np.asarray(segment_ids)), mesh)
        (_, (y, _)), (layer_gradient, x_gradient) = compiled(quiet)(state, *batch)
    assert_trees_close(y, expected_y)
    assert not np.any(layer_gradient.router.weight[...])
    assert np.any(layer_gradient.experts.up[...]) and np.any(x_gradient)
    assert quiet.training_note() is not None and "nothing trains it" in quiet.training_note()
    assert "only ffn.balance_weight=0.01 and ffn.z_weight=0.5 trains it" in str(ONE.training_note())
    assert (
        DROPLESS.training_note() is None
        and dataclasses.replace(ONE, normalize_weights=False).training_note() is None
    )


def test_bias_changes_the_selection_and_not_the_weights():
    routing = moe.route(LOGITS, REAL, jnp.asarray([0.0, 9.0, 0.0, 0.0]), config=DEEPSEEK)
    np.testing.assert_array_equal(routing.experts, [[[1, 3], [1, 0]]])
    # Sigmoid of log(n) is n / (n + 1).
    np.testing.assert_allclose(
        routing.weights, 2.5 * np.asarray([[[2 / 3, 4 / 5], [1 / 2, 6 / 7]]]), rtol=1e-6
    )


def test_padding_has_no_expert():
    routing = moe.route(LOGITS, jnp.asarray([[False, True]]), None, config=DROPLESS)
    assert not np.any(routing.weights[0, 0]) and np.all(routing.experts[0, 0] == 4)
    np.testing.assert_array_equal(moe.row_expert_counts(routing.experts, 4), [[1, 0, 1, 0]])


def test_balance_loss_is_one_per_token_of_an_even_load_and_more_of_an_uneven_one():
    real = jnp.asarray([[True, True], [True, False]])
    experts = jnp.asarray([[[0, 1], [2, 3]], [[0, 1], [4, 4]]])
    even = moe.Routing(weights=jnp.zeros((2, 2, 2)), experts=experts, probabilities=jnp.full((2, 2, 4), 0.25))
    np.testing.assert_allclose(moe.balance_loss(even, real), 3.0, rtol=1e-6)
    # By hand: one expert has half of the selections and all of the probability: 4 * 0.5 * 1 for both tokens.
    peaked = jnp.zeros((1, 2, 4)).at[:, :, 0].set(1.0)
    uneven = moe.Routing(
        weights=jnp.zeros((1, 2, 2)), experts=jnp.asarray([[[0, 1], [0, 3]]]), probabilities=peaked
    )
    np.testing.assert_allclose(moe.balance_loss(uneven, jnp.ones((1, 2), bool)), 4.0, rtol=1e-6)


def test_z_loss_by_hand():
    real = jnp.asarray([[True, False]])
    np.testing.assert_allclose(moe.z_loss(LOGITS, real), np.log(10.0) ** 2, rtol=1e-6)


def test_biases_move_towards_an_even_load():
    counts = jnp.asarray([[3.0, 1.0, 2.0], [0.0, 9.0, 0.0]])
    np.testing.assert_allclose(
        moe.updated_bias(jnp.zeros((2, 3)), counts, 0.1), [[-0.1, 0.1, 0.0], [0.1, -0.1, 0.1]], rtol=1e-6
    )
    np.testing.assert_allclose(moe.updated_bias(jnp.ones(3), counts[0], 0.1), [0.9, 1.1, 1.0], rtol=1e-6)


# Config and module ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_selected": 9}, "between 1 and ffn.num_experts, 8"),
        ({"hidden_dim": 0}, "at least 1"),
        ({"shared_hidden_dim": -1}, "0 for no shared expert"),
        ({"shared_gate": True}, "needs a shared expert: set ffn.shared_hidden_dim"),
        ({"z_weight": -1.0}, "ffn.z_weight must not be negative"),
        ({"capacity_factor": 0.0}, "None drops no tokens"),
    ],
)
def test_errors_of_bad_settings_name_what_to_change(settings, message):
    with pytest.raises(ValueError, match=message):
        MoeConfig(**{"hidden_dim": 4, **settings})


def test_capacity_is_a_rounded_up_fraction_of_the_sequence():
    assert CAPACITY.capacity(12) == 5  # 12 tokens x 2 / 4 experts x 0.75 = 4.5
    assert CAPACITY.capacity(1) == 1
    assert dataclasses.replace(CAPACITY, capacity_factor=100.0).capacity(12) == 12
    assert CAPACITY.active_fraction() == 0.5


def test_parameters_of_the_layer():
    layer = DEEPSEEK.build(DIMS, rngs=nnx.Rngs(0))
    _, params, biases = nnx.split(layer, nnx.Param, moe.RouterBias)
    shapes = {"/".join(path): tuple(leaf[...].shape) for path, leaf in nnx.to_flat_state(params)}
    assert shapes == {
        "router/weight": (8, 4),
        **{f"experts/{name}": (4, 8, 6) for name in ("gate", "up")},
        "experts/down": (4, 6, 8),
        **{f"shared/{name}/weight": (8, 10) for name in ("gate", "up")},
        "shared/down/weight": (10, 8),
    }
    assert [path for path, _ in nnx.to_flat_state(biases)] == [("router_bias",)]
    assert DROPLESS.build(DIMS, rngs=nnx.Rngs(0)).router_bias is None


def test_the_gate_of_a_shared_expert_scales_its_output_alone():
    """With zeros as its weights the gate is a half."""
    x, segment_ids = inputs()
    layer = dataclasses.replace(DEEPSEEK, shared_gate=True).build(DIMS, rngs=nnx.Rngs(0))
    weights = layer.shared_gate.weight[...]
    assert weights.shape == (8, 1)
    graph, state = nnx.split(layer)

    @jax.jit
    def outputs(state):
        layer = nnx.merge(graph, state)
        return layer(x, segment_ids=segment_ids)[0], layer.shared(x, segment_ids=segment_ids)[0]

    y, shared = outputs(state)
    layer.shared_gate.weight[...] = jnp.zeros_like(weights)
    y_half, _ = outputs(nnx.state(layer))
    gates = 1 / (1 + np.exp(-np.asarray(x) @ np.asarray(weights)))
    expected = (gates - 0.5) * shared * (np.asarray(segment_ids) != 0)[:, :, None]
    assert np.max(np.abs(expected)) > 0.01
    np.testing.assert_allclose(y - y_half, expected, atol=2e-6)


def test_bfloat16_layer_stays_close():
    x, segment_ids = inputs()
    graph, state = built(DROPLESS)
    y, aux = jax.jit(lambda state, x: nnx.merge(graph, state)(x, segment_ids=segment_ids))(
        state, x.astype(jnp.bfloat16)
    )
    assert y.dtype == jnp.bfloat16 and aux.losses["moe_balance"].dtype == jnp.float32
    exact = run_layer(DROPLESS, x.astype(jnp.bfloat16).astype(jnp.float32), segment_ids)[1]
    np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=0.05 * float(jnp.max(jnp.abs(exact))))
