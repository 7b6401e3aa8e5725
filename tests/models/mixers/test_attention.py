"""The attention mixer against `jax.nn.dot_product_attention`, its visibility, and decoding with a cache."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slmjax.models.layers import ModelDims, NormKind
from slmjax.models.mixers.attention import AttentionConfig, Biases, OutputGate, QkNorm, gated_heads
from slmjax.parallel.mesh import MeshConfig, make_mesh
from slmjax.parallel.rules import partition_spec

BATCH = 2
LENGTH = 12
WIDTH = 8
DIMS = ModelDims(embed_dim=WIDTH, num_layers=2, norm_eps=1e-6, init_std=0.5, dtype=jnp.float32)


def build(**settings):
    """Build the mixer with all parameters random, biases and norm scales too."""
    config = AttentionConfig(**settings)
    draw = np.random.default_rng(0)
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: config.build(DIMS, rngs=nnx.Rngs(params=0))))
    return nnx.merge(
        graphdef,
        jax.tree.map(lambda leaf: jnp.asarray(draw.normal(0.3, 0.5, leaf.shape), leaf.dtype), shapes),
    )


def inputs():
    x = np.random.default_rng(1).normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32)
    return (
        x,
        np.ones((BATCH, LENGTH), np.int32),
        np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (BATCH, LENGTH)),
    )


@functools.partial(jax.jit, static_argnums=0)
def attend_with(graphdef, params, x, segment_ids, positions):
    return nnx.merge(graphdef, params)(x, segment_ids=segment_ids, positions=positions, state=None)[0]


def attend(attention, x, segment_ids, positions):
    return attend_with(*nnx.split(attention), x, segment_ids, positions)


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"num_heads": 2}, {}),
        ({"num_heads": 4, "num_kv_heads": 2, "qk_norm": QkNorm.ALL_HEADS}, {}),
        ({"num_heads": 4, "num_kv_heads": 1, "scale": 0.7}, {"scale": 0.7}),
        ({"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "window": 3}, {"local_window_size": (2, 0)}),
    ],
    ids=["full", "norms of all heads", "one kv head", "groups and window"],
)
def test_equals_the_attention_of_jax(settings, options):
    attention = build(**{"qk_norm": QkNorm.PER_HEAD, **settings}, rope_base=None, biases=Biases.ALL)
    all_heads = attention.config.qk_norm is QkNorm.ALL_HEADS
    x, segment_ids, positions = inputs()

    def project(linear):
        y = np.asarray(x) @ np.asarray(linear.weight[...]) + np.asarray(linear.bias[...])
        return y.reshape(BATCH, LENGTH, -1, attention.head_dim)

    def normed(y, norm):
        together = y.reshape(BATCH, LENGTH, -1) if all_heads else y
        scale = np.asarray(norm.scale[...])
        assert scale.shape == together.shape[-1:]
        return (together / np.sqrt(np.mean(together**2, axis=-1, keepdims=True) + 1e-6) * scale).reshape(
            y.shape
        )

    query = normed(project(attention.query), attention.query_norm)
    key = normed(project(attention.key), attention.key_norm)
    oracle = jax.jit(functools.partial(jax.nn.dot_product_attention, is_causal=True, **options))
    mixed = np.asarray(oracle(query, key, project(attention.value))).reshape(BATCH, LENGTH, -1)
    expected = mixed @ np.asarray(attention.output.weight[...]) + np.asarray(attention.output.bias[...])
    np.testing.assert_allclose(attend(attention, x, segment_ids, positions), expected, rtol=1e-4, atol=1e-5)


def test_two_tokens_by_hand_with_scale_and_softcap():
    # One head of one dim, all weights 1: queries, keys and values are the inputs themselves, 1 and 2.
    dims = ModelDims(embed_dim=1, num_layers=1, norm_eps=1e-6, init_std=0.5, dtype=jnp.float32)
    attention = AttentionConfig(num_heads=1, rope_base=None, scale=0.5, softcap=1.5).build(
        dims, rngs=nnx.Rngs(params=0)
    )
    for linear in (attention.query, attention.key, attention.value, attention.output):
        linear.weight[...] = jnp.ones((1, 1))
    y = attend(attention, jnp.array([[[1.0], [2.0]]]), jnp.ones((1, 2), jnp.int32), jnp.array([[0, 1]]))
    first, second = (math.exp(1.5 * math.tanh(score / 1.5)) for score in (0.5 * 2 * 1, 0.5 * 2 * 2))
    np.testing.assert_allclose(y.ravel(), [1.0, (first * 1 + second * 2) / (first + second)], rtol=1e-6)


@pytest.mark.parametrize("window", [1, 4, None])
def test_a_token_sees_exactly_its_window(window):
    attention = build(num_heads=2, window=window)
    x, segment_ids, positions = inputs()

    def influence(t):
        return (
            jnp.abs(
                jax.grad(lambda x: jnp.sum(attend(attention, x, segment_ids, positions)[:, t] ** 2))(x)
            ).sum((0, 2))
            > 0
        )

    num_visible = LENGTH if window is None else window
    t = np.arange(LENGTH)
    distance = t[:, None] - t[None, :]
    np.testing.assert_array_equal(jax.jit(jax.vmap(influence))(t), (distance >= 0) & (distance < num_visible))


def test_positions_matter_only_with_rotary():
    x, segment_ids, positions = inputs()
    reversed_past = np.concatenate([x[:, -2::-1], x[:, -1:]], axis=1)

    def change(base):
        attention = build(num_heads=2, rope_base=base)
        before, after = (np.asarray(attend(attention, y, segment_ids, positions)) for y in (x, reversed_past))
        return np.max(np.abs(before[:, -1] - after[:, -1]))

    assert change(None) < 1e-6
    assert change(10.0) > 1e-3


def test_depth_scaled_output_and_plain_inputs_at_the_start():
    dims = ModelDims(embed_dim=256, num_layers=8, norm_eps=1e-6, init_std=0.02, dtype=jnp.float32)
    config = AttentionConfig(num_heads=4, biases=Biases.QKV)
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: config.build(dims, rngs=nnx.Rngs(params=0))))
    attention = nnx.merge(graphdef, jax.jit(lambda: nnx.state(config.build(dims, rngs=nnx.Rngs(params=0))))())
    for linear, std in (
        (attention.query, 0.02),
        (attention.key, 0.02),
        (attention.value, 0.02),
        (attention.output, 0.005),
    ):
        np.testing.assert_allclose(np.std(np.asarray(linear.weight[...])), 0.98658 * std, rtol=1e-2)
    assert attention.query.bias is not None and attention.output.bias is None


def test_a_sink_takes_a_fraction_of_the_softmax():
    attention = build(num_heads=2, sinks=True)
    plain = build(num_heads=2)
    assert attention.sinks[...].shape == (2,) and plain.sinks is None
    fresh = AttentionConfig(num_heads=2, sinks=True).build(DIMS, rngs=nnx.Rngs(params=0))
    assert not np.any(fresh.sinks[...])
    attention.sinks[...] = jnp.full(2, -1e4)  # no weight at all
    for name in ("query", "key", "value", "output"):
        getattr(attention, name).weight[...] = getattr(plain, name).weight[...]
    np.testing.assert_allclose(attend(attention, *inputs()), attend(plain, *inputs()), rtol=1e-5, atol=1e-6)
    attention.sinks[...] = jnp.full(2, 1e4)  # all of the weight
    np.testing.assert_allclose(attend(attention, *inputs()), np.zeros((BATCH, LENGTH, WIDTH)), atol=1e-6)


# Queries, keys and values of a head of two dims; documents of three and of two tokens.
QUERIES = np.array([[0.1, -0.3], [0.3, 0.4], [-0.5, 0.6], [0.7, -0.6], [0.9, 1.0]], np.float32)
KEYS = np.array([[0.2, 0.1], [-0.4, 0.3], [0.6, -0.5], [0.8, 0.7], [-1.0, 0.9]], np.float32)
VALUES = np.array([[1.0, 0.5], [-0.5, 2.0], [1.5, -1.0], [-2.0, 0.3], [0.4, -0.7]], np.float32)


def test_an_output_gate_has_the_values_of_a_calculation_by_hand():
    """A gate for each element, equal to the keys; the last two rows without the boundary before them."""
    attention = AttentionConfig(
        num_heads=1, head_dim=2, rope_base=None, output_gate=OutputGate.PER_ELEMENT
    ).build(dataclasses.replace(DIMS, embed_dim=6), rngs=nnx.Rngs(params=0))
    parts = np.eye(6, dtype=np.float32).reshape(6, 3, 2)
    # The input is queries, keys and values side by side.
    for linear, part in ((attention.query, 0), (attention.key, 1), (attention.value, 2)):
        linear.weight[...] = parts[:, part]
    attention.output_gate.weight[...] = parts[:, 1]
    attention.output.weight[...] = parts[:, 0].T
    x = np.concatenate([QUERIES, KEYS, VALUES], axis=1)[None]
    segments = np.array([[1, 1, 1, 2, 2]], np.int32)
    packed = attend(attention, x, segments, np.array([[0, 1, 2, 0, 1]], np.int32))[0, :, :2]
    expected = [
        [0.549834, 0.2624896],
        [0.1109651, 0.7028273],
        [0.2858756, 0.3149787],
        [-1.379949, 0.2004563],
        [-0.3648108, 0.0226525],
    ]
    np.testing.assert_allclose(packed, expected, atol=2e-6)
    whole = attend(attention, x, np.ones_like(segments), np.arange(5, dtype=np.int32)[None])[0, :, :2]
    np.testing.assert_allclose(whole[3:], [[0.149366, 0.0941904], [-0.1076499, 0.1657086]], atol=2e-6)


def test_a_gate_for_each_head_multiplies_all_its_dims():
    heads = np.arange(1.0, 13.0, dtype=np.float32).reshape(1, 2, 2, 3)
    # sigmoid(log 3) = 3 / 4, and a very negative gate is closed.
    gates = np.array([[[math.log(3.0), 0.0], [-1e4, 1e4]]], np.float32)
    factors = np.array([[[0.75, 0.5], [0.0, 1.0]]], np.float32)
    gated = gated_heads(jnp.asarray(heads), jnp.asarray(gates))
    np.testing.assert_allclose(gated, heads * factors[..., None], rtol=1e-6)


def test_a_norm_of_all_heads_with_sharded_heads():
    """Values and gradients of means over several devices equal one device; 2 kv heads do not divide by 4."""
    config = AttentionConfig(
        num_heads=4,
        num_kv_heads=2,
        qk_norm=QkNorm.ALL_HEADS,
        sinks=True,
        output_gate=OutputGate.PER_ELEMENT,
    )
    dims = dataclasses.replace(DIMS, norm_kind=NormKind.LAYER)
    graphdef, state = nnx.split(config.build(dims, rngs=nnx.Rngs(params=0)))
    draw = np.random.default_rng(0)
    state = jax.tree.map(lambda leaf: jnp.asarray(draw.normal(0.3, 0.5, leaf.shape), leaf.dtype), state)
    mesh = make_mesh(MeshConfig(data=2, tensor=4))

    def loss(state, x, segment_ids, positions):
        y = nnx.merge(graphdef, state)(x, segment_ids=segment_ids, positions=positions, state=None)[0]
        return jnp.sum(y * jnp.sin(jnp.arange(y.size)).reshape(y.shape))

    def place(keys, leaf):
        path = "layers/0/mixer/" + "/".join(key.key for key in keys if isinstance(key, jax.tree_util.DictKey))
        return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, partition_spec(path, leaf.shape, mesh)))

    expected = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(state, *inputs())
    with jax.set_mesh(mesh):
        sharded = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(
            jax.tree_util.tree_map_with_path(place, state), *inputs()
        )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), sharded, expected)


# Decoding ---------------------------------------------------------------------------------------------------
ODD = {
    "full": {
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 4,
        "rotary_dim": 2,
        "qk_norm": QkNorm.PER_HEAD,
        "output_gate": OutputGate.PER_ELEMENT,
    },
    "window": {
        "num_heads": 2,
        "window": 4,
        "softcap": 2.0,
        "sinks": True,
        "output_gate": OutputGate.PER_HEAD,
    },
}


@functools.cache
def decoder(kind):
    attention = build(**ODD[kind])
    graphdef, params = nnx.split(attention)

    @jax.jit
    def step(x, segment_ids, positions, state):
        return nnx.merge(graphdef, params)(x, segment_ids=segment_ids, positions=positions, state=state)

    return attention, step


def decode(kind, x, segment_ids, positions, *, chunks):
    attention, step = decoder(kind)
    state = attention.init_state(x.shape[0], max_length=LENGTH)
    outputs = []
    start = 0
    for size in chunks:
        part = slice(start, start + size)
        y, state = step(x[:, part], segment_ids[:, part], positions[:, part], state)
        outputs.append(y)
        start += size
    return np.concatenate(outputs, axis=1)


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("chunks", [(6, 1, 1, 1, 1, 1, 1), (6, 6)], ids=["token by token", "chunks"])
def test_decoding_equals_the_full_sequence(kind, chunks):
    x, segment_ids, positions = inputs()
    full = attend(decoder(kind)[0], x, segment_ids, positions)
    np.testing.assert_allclose(
        decode(kind, x, segment_ids, positions, chunks=chunks), full, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", ODD)
def test_decoding_continues_the_last_document_of_a_chunk(kind):
    # The first chunk ends two tokens into the second document, whose positions start again at 0.
    x, _, _ = inputs()
    segment_ids = np.array([[1] * 4 + [2] * 8] * BATCH, np.int32)
    positions = np.array([[*range(4), *range(8)]] * BATCH, np.int32)
    full = attend(decoder(kind)[0], x, segment_ids, positions)
    decoded = decode(kind, x, segment_ids, positions, chunks=(6, 1, 1, 1, 1, 1, 1))
    np.testing.assert_allclose(decoded, full, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ODD)
def test_prompts_of_different_lengths_decode_as_alone(kind):
    # The second prompt has 4 tokens and 2 of padding, which must not change anything.
    x, _, _ = inputs()
    full = attend(decoder(kind)[0], *inputs())
    attention, step = decoder(kind)
    lengths = np.array([6, 4], np.int32)
    rows = np.arange(BATCH)
    t = np.arange(6, dtype=np.int32)
    prompt = t < lengths[:, None]
    _, state = step(
        x[:, :6],
        prompt.astype(np.int32),
        np.where(prompt, t, 0),
        attention.init_state(BATCH, max_length=LENGTH),
    )
    for index in range(6):
        at = lengths + np.int32(index)
        y, state = step(x[rows, at][:, None], np.ones((BATCH, 1), np.int32), at[:, None], state)
        np.testing.assert_allclose(y[:, 0], full[rows, at], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ODD)
def test_costs_equal_those_of_the_arrays(kind):
    attention = decoder(kind)[0]
    config = AttentionConfig(**ODD[kind])
    state = jax.eval_shape(lambda: attention.init_state(3, max_length=LENGTH))
    assert (
        config.state_size(DIMS, length=LENGTH).bytes(4) == (4 * state.keys.size + 4 * state.values.size) // 3
    )
    visible = sum(min(t + 1, config.window or LENGTH) for t in range(LENGTH)) / LENGTH
    # Scores and weighted sum: a multiplication and an addition each, per visible token, head and dim.
    assert config.mixing_flops(DIMS, length=LENGTH) == pytest.approx(
        4 * visible * config.num_heads * attention.head_dim
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads=3"),
        ({"num_heads": 4, "num_kv_heads": 0}, "num_kv_heads=0"),
        ({"num_heads": 4, "num_kv_heads": -2}, "num_kv_heads=-2"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"num_heads": 2, "head_dim": 0}, "head_dim must be at least 1"),
        ({"num_heads": 2, "window": 0}, "window must be at least 1"),
        ({"num_heads": 2, "softcap": 0.0}, "softcap must be positive"),
        ({"num_heads": 2, "rope_base": 0.0}, "rope_base must be positive"),
        ({"num_heads": 2, "rotary_dim": 3}, "rotary_dim=3: dims are rotated in pairs"),
        ({"num_heads": 2, "rotary_dim": 0}, "rope_base none rotates nothing"),
        ({"num_heads": 3}, "change one, or set head_dim"),
        ({"num_heads": 2, "rotary_dim": 10}, "rotary_dim=10 and heads of"),
        ({"num_heads": 2, "head_dim": 1}, "or rope_base to none"),
    ],
)
def test_errors_of_bad_settings_name_what_to_change(settings, message):
    with pytest.raises(ValueError, match=message):
        build(**settings)
