"""Mixers on linear recurrences: outputs of transformers, initial values, decays of layers, wrong settings."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slmjax.models import (
    BlockConfig,
    DeltaNetConfig,
    GatedDeltaNetConfig,
    GatedLinearAttentionConfig,
    GatedNorm,
    KimiDeltaAttentionConfig,
    LayerGroup,
    Mamba2Config,
    ModelConfig,
    ModelDims,
    RetentionConfig,
    RetentionDecay,
    Rwkv7Config,
)
from slmjax.models.decoder import Decoder
from slmjax.models.mixers.recurrent_parts import initial_step_bias, softplus
from slmjax.models.mixers.retention import retention_log_decay
from slmjax.models.mixers.rwkv7 import initial_vectors
from tests.models.mixers import recurrent_oracle as oracle


def dims_of(width: int, **settings) -> ModelDims:
    return ModelDims(
        embed_dim=width, num_layers=2, norm_eps=1e-6, init_std=0.02, dtype=jnp.float32, **settings
    )


def with_weights(config, weights):
    """Build a mixer with these weights, and no others."""
    module = config.build(dims_of(oracle.WIDTH), rngs=nnx.Rngs(params=0))
    graphdef, state = nnx.split(module)
    flat = nnx.to_flat_state(state)
    paths = {"/".join(map(str, path)): leaf for path, leaf in flat}
    assert paths.keys() == weights.keys()
    for path, leaf in paths.items():
        assert leaf.shape == weights[path].shape, path
    new = [(path, leaf.replace(jnp.asarray(weights["/".join(map(str, path))]))) for path, leaf in flat]
    return nnx.merge(graphdef, nnx.from_flat_state(new))


@pytest.mark.parametrize("case", oracle.CASES)
def test_outputs_of_transformers(case):
    module = with_weights(oracle.CASES[case], oracle.imported_weights(case))
    ids = jnp.ones((1, oracle.LENGTH), jnp.int32)
    y, _ = module(jnp.asarray(oracle.inputs()), segment_ids=ids, positions=ids, state=None)
    expected = json.loads(oracle.GOLDEN.read_text())[case]
    np.testing.assert_allclose(y[0], expected, atol=2e-5, rtol=2e-5)


@pytest.mark.nightly
@pytest.mark.parametrize("case", oracle.CASES)
def test_the_golden_values_equal_transformers(case):
    expected = oracle.reference_output(case)[0]
    np.testing.assert_allclose(json.loads(oracle.GOLDEN.read_text())[case], expected, atol=1e-6)


def test_multipliers_of_mamba2_are_factors_of_its_weights():
    """With those of the projections in the weights, and without a norm, by hand."""
    weights = oracle.imported_weights("mamba2")
    multipliers = dict(zip(("gate", "value", "key", "query", "step"), (0.5, 2.0, 0.3, 1.5, 0.7), strict=True))
    scaled = weights | {
        f"{name}/weight": factor * weights[f"{name}/weight"] for name, factor in multipliers.items()
    }
    config = oracle.CASES["mamba2"]
    ids = jnp.ones((1, oracle.LENGTH), jnp.int32)

    def outputs(config, weights):
        module = with_weights(config, weights)
        return module(jnp.asarray(oracle.inputs()), segment_ids=ids, positions=ids, state=None)[0]

    factors = tuple(multipliers.values())
    multiplied = dataclasses.replace(config, projection_multipliers=factors)
    np.testing.assert_allclose(outputs(multiplied, weights), outputs(config, scaled), rtol=2e-4, atol=1e-5)
    # Without a norm the bias of the output is added to what the gate leaves.
    plain = dataclasses.replace(config, norm=GatedNorm.NONE, output_bias=True)
    unnormed = {name: x for name, x in weights.items() if name != "norm_scale"}
    biased = unnormed | {"output/bias": np.arange(8, dtype=np.float32)}
    zero = unnormed | {"output/bias": np.zeros(8, np.float32)}
    difference = outputs(plain, biased) - outputs(plain, zero)
    np.testing.assert_allclose(difference[0, 3], np.arange(8), rtol=1e-4, atol=1e-4)


def test_norm_before_the_gate_scales_each_group_to_its_scale():
    """With a gate that is 1 everywhere, the order has no effect; with any other it has."""
    weights = oracle.imported_weights("mamba2")
    config = oracle.CASES["mamba2"]
    before = dataclasses.replace(config, norm=GatedNorm.BEFORE_GATE)
    ids = jnp.ones((1, oracle.LENGTH), jnp.int32)
    x = jnp.asarray(oracle.inputs())
    mixed = jnp.asarray(np.random.default_rng(2).normal(size=(1, oracle.LENGTH, 16)), jnp.float32)
    gate = with_weights(config, weights).gate(x)
    ours = with_weights(before, weights)._gate(mixed, gate)
    groups = np.asarray(mixed).reshape(1, oracle.LENGTH, 2, 8)
    normed = groups / np.sqrt(np.mean(groups**2, -1, keepdims=True) + oracle.EPS)
    expected = normed.reshape(mixed.shape) * weights["norm_scale"] * np.asarray(jax.nn.silu(gate))
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    y = [with_weights(c, weights)(x, segment_ids=ids, positions=ids, state=None)[0] for c in (config, before)]
    assert float(jnp.max(jnp.abs(y[0] - y[1]))) > 0.1


def test_decays_of_retention():
    np.testing.assert_allclose(
        np.exp(retention_log_decay(RetentionDecay.RETNET, 3, index=1, num_layers=2)),
        [1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128],
        rtol=1e-6,
    )
    lightning = functools.partial(retention_log_decay, RetentionDecay.LIGHTNING, 4, num_layers=4)
    np.testing.assert_allclose(lightning(index=0), [0, -2, -4, -6])
    # Later layers forget more slowly.
    np.testing.assert_allclose(lightning(index=3), [0, -0.5, -1, -1.5])


def test_initial_steps_and_vectors():
    steps = softplus(initial_step_bias(jax.random.key(0), (1000,)))
    assert 1e-3 <= float(jnp.min(steps)) < 1.1e-3
    assert 0.09 < float(jnp.max(steps)) <= 0.1001
    # Log-uniform: half of the steps are below the geometric mean of the bounds.
    assert 450 < int(jnp.sum(steps < 1e-2)) < 550
    first = initial_vectors(8, 4, depth=jnp.float32(0), remaining=jnp.float32(1))
    last = initial_vectors(8, 4, depth=jnp.float32(1), remaining=jnp.float32(0.5))
    # -6 + 6 c + 0.5 + 2.5 zigzag: first and last channel of the first layer.
    np.testing.assert_allclose(first["decay"][jnp.asarray([0, 7])], [-8.0, 3.0], rtol=1e-6)
    # Mixes of later layers take less of the token before.
    assert np.all(last["key_mix"] <= first["key_mix"])
    np.testing.assert_allclose(first["key_mix"][4], 1 - 0.5**0.7, rtol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: Mamba2Config(head_dim=0), "head_dim must be at least 1, got 0"),
        (lambda: Mamba2Config(head_dim=3).num_heads(dims_of(8)), "16 dims do not divide by 3"),
        (lambda: Mamba2Config(head_dim=4, num_groups=3).num_heads(dims_of(8)), "num_groups=3: change one"),
        (lambda: Mamba2Config(inner_dim=100).num_heads(dims_of(8)), "64: change inner_dim or head_dim"),
        (lambda: Mamba2Config(projection_multipliers=(1.0, 2.0)), "2 entries: give one for each of gate"),
        (lambda: GatedDeltaNetConfig(num_heads=2, num_value_heads=3), "must be a multiple of num_heads=2"),
        (lambda: GatedDeltaNetConfig(num_heads=2, head_norm_eps=0.0), "head_norm_eps must be positive"),
        (lambda: DeltaNetConfig(num_heads=3).resolved_key_dim(dims_of(8)), "change num_heads or key_dim"),
        (lambda: GatedLinearAttentionConfig(decay_divisor=0.0), "decay_divisor must be positive"),
        (lambda: KimiDeltaAttentionConfig(num_heads=2, gate_rank=0), "gate_rank must be at least 1"),
        (lambda: RetentionConfig(num_heads=2, rope_base=-1.0), "rope_base must be positive"),
        (lambda: Rwkv7Config(head_dim=3).num_heads(dims_of(8)), "change embed_dim or head_dim"),
    ],
)
def test_wrong_settings(config, message):
    with pytest.raises(ValueError, match=message):
        config()


def test_values_of_the_first_layer():
    first = Rwkv7Config(head_dim=4, is_first=True)
    later = dataclasses.replace(first, is_first=False)
    assert (first.reads(), first.writes()) == ((), ("first_values",))
    assert (later.reads(), later.writes()) == (("first_values",), ())


@pytest.mark.parametrize(
    "config", [oracle.CASES["mamba2"], oracle.CASES["gated_delta"]], ids=["mamba2", "delta"]
)
def test_stacked_layers_decode(config):
    """Parameters of a group's layers are stacked; the state of each has the shapes of one layer."""
    block = BlockConfig(mixer=config, ffn=None)
    stack = (LayerGroup(pattern=(block,), repeats=2),)
    model = ModelConfig(embed_dim=oracle.WIDTH, vocab_size=8, stack=stack)

    def states(tokens):
        decoder = Decoder(model, rngs=nnx.Rngs(params=0))
        state = decoder.init_state(2, max_length=4)
        ids = jnp.ones_like(tokens)
        return state, decoder(tokens, segment_ids=ids, positions=ids, state=state).state

    before, after = jax.eval_shape(states, jax.ShapeDtypeStruct((2, 4), jnp.int32))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), before) == jax.tree.map(
        lambda x: (x.shape, x.dtype), after
    )
