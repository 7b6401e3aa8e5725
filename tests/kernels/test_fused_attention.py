"""Fused attention equals the reference.

TPU kernels run in interpret mode, and compile for TPUs that need not be attached. For cuDNN, the same call
runs in its XLA implementation.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax import kernels
from slmjax.kernels import attention, gpu, products, tpu
from slmjax.parallel import mesh as device_mesh
from slmjax.parallel.mesh import MeshConfig, make_mesh


def inputs(length, *, heads=4, kv_heads=2, head_dim=64, rows=2, dtype=jnp.float32):
    """Random q, k, v and the segments of packed documents that end in padding."""
    draw = np.random.default_rng(length)
    arrays = tuple(
        jnp.asarray(draw.normal(size=(rows, length, count, head_dim)), dtype)
        for count in (heads, kv_heads, kv_heads)
    )
    cuts = draw.integers(5, length - 20, (rows, 1))
    index = np.arange(length)[None, :]
    segments = np.where(index >= length - 9, 0, 1 + (index >= cuts)).astype(np.int32)
    return arrays, jnp.asarray(segments)


def in_reference(q, k, v, segments, **settings):
    index = jnp.broadcast_to(jnp.arange(q.shape[1])[None], segments.shape)
    ids = {"q_segments": segments, "k_segments": segments, "q_positions": index, "k_positions": index}
    return kernels.reference_attention(q, k, v, **ids, **settings)


def value_and_gradients(fn, *arrays):
    def run(*arrays):
        value, vjp = jax.vjp(fn, *arrays)
        return value, vjp(
            ((jnp.arange(value.size) * 5 % 17 - 8) / 8).astype(value.dtype).reshape(value.shape)
        )

    return jax.jit(run)(*arrays)


def assert_equal(actual, expected, *, atol=1e-5):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=atol), actual, expected)


@pytest.fixture
def as_tpu(monkeypatch):
    """Make the choices for TPU, with the kernel in interpret mode."""
    monkeypatch.setattr(device_mesh, "platform", lambda: "tpu")
    monkeypatch.setattr(tpu, "attend", functools.partial(tpu.attend, interpret=True))


# TPU --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("length", "window", "softcap", "head_dim"),
    [(300, None, None, 64), (300, 70, None, 64), (256, 130, 5.0, 48)],
    ids=["a length that is no multiple of 128", "window", "soft-cap, window and an odd head"],
)
def test_splash_attention_equals_reference(as_tpu, length, window, softcap, head_dim):
    arrays, segments = inputs(length, head_dim=head_dim)
    settings = {"window": window, "scale": 0.1, "softcap": softcap}
    fused = functools.partial(kernels.self_attention, segment_ids=segments, **settings)
    expected = value_and_gradients(functools.partial(in_reference, segments=segments, **settings), *arrays)
    assert_equal(value_and_gradients(fused, *arrays), expected)


@pytest.mark.parametrize(
    ("window", "axes"),
    [(None, {"context": 4, "tensor": 2}), (200, {"context": 4, "tensor": 2}), (70, {"context": 2})],
)
def test_splash_attention_of_sharded_sequences_equals_reference(as_tpu, window, axes):
    """Gathered keys, and halos from two devices and from one.

    With 2 tensor devices and 3 kv heads, heads do not divide either.
    """
    arrays, segments = inputs(512, heads=6, kv_heads=3, rows=2, head_dim=16)
    mesh = make_mesh(MeshConfig(**{"data": 1, **axes}), jax.devices()[: int(np.prod(list(axes.values())))])
    settings = {"window": window, "scale": 0.2}
    expected = value_and_gradients(functools.partial(in_reference, segments=segments, **settings), *arrays)
    with jax.set_mesh(mesh):
        fused = functools.partial(kernels.self_attention, segment_ids=segments, **settings)
        assert_equal(value_and_gradients(fused, *arrays), expected)


SINKS = jnp.asarray([-1.0, 0.5, 1.0, 2.0])


@pytest.mark.parametrize(
    ("length", "window", "softcap", "axes"),
    [(300, 70, 5.0, {}), (512, None, None, {"context": 4, "tensor": 2})],
)
def test_splash_attention_with_sinks_equals_reference(as_tpu, length, window, softcap, axes):
    arrays, segments = inputs(length, head_dim=16)
    settings = {"window": window, "scale": 0.2, "softcap": softcap}

    def attend(implementation, q, k, v, sinks):
        return implementation(q, k, v, sinks=sinks, **settings)

    reference = functools.partial(attend, functools.partial(in_reference, segments=segments))
    fused = functools.partial(attend, functools.partial(kernels.self_attention, segment_ids=segments))
    expected = value_and_gradients(reference, *arrays, SINKS)
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    with jax.set_mesh(make_mesh(MeshConfig(**{"data": 1, **axes}), devices)):
        assert_equal(value_and_gradients(fused, *arrays, SINKS), expected)


def test_shards_that_the_kernel_cannot_take_are_refused(as_tpu):
    arrays, segments = inputs(4 * 136, rows=1)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, context=4), jax.devices()[:4])):
        with pytest.raises(ValueError, match="leave 136 to each: on TPU that must be a multiple of 128"):
            kernels.self_attention(*arrays, segment_ids=segments, window=None, scale=1.0)


def tpu_mesh(topology, **axes):
    from jax.experimental import topologies

    assert os.environ["TPU_SKIP_MDS_QUERY"] == "1", "set before jax was imported (conftest.py)"
    devices = topologies.get_topology_desc(topology, "tpu").devices
    return make_mesh(MeshConfig(**{"data": 1, **axes}), devices)


@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize(
    ("window", "softcap", "head_dim"), [(None, None, 64), (1024, 30.0, 64), (None, None, 128)]
)
def test_attention_compiles_for_tpu_with_its_gradient(window, softcap, head_dim):
    mesh = tpu_mesh("v5e:2x2", context=2, tensor=2)
    dims = jax.sharding.NamedSharding(mesh, jax.P(None, "context", "tensor"))
    shapes = [
        jax.ShapeDtypeStruct((1, 4096, count, head_dim), jnp.bfloat16, sharding=dims) for count in (8, 2, 2)
    ]
    segments = jax.ShapeDtypeStruct(
        (1, 4096), jnp.int32, sharding=jax.sharding.NamedSharding(mesh, jax.P(None, "context"))
    )
    sinks = (
        None
        if softcap is None
        else jax.ShapeDtypeStruct((8,), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, jax.P()))
    )

    def loss(q, k, v, sinks, segments):
        out = kernels.self_attention(
            q, k, v, segment_ids=segments, window=window, scale=0.125, softcap=softcap, sinks=sinks
        )
        return jnp.sum(out.astype(jnp.float32) ** 2)

    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(*shapes, sinks, segments).compile()
    kernel_calls = compiled.as_text().count('custom_call_target="tpu_custom_call"')
    assert kernel_calls >= 3  # forward, and the two of the backward pass
    assert ("collective-permute" in compiled.as_text()) == (window is not None)


@pytest.mark.usefixtures("libtpu")
def test_grouped_products_compile_for_tpu_with_their_gradient():
    mesh = tpu_mesh("v5e:2x2", data=4)
    replicated = jax.sharding.NamedSharding(mesh, jax.P())
    x, weights = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=replicated)
        for shape in ((2048, 256), (8, 256, 512))
    )
    sizes = jax.ShapeDtypeStruct((8,), jnp.int32, sharding=replicated)

    def loss(x, weights, sizes):
        return jnp.sum(kernels.grouped_matmul(x, weights, sizes).astype(jnp.float32) ** 2)

    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, weights, sizes).compile()
    assert compiled.cost_analysis()["flops"] > 0


# GPU --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("length", "window"), [(96, None), (96, 20), (1200, 100)])
def test_the_call_of_cudnn_equals_reference(monkeypatch, length, window):
    """The same call, run by the XLA implementation."""
    monkeypatch.setattr(device_mesh, "platform", lambda: "gpu")
    monkeypatch.setattr(gpu, "attend", functools.partial(gpu.attend, implementation="xla"))
    products.log_choice.cache_clear()
    arrays, segments = inputs(length, head_dim=8, rows=1, dtype=jnp.bfloat16)
    settings = {"window": window, "scale": 0.3}
    arrays32 = tuple(x.astype(jnp.float32) for x in arrays)
    expected = value_and_gradients(functools.partial(in_reference, segments=segments, **settings), *arrays32)
    actual = value_and_gradients(
        functools.partial(kernels.self_attention, segment_ids=segments, **settings), *arrays
    )
    for value, exact in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(value.astype(jnp.float32) - exact) < 0.01 * np.linalg.norm(exact)
    assert not np.any(actual[0][:, -9:])  # padding


def test_the_choice_is_logged_with_its_reason(caplog, monkeypatch):
    products.log_choice.cache_clear()
    half = {"window": None, "platform": "gpu", "dtype": jnp.bfloat16}
    with caplog.at_level("DEBUG", logger="slmjax.kernels"):
        chosen = attention.choose_attention(2048, **half)
        assert chosen.keywords["attend"] is attention._gpu_attention
        for unsupported in ({"softcap": 30.0}, {"has_sinks": True}, {"dtype": jnp.float32}):
            chosen = attention.choose_attention(2048, **half | unsupported)
            assert chosen.keywords["attend"] is kernels.reference_attention
        assert attention.choose_attention(2048, window=512, platform="tpu") is tpu.attend
        assert attention.choose_attention(64, window=None, platform="tpu") is not tpu.attend
        monkeypatch.setenv("SLMJAX_FUSED", "off")
        assert attention.choose_attention(2048, window=512, platform="tpu") is not tpu.attend
        assert attention.choose_attention(2048, **half).keywords["attend"] is kernels.reference_attention
    text = "\n".join(record.message for record in caplog.records)
    assert "attention over 2048 tokens, window None, heads of 64, bfloat16, on gpu: one block, cuDNN" in text
    assert "attention over 2048 tokens, window 512, heads of 64, float32, on tpu: splash attention" in text
