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
        (lambda: GatedDeltaNetConfig(num_heads=2, num_value_heads=3), "must be a multiple of num_heads=2"),
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
