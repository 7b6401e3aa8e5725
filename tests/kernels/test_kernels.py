"""Every implementation of attention and products equals its reference, in values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax import kernels
from slmjax.kernels import products
from slmjax.parallel import mesh
from slmjax.parallel.mesh import MeshConfig, make_mesh


def attention_inputs(length: int, *, heads: int = 4, kv_heads: int = 2, rows: int = 2):
    """Random q, k, v and rows of packed documents, different in each row, that end in padding."""
    rng = np.random.default_rng(length)
    q, k, v = (
        jnp.asarray(rng.normal(size=(rows, length, count, 8)), jnp.float32)
        for count in (heads, kv_heads, kv_heads)
    )
    segment_ids = np.zeros((rows, length), np.int32)
    positions = np.zeros((rows, length), np.int32)
    for row in range(rows):
        cuts = [0, length // (3 + row), length // 2 + row, length - length // 8]
        for document, (start, end) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):
            segment_ids[row, start:end] = document + 1
            positions[row, start:end] = np.arange(end - start)
    return (q, k, v), {"segment_ids": jnp.asarray(segment_ids), "positions": jnp.asarray(positions)}


def as_reference(q, k, v, *, segment_ids, positions, **settings):
    ids = {
        "q_segments": segment_ids,
        "k_segments": segment_ids,
        "q_positions": positions,
        "k_positions": positions,
    }
    return kernels.reference_attention(q, k, v, **ids, **settings)


def in_self_attention(q, k, v, *, segment_ids, positions, **settings):
    return kernels.self_attention(q, k, v, segment_ids=segment_ids, **settings)


def with_more(implementation, q, k, v, more, **settings):
    """Call an implementation of attention with further arrays that get gradients too."""
    return implementation(q, k, v, **more, **settings)


def cotangent_like(value):
    """Return values that every dtype holds exactly."""
    return ((jnp.arange(value.size) * 5 % 17 - 8) / 8).astype(value.dtype).reshape(value.shape)


def value_and_gradients(fn, arrays):
    @jax.jit
    def run(*arrays):
        value, vjp = jax.vjp(fn, *arrays)
        return value, vjp(cotangent_like(value))

    return run(*arrays)


def assert_trees_close(actual, expected, *, rtol=1e-5, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), actual, expected)


def test_attention_by_hand():
    # One head of width 1, no scale: the second token weighs values 1 and 3 by exp(0) : exp(log 3) = 1 : 3.
    q, k, v = (jnp.asarray(x, jnp.float32).reshape(1, 2, 1, 1) for x in ([1, 1], [0, np.log(3)], [1, 3]))
    ids = {"segment_ids": jnp.ones((1, 2), int), "positions": jnp.arange(2)[None]}
    np.testing.assert_allclose(
        as_reference(q, k, v, **ids, window=None, scale=1.0).ravel(), [1.0, 2.5], rtol=1e-6
    )
    np.testing.assert_allclose(
        as_reference(q, k, v, **ids, window=1, scale=1.0).ravel(), [1.0, 3.0], rtol=1e-6
    )
    capped = as_reference(q, k, v, **ids, window=None, scale=1.0, softcap=0.5).ravel()[1]
    odds = np.exp(0.5 * np.tanh(np.log(3) / 0.5))
    np.testing.assert_allclose(capped, (1 + 3 * odds) / (1 + odds), rtol=1e-6)


@pytest.mark.parametrize(("kv_heads", "window"), [(1, None), (2, 5), (4, None)])
def test_attention_equals_a_loop_over_queries(kv_heads, window):
    (q, k, v), ids = attention_inputs(24, kv_heads=kv_heads)
    out = as_reference(q, k, v, **ids, window=window, scale=0.3)
    segments = np.asarray(ids["segment_ids"])
    positions = np.asarray(ids["positions"])
    for row, t, head in np.ndindex(2, 24, 4):
        distance = positions[row, t] - positions[row]
        seen = (
            (segments[row] == segments[row, t])
            & (segments[row, t] != 0)
            & (distance >= 0)
            & (distance < (window or 99))
        )
        keys, values = (np.asarray(x)[row, seen, head // (4 // kv_heads)] for x in (k, v))
        weights = np.exp(0.3 * keys @ np.asarray(q)[row, t, head])
        expected = weights @ values / weights.sum() if seen.any() else np.zeros(8)
        np.testing.assert_allclose(out[row, t, head], expected, rtol=1e-5, atol=1e-5)


def test_a_sink_is_a_key_with_this_score_and_no_value():
    """Compare with an extra key for each head, whose score is the sink, in float64 with numpy."""
    (q, k, v), ids = attention_inputs(16)
    sinks = np.array([-1.0, 0.5, 2.0, 40.0])  # the last takes nearly all
    out = as_reference(
        q, k, v, **ids, window=6, scale=0.3, softcap=2.0, sinks=jnp.asarray(sinks, jnp.float32)
    )
    mask = np.asarray(
        kernels.attention_mask(
            q_segments=ids["segment_ids"],
            k_segments=ids["segment_ids"],
            q_positions=ids["positions"],
            k_positions=ids["positions"],
            window=6,
        )
    )
    for head in range(4):
        queries, keys, values = (
            np.asarray(x, np.float64)[:, :, i] for x, i in ((q, head), (k, head // 2), (v, head // 2))
        )
        scores = 2.0 * np.tanh(0.3 * queries @ keys.transpose(0, 2, 1) / 2.0)
        powers = np.exp(
            np.concatenate([np.where(mask, scores, -np.inf), np.full((2, 16, 1), sinks[head])], axis=2)
        )
        values = np.concatenate([values, np.zeros((2, 1, 8))], axis=1)
        np.testing.assert_allclose(
            out[:, :, head], powers / powers.sum(axis=2, keepdims=True) @ values, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(
    ("length", "window", "name"),
    [
        (24, 5, "_one_block"),
        (300, None, "_causal_blocks"),
        (300, 200, "_causal_blocks"),
        (260, 40, "_window_blocks"),
        (390, 66, "_window_blocks"),
    ],
)
def test_self_attention_equals_reference_in_every_implementation(length, window, name):
    chosen = kernels.choose_attention(length, window=window, platform="cpu")
    assert chosen.func is getattr(kernels.attention, name)
    arrays, ids = attention_inputs(length)
    sinks = jnp.asarray([-1.0, 0.5, 1.0, 2.0])
    # With the hand-written gradient, and with that of the reference.
    for softcap, more in ((None, {}), (5.0, {"sinks": sinks})):
        settings = {**ids, "window": window, "scale": 0.3, "softcap": softcap}
        actual, expected = (
            value_and_gradients(functools.partial(with_more, implementation, **settings), (*arrays, more))
            for implementation in (in_self_attention, as_reference)
        )
        assert_trees_close(actual, expected)
        assert not more or np.all(np.abs(actual[1][3]["sinks"]) > 1e-3)


@pytest.mark.parametrize(
    ("axes", "window"),
    [
        ({"context": 4, "tensor": 2}, None),
        ({"context": 4, "tensor": 2}, 9),
        ({"data": 2, "context": 2, "tensor": 2}, 40),
        ({"tensor": 8}, 9),
    ],
)
def test_sinks_of_sharded_heads_and_sequences(axes, window):
    """Gathered keys, and a halo; sharded heads, and 4 heads that 8 devices do not divide."""
    arrays, ids = attention_inputs(64)
    arrays = (*arrays, jnp.asarray([-1.0, 0.5, 1.0, 2.0]))

    def attend(implementation, q, k, v, sinks):
        return implementation(q, k, v, **ids, window=window, scale=0.3, sinks=sinks)

    expected = value_and_gradients(functools.partial(attend, as_reference), arrays)
    with jax.set_mesh(make_mesh(MeshConfig(**{"data": 1, **axes}))):
        assert_trees_close(
            value_and_gradients(functools.partial(attend, in_self_attention), arrays), expected
        )


def test_padding_gives_zeros_and_finite_gradients():
    arrays, ids = attention_inputs(16)
    ids = {**ids, "segment_ids": ids["segment_ids"].at[0].set(0)}
    out, gradients = value_and_gradients(
        functools.partial(in_self_attention, **ids, window=None, scale=1.0), arrays
    )
    assert not np.any(out[0]) and not np.any(out[1, -2:]) and np.all(out[1, :-2])
    for gradient in gradients:
        assert not np.any(gradient[0]) and np.all(np.isfinite(gradient)) and np.any(gradient[1])


def test_decoding_with_a_cache_equals_the_full_sequence():
    (q, k, v), _ = attention_inputs(12, rows=1)
    ids = {"segment_ids": jnp.ones((1, 12), int), "positions": jnp.arange(12)[None]}
    full = in_self_attention(q, k, v, **ids, window=4, scale=0.3)
    decode = jax.jit(functools.partial(kernels.reference_attention, window=4, scale=0.3))
    # A ring of the last 4 keys, out of order, one slot of it empty at first.
    for t in (2, 7, 11):
        slots = [max(t - back, -1) for back in (2, 0, 3, 1)]
        ring = jnp.asarray(slots)[None]
        step = decode(
            *(q[:, t : t + 1], k[:, np.asarray(slots)], v[:, np.asarray(slots)]),
            q_segments=jnp.ones((1, 1), int),
            k_segments=(ring >= 0).astype(int),
            q_positions=jnp.full((1, 1), t),
            k_positions=ring,
        )
        np.testing.assert_allclose(step[0, 0], full[0, t], rtol=1e-5, atol=1e-6)


def test_windowed_attention_is_linear_in_length():
    def flops(length: int) -> float:
        arrays, ids = attention_inputs(length, rows=1)
        attend = functools.partial(in_self_attention, **ids, window=32, scale=1.0)
        cost = jax.jit(attend).lower(*arrays).cost_analysis()
        return cost["flops"]

    assert flops(2048) < 2.1 * flops(1024)


def test_attention_in_bfloat16():
    arrays, ids = attention_inputs(64)
    narrow = tuple(x.astype(jnp.bfloat16) for x in arrays)
    attend = functools.partial(in_self_attention, **ids, window=None, scale=0.3)
    expected = value_and_gradients(attend, tuple(x.astype(jnp.float32) for x in narrow))
    for out, exact in zip(
        jax.tree.leaves(value_and_gradients(attend, narrow)), jax.tree.leaves(expected), strict=True
    ):
        assert out.dtype == jnp.bfloat16
        assert np.linalg.norm(out.astype(jnp.float32) - exact) < 0.01 * np.linalg.norm(exact)


# Products ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(48, 96), (3, 2, 32, 128), (5, 24)])
def test_transposition_is_exact(shape):
    x = jax.random.normal(jax.random.key(0), shape).astype(jnp.bfloat16) * 1e3
    np.testing.assert_array_equal(products.transposed(x), jnp.swapaxes(x, -1, -2))


def test_materialised_changes_nothing():
    x = jnp.cos(jax.random.normal(jax.random.key(0), (2, 7, 1, 16)) * 1e3)
    np.testing.assert_array_equal(kernels.materialised(x), x)


@pytest.mark.parametrize(
    ("platform", "repeats", "blocks", "at_a_time"),
    [
        ("cpu", 8, 1, 8),
        ("cpu", 3, 3, 1),
        ("gpu", 32, 1, 32),
        ("gpu", 16, 2, 16),
        ("gpu", 17, 2, 1),
        ("tpu", 2, 1, 1),
    ],
)
def test_shallow_stacks_are_unrolled_where_loops_copy(monkeypatch, platform, repeats, blocks, at_a_time):
    monkeypatch.setattr(mesh, "platform", lambda: platform)
    assert kernels.unrolled_repeats(repeats, num_blocks=blocks) == at_a_time


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_equal_numpy(dtype):
    x = jax.random.normal(jax.random.key(0), (40, 64)).astype(dtype)
    weight = jax.random.normal(jax.random.key(1), (64, 32))
    y, (dx, dweight) = value_and_gradients(kernels.matmul, (x, weight))
    assert (y.dtype, dx.dtype, dweight.dtype) == (dtype, dtype, jnp.float32)
    x64 = np.asarray(x, np.float64)
    weight64 = np.asarray(weight.astype(dtype), np.float64)
    dy = np.asarray(cotangent_like(y), np.float64)
    # In bfloat16, half a unit in the last place, relative.
    tolerance = 1e-5 if dtype == jnp.float32 else 2**-8
    for actual, expected in ((y, x64 @ weight64), (dx, dy @ weight64.T)):
        np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=tolerance, atol=1e-4)
    np.testing.assert_allclose(dweight, x64.T @ dy, rtol=1e-4, atol=1e-3)  # never rounded to bfloat16
    np.testing.assert_allclose(
        kernels.outer_sum(x, y), x64.T @ np.asarray(y, np.float64), rtol=1e-4, atol=1e-3
    )


# Grouped products -------------------------------------------------------------------------------------------
def loop_over_groups(x, weights, group_sizes, dy):
    """The definition of grouped_matmul and its gradients, in numpy."""
    y = np.zeros_like(dy)
    dx = np.zeros_like(x)
    dweights = np.zeros_like(weights)
    ends = np.cumsum(group_sizes)
    for group, rows in enumerate(slice(end - size, end) for end, size in zip(ends, group_sizes, strict=True)):
        y[rows] = x[rows] @ weights[group]
        dx[rows] = dy[rows] @ weights[group].T
        dweights[group] = x[rows].T @ dy[rows]
    return y, (dx, dweights)


@functools.cache
def compiled_grouped_matmul(platform):
    def run(x, weights, group_sizes, dy):
        y, vjp = jax.vjp(
            lambda x, weights: kernels.choose_grouped_matmul(platform)(x, weights, group_sizes), x, weights
        )
        return y, vjp(dy)

    return jax.jit(run)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize(
    "group_sizes", [(0, 150, 0, 33, 17), (40, 40, 40, 40, 40), (0, 0, 0, 0, 0), (0, 0, 0, 0, 210)]
)
def test_grouped_matmul_equals_a_loop_over_groups(platform, group_sizes):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(210, 6)).astype(np.float32)
    weights = rng.normal(size=(5, 6, 4)).astype(np.float32)
    sizes = np.asarray(group_sizes, np.int32)
    dy = rng.normal(size=(210, 4)).astype(np.float32)
    assert_trees_close(
        compiled_grouped_matmul(platform)(x, weights, sizes, dy), loop_over_groups(x, weights, sizes, dy)
    )


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_grouped_matmul_ignores_unused_rows(platform):
    x = np.ones((210, 6), np.float32)
    weights = np.ones((5, 6, 4), np.float32)
    x[12:] = np.nan
    sizes = np.asarray([5, 0, 0, 0, 7], np.int32)
    y, (dx, dweights) = compiled_grouped_matmul(platform)(x, weights, sizes, np.ones((210, 4), np.float32))
    assert not np.any(y[12:]) and not np.any(dx[12:])
    assert np.all(np.isfinite(dweights))


def test_grouped_matmul_sums_weight_gradients_in_float32():
    # Blocks that each add a quarter to 128: a sum in bfloat16 would stay at 128.
    x = jnp.ones((2048, 1), jnp.bfloat16)
    weights = jnp.ones((1, 1, 1), jnp.bfloat16)
    dy = jnp.full((2048, 1), 1 / 512, jnp.bfloat16).at[0].set(128)
    _, (_, dweights) = compiled_grouped_matmul("cpu")(x, weights, jnp.asarray([2048], jnp.int32), dy)
    assert dweights.item() == 132


def test_choices_are_logged_once(caplog):
    products.log_choice.cache_clear()
    with caplog.at_level("DEBUG", logger="slmjax.kernels"):
        for _ in range(2):
            kernels.choose_grouped_matmul("cpu")
            kernels.choose_attention(4096, window=None, platform="tpu")
    assert [record.message for record in caplog.records] == [
        "grouped products on cpu: blocks of rows",
        "attention over 4096 tokens, window None, heads of 64, float32, on tpu: splash attention",
    ]
