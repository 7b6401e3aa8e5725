"""The TPU kernel for rounding in groups equals the format's definition, in interpret mode and compiled."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax import kernels
from slmjax.formats.coding import fake_quant
from slmjax.formats.presets import PRESETS, preset
from slmjax.kernels import rounding
from slmjax.models.ffn import moe
from slmjax.models.ffn.mlp import Activation
from slmjax.parallel import mesh as device_mesh
from slmjax.parallel.mesh import MeshConfig, make_mesh
from slmjax.quantization import activations
from slmjax.quantization.assignment import TensorQuant
from slmjax.quantization.estimators import LearnedClip, StraightThrough
from tests.kernels.test_fused_attention import tpu_mesh

KINDS = tuple(
    name
    for name, spec in PRESETS.items()
    if kernels.can_round_groups(spec, width=256, platform="tpu", dtype=jnp.bfloat16)
)
# A width that is a multiple of the lanes, and one that is not; more rows than a block, and fewer than are
# transposed at a time.
SHAPES = ((2200, 256), (70, 192))


@pytest.fixture
def as_tpu(monkeypatch):
    monkeypatch.setattr(device_mesh, "platform", lambda: "tpu")
    monkeypatch.setattr(kernels, "round_groups", functools.partial(rounding.round_groups, interpret=True))


def tensor_quant(name, estimator=None):
    return TensorQuant(spec=preset(name), estimator=estimator or StraightThrough(), axis=-1)


def random_values(*shape, dtype=jnp.bfloat16):
    """Values of all magnitudes, a row of zeros, and two values that are not finite."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=shape) * 2.0 ** draw.integers(-20, 10, shape[:-1])[..., None]
    x[..., 1, :] = 0
    x[..., 2, 0] = np.inf
    x[..., 3, 5] = np.nan
    return jnp.asarray(x, dtype)


def test_the_formats_that_it_supports():
    assert {"q8_0", "mxfp8_e4m3", "mxfp4", "int4_g32"} <= set(KINDS)
    # Another statistic, two scales, a scale per row, wide groups.
    assert not {"q4_0", "nvfp4", "torchao_int8_token", "tq2_0"} & set(KINDS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_equals_the_definition(shape):
    x = random_values(*shape, dtype=jnp.float32 if shape[0] < 100 else jnp.bfloat16)
    names = [name for name in KINDS if shape[-1] % PRESETS[name].group_size == 0]
    run = jax.jit(
        lambda x: (
            {name: kernels.round_groups(x, PRESETS[name], interpret=True) for name in names},
            {name: fake_quant(x, PRESETS[name]).astype(x.dtype) for name in names},
        )
    )
    rounded, expected = run(x)
    for name in names:
        assert rounded[name].dtype == x.dtype
        np.testing.assert_array_equal(
            np.asarray(rounded[name], np.float32), np.asarray(expected[name], np.float32), err_msg=name
        )


@pytest.mark.parametrize("dim", [None, "ffn"])
def test_on_a_mesh_it_equals_one_device_with_the_gradient_of_the_identity(as_tpu, monkeypatch, dim):
    calls = []
    kernel = kernels.round_groups
    monkeypatch.setattr(kernels, "round_groups", lambda x, spec: calls.append(x.shape) or kernel(x, spec))
    x = random_values(4, 16, 256)
    quantizer = activations.ActivationQuantizer(tensor_quant("q8_0"), dim=dim)
    mesh = make_mesh(MeshConfig(data=2, context=2, tensor=2))
    with jax.set_mesh(mesh):
        y, vjp_fn = jax.vjp(jax.jit(lambda x: quantizer(x)), x)
    assert set(calls) == {(16, 128 if dim else 256)}, "a device has half of the sequences and of the tokens"
    expected = jax.jit(lambda x: fake_quant(x, PRESETS["q8_0"]).astype(x.dtype))(x)
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(expected, np.float32))
    np.testing.assert_array_equal(vjp_fn(jnp.ones_like(y))[0], jnp.ones_like(x))


@pytest.mark.parametrize(
    ("width", "group", "tensor", "is_used"),
    [(256, 32, 4, True), (96, 32, 2, False), (100, 4, 8, True)],
    ids=["sharded", "split groups", "replicated"],
)
def test_it_is_not_used_where_devices_would_hold_parts_of_groups(
    as_tpu, monkeypatch, width, group, tensor, is_used
):
    """Half of 96 is no multiple of 32; 100 does not divide over 8 devices and is replicated."""
    calls = []
    monkeypatch.setattr(kernels, "round_groups", lambda x, spec: calls.append(x.shape) or x)
    quant = TensorQuant(
        spec=dataclasses.replace(preset("q8_0"), group_size=group), estimator=StraightThrough(), axis=-1
    )
    with jax.set_mesh(make_mesh(MeshConfig(data=1, tensor=tensor), jax.devices()[:tensor])):
        y = activations.ActivationQuantizer(quant, dim="ffn")(random_values(2, 8, width))
    assert y.shape == (2, 8, width) and bool(calls) == is_used


def test_it_is_for_straight_through_only_and_can_be_turned_off(as_tpu, monkeypatch):
    monkeypatch.setattr(kernels, "round_groups", lambda x, spec: pytest.fail("used"))
    x = random_values(2, 8, 64)
    activations.ActivationQuantizer(tensor_quant("torchao_int8_token"))(x)
    learned = {"log_scale": jnp.float32(-3.0)}
    tensor_wide = dataclasses.replace(
        preset("int8_g32"), granularity=preset("int8_row").granularity, group_size=None
    )
    learner = TensorQuant(spec=tensor_wide, estimator=LearnedClip(), axis=-1)
    activations.ActivationQuantizer(learner, learned=learner, params=learned)(x)
    monkeypatch.setenv("SLMJAX_FUSED", "off")
    activations.ActivationQuantizer(tensor_quant("q8_0"))(x)


@pytest.mark.usefixtures("libtpu")
def test_it_compiles_for_tpu_and_reads_its_input_once():
    mesh = tpu_mesh("v5e:2x2", fsdp=2, tensor=2)
    sharding = jax.sharding.NamedSharding(mesh, jax.P("fsdp", None, "tensor"))
    shape = jax.ShapeDtypeStruct((4, 1024, 512), jnp.bfloat16, sharding=sharding)

    def program(x):
        return [
            activations.ActivationQuantizer(tensor_quant(name), dim="ffn")(x)
            for name in ("q8_0", "mxfp8_e4m3", "mxfp4")
        ]

    with jax.set_mesh(mesh):
        compiled = jax.jit(program).lower(shape).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3
    shard_bytes = 4 * 1024 * 512 * 2 // 4  # on each of the 4 devices
    assert compiled.cost_analysis()["bytes accessed"] < 3 * 2 * shard_bytes * 1.25


@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize("capacity", [None, 8])
def test_the_hidden_layer_of_experts_compiles_with_its_gradient(capacity):
    """Inside `shard_map`, where the kernel must declare over which mesh axes its result varies."""
    mesh = tpu_mesh("v5e:2x2", fsdp=2, tensor=2)
    replicated = jax.sharding.NamedSharding(mesh, jax.P())
    shapes = [
        ((4, 8, 128), jnp.bfloat16),
        ((4, 8, 2), jnp.float32),
        ((4, 8, 2), jnp.int32),
        ((4, 128, 256), jnp.bfloat16),
        ((4, 128, 256), jnp.bfloat16),
        ((4, 256, 128), jnp.bfloat16),
    ]
    args = [jax.ShapeDtypeStruct(shape, dtype, sharding=replicated) for shape, dtype in shapes]

    def loss(x, weights, experts, gate, up, down):
        routing = moe.Routing(
            weights=weights, experts=experts, probabilities=jnp.ones((*experts.shape[:2], 4))
        )
        hidden_quantizer = activations.ShardActivationQuantizer(tensor_quant("q8_0"), dim="ffn")
        y = moe.apply_experts(
            x,
            routing,
            gate=gate,
            up=up,
            down=down,
            activation=Activation.SILU,
            capacity=capacity,
            hidden_quantizer=hidden_quantizer,
        )
        return jnp.sum(y.astype(jnp.float32) ** 2)

    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 3, 4, 5))).lower(*args).compile()
    assert "tpu_custom_call" in compiled.as_text()
