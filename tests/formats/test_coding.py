"""Codes and scales: values worked out by hand, and properties of every format."""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from slmjax.formats.coding import Encoded, decode, encode, expanded, fake_quant, scale_of
from slmjax.formats.presets import PRESETS, preset
from slmjax.formats.spec import CodeGrid, Granularity, QuantSpec, ScaleType, Statistic, levels
from tests.formats.make_golden import GOLDEN

with np.load(GOLDEN / "numbers.npz") as _file:
    VALUES = _file["x"]
# Formats whose rule computes the same scale again from its own output. The others change it: absmax / 7.5 of
# codes that end at 7, a mean magnitude of rounded values, a second scale.
IDEMPOTENT = (
    "q4_0",
    "q8_0",
    "tq2_0",
    "onnx_int4_b32",
    "mxfp4",
    "mxfp4_gguf",
    "mxfp8_e4m3",
    "mxfp8_e5m2",
    "binary_g32",
    "binary_row",
    *(f"int{bits}_g32" for bits in range(2, 9)),
    *(f"litert_int4_b{size}" for size in (32, 64, 128, 256)),
)


def group(*values: float, size: int = 32) -> jax.Array:
    """Return a group that begins with these values and continues with zeros."""
    return jnp.zeros(size).at[: len(values)].set(jnp.array(values))


def codes(name: str, *values: float, size: int = 32) -> tuple[list[int], float]:
    """Return the codes of these values at the start of a group, and the group's scale."""
    encoded = encode(group(*values, size=size), PRESETS[name])
    return [int(code) for code in encoded.codes[: len(values)]], float(encoded.scale[0])


FLOATS = {
    CodeGrid.E2M1: ml_dtypes.float4_e2m1fn,
    CodeGrid.E4M3: ml_dtypes.float8_e4m3fn,
    CodeGrid.E5M2: ml_dtypes.float8_e5m2,
}


# By hand ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "values", "expected", "scale"),
    [
        # The largest magnitude has code -8, with either sign; ties go up from the lowest code on.
        ("q4_0", (-8, 7, 0.5, -0.5, 2.4), [-8, 7, 1, 0, 2], 1.0),
        ("q4_0", (8, -7, 0.5, -0.5, 2.4), [-8, 7, 0, 1, -2], -1.0),
        ("q4_0", (-4, 4), [-8, 7], 0.5),  # the first of two
        ("q4_0", (4, -4), [-8, 7], -0.5),
        ("onnx_int4_b32", (4, -4), [7, -8], 0.5),  # the negative one
        ("q8_0", (-127, 2.5, -2.5, 0.49), [-127, 3, -3, 0], 1.0),
        ("tq2_0", (2, 1, -1, 0.99), [1, 1, -1, 0], 2.0),
        ("w4a16_g32", (-7.5, 7.5, 2.5, 3.5), [-8, 7, 2, 4], 1.0),  # -7.5 to the even code
        ("int4_g32", (7, -7, 2.5, -1.2), [7, -7, 2, -1], 1.0),
        ("int2_g32", (1, 0.4, -0.6), [1, 0, -1], 1.0),
        ("litert_int4_b32", (7 * 1.0078125, -3.1), [7, -3], 1.0078125),  # a bfloat16
        ("stretched2_g32", (4, 0.1, -0.1, 1.9, 2.1, -2.1), [3, 1, -1, 1, 3, -3], 1.0),
        ("stretched_ternary_g256", (3, 0.9, 1.1, -1.1), [1, 0, 1, -1], 2.0),
        ("mxfp4", (6, 5, 2.5, 0.25, -0.75, -0.1), [7, 6, 4, 0, 10, 8], 1.0),  # ties to even, and -0 stays
        ("mxfp4_gguf", (6, 5, 3.5, 1.75, -0.75, -0.1), [7, 6, 5, 3, 9, 0], 1.0),  # ties towards zero, no -0
        ("mxfp4", (7.9, 0.5), [7, 1], 1.0),  # above the largest
        ("mxfp8_e4m3", (448, 1, -0.001953125), [0x7E, 0x38, -0x7F], 1.0),  # the smallest is 2**-9
        ("mxfp8_e5m2", (57344, 1, -1), [0x7B, 0x3C, 0x3C - 128], 1.0),
    ],
)
def test_worked_codes(name: str, values: tuple[float, ...], expected: list[int], scale: float) -> None:
    assert codes(name, *values, size=256 if "256" in name or name == "tq2_0" else 32) == (expected, scale)


def test_means() -> None:
    """Mean magnitudes: a sum of 8 over 4 values is 2; values below half of that are rounded to zero."""
    ternary = dataclasses.replace(PRESETS["ternary_g256"], group_size=4)
    encoded = encode(jnp.array([5.0, -1.1, 0.9, 1.0]), ternary)
    np.testing.assert_array_equal(encoded.codes, [1, -1, 0, 0])  # exactly half is even
    np.testing.assert_array_equal(encoded.scale, [2.0])
    binary = encode(jnp.array([5.0, -1.0, 0.0, -2.0] * 8), PRESETS["binary_g32"])
    np.testing.assert_array_equal(binary.codes[:4], [1, -1, 1, -1])
    np.testing.assert_array_equal(binary.scale, [2.0])


def test_zero_points() -> None:
    """The range from -1 to 254 in 256 codes has steps of 1, and 0 has the second-lowest code."""
    encoded = encode(jnp.array([-1.0, 254.0, 3.4, 0.0]), PRESETS["torchao_int8_token"])
    np.testing.assert_array_equal(encoded.codes, [-128, 127, -124, -127])
    assert encoded.zero is not None
    np.testing.assert_array_equal(encoded.zero, [-127])
    np.testing.assert_array_equal(decode(encoded, PRESETS["torchao_int8_token"]), [-1, 254, 3, 0])


def test_two_levels() -> None:
    """The largest value is 2688 = 6 * 448: the tensor scale is 1, block scales are 448, and 1 up to 6."""
    x = jnp.concatenate([group(2688.0, 448.0, size=16), group(6.0, 0.5, size=16), jnp.zeros(16)])
    encoded, doubled = jax.jit(lambda x: (encode(x, PRESETS["nvfp4"]), scale_of(2 * x, PRESETS["nvfp4"])))(x)
    assert encoded.tensor_scale == 1.0
    np.testing.assert_array_equal(encoded.scale, [448, 1, 2.0**-6])
    np.testing.assert_array_equal(encoded.codes[jnp.array([0, 1, 16, 17])], [7, 2, 7, 1])
    np.testing.assert_array_equal(doubled, [896, 2, 2.0**-5])


def test_per_tensor() -> None:
    spec = QuantSpec(bits=4, granularity=Granularity.PER_TENSOR, divisor=7.0)
    encoded = encode(jnp.array([[7.0, 1.0], [-2.6, 0.0]]), spec)
    np.testing.assert_array_equal(encoded.codes, [[7, 1], [-3, 0]])
    np.testing.assert_array_equal(encoded.scale, [[1.0]])
    with pytest.raises(ValueError, match="SIGNED_MAX is for groups and channels"):
        encode(jnp.ones((2, 2)), dataclasses.replace(spec, statistic=Statistic.SIGNED_MAX))


def test_expanded() -> None:
    np.testing.assert_array_equal(expanded(jnp.array([[1.0, 2.0]]), 4), [[1, 1, 2, 2]])
    np.testing.assert_array_equal(expanded(jnp.array([[1.0], [2.0]]), 4, axis=-2), [[1], [1], [2], [2]])
    np.testing.assert_array_equal(expanded(jnp.array([[3.0]]), 2), [[3, 3]])


@pytest.mark.parametrize(
    ("scale", "stored"),
    [
        (0.1, float(np.float16(0.1))),
        (65519.0, 65504.0),
        (65520.0, np.inf),
        (2.0**-14, 2.0**-14),
        (2.0**-15 + 2.0**-24, 2.0**-15 + 2.0**-24),  # below the normal values
        (3.3e-8, 2.0**-24),
        (2.9e-8, 0.0),
    ],
)
def test_float16_scales(scale: float, stored: float) -> None:
    spec = PRESETS["int8_g32"]
    assert float(encode(group(), spec, scale=jnp.array([scale])).scale[0]) == stored


def test_other_scales() -> None:
    for kind, scale, stored in (
        (ScaleType.BFLOAT16, 1.00390625 + 1e-6, 1.0078125),
        (ScaleType.BFLOAT16, 1.00390625, 1.0),
        (ScaleType.BFLOAT16_IN_FLOAT16, 2.0**-25, 0.0),
        (ScaleType.E8M0, 0.7, 0.5),
        (ScaleType.E8M0, 0.0, 2.0**-127),
    ):
        spec = QuantSpec(bits=4, group_size=32, scale_type=kind)
        # Compared by bits: the last is subnormal, and float comparisons flush it to zero.
        result = np.asarray(encode(group(), spec, scale=jnp.array([scale])).scale)
        assert result.view(np.uint32) == np.float32(stored).view(np.uint32), (kind, scale)


def test_all_float16_scales() -> None:
    """Every float16 is stored exactly; values between two round as in NumPy's conversion."""
    exact = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middle = (exact[1:] + exact[:-1]) / 2
    scales = np.concatenate(
        [exact, middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(1e6))]
    )
    spec = QuantSpec(bits=8, granularity=Granularity.PER_CHANNEL, scale_type=ScaleType.FLOAT16)
    encoded = jax.jit(lambda scale: encode(jnp.zeros((scale.size, 1)), spec, scale=scale))(scales[:, None])
    np.testing.assert_array_equal(encoded.scale[:, 0], scales.astype(np.float16).astype(np.float32))


# Properties of every format ---------------------------------------------------------------------------------
# One format of each rule, for tests where the group size and the number of bits make no difference.
KINDS = (
    "q4_0",
    "q8_0",
    "torchao_int8_token",
    "w4a16_g128",
    "litert_int8_row",
    "litert_int4_b32",
    "onnx_int4_b32",
    "mxfp4_gguf",
    "mxfp8_e4m3",
    "nvfp4",
    "int3_g32",
    "ternary_row",
    "stretched2_g32",
    "binary_g32",
)


def results_of(
    x: jax.Array, axis: int, names: Iterable[str]
) -> dict[str, tuple[Encoded, jax.Array, jax.Array]]:
    """Return codes and scales, decoded values, and the values of `fake_quant`."""
    specs = {name: PRESETS[name] for name in names}
    return {
        name: (
            encoded := encode(x, spec, axis=axis),
            decode(encoded, spec, axis=axis),
            fake_quant(x, spec, axis=axis),
        )
        for name, spec in specs.items()
    }


@pytest.fixture(scope="module")
def results() -> dict[str, tuple[Encoded, jax.Array, jax.Array]]:
    return jax.jit(lambda x: results_of(x, -1, PRESETS))(VALUES)


def decoded_by_numpy(encoded: Encoded, spec: QuantSpec) -> np.ndarray:
    """Decode with NumPy, and with ml_dtypes where codes are bit patterns."""
    values = np.asarray(encoded.codes)
    if spec.grid in FLOATS:
        values = values.view(FLOATS[spec.grid])
    values = values.astype(np.float32).reshape(*encoded.scale.shape, -1)
    if encoded.zero is not None:
        values -= np.asarray(encoded.zero, np.float32)[..., None]
    scale = np.asarray(encoded.scale)
    scale = scale if encoded.tensor_scale is None else np.float32(encoded.tensor_scale) * scale
    return (values * scale[..., None]).reshape(encoded.codes.shape)


def test_codes_represent_levels(results: dict[str, tuple[Encoded, jax.Array, jax.Array]]) -> None:
    """Decoded values are levels times scales, codes are int8, and `fake_quant` gives the same values."""
    scales = jax.jit(lambda x: {name: scale_of(x, spec) for name, spec in PRESETS.items()})(VALUES)
    for name, (encoded, decoded, direct) in results.items():
        spec = PRESETS[name]
        assert encoded.codes.dtype == jnp.int8, name
        assert encoded.scale.dtype == decoded.dtype == direct.dtype == jnp.float32, name
        assert encoded.scale.shape == (*VALUES.shape[:-1], spec.groups(256)), name
        np.testing.assert_array_equal(decoded, direct, err_msg=name)
        both = encoded.scale if encoded.tensor_scale is None else encoded.scale * encoded.tensor_scale
        np.testing.assert_array_equal(scales[name], both, err_msg=name)
        np.testing.assert_array_equal(decoded, decoded_by_numpy(encoded, spec), err_msg=name)
        if spec.grid not in FLOATS:
            assert set(np.unique(encoded.codes)) <= set(levels(spec)), name


def test_encoding_decoded_values_with_the_same_scale_gives_the_same_codes(
    results: dict[str, tuple[Encoded, jax.Array, jax.Array]],
) -> None:
    """This holds where the scale is not zero."""
    scales = jax.jit(lambda x: {name: scale_of(x, PRESETS[name]) for name in KINDS})(VALUES)
    inputs = {name: (results[name][1], scales[name], results[name][0].tensor_scale) for name in KINDS}
    again = jax.jit(
        lambda inputs: {n: encode(x, PRESETS[n], scale=s, tensor_scale=t) for n, (x, s, t) in inputs.items()}
    )(inputs)
    for name, encoded in again.items():
        first = results[name][0]
        np.testing.assert_array_equal(encoded.scale, first.scale, err_msg=name)
        has_scale = np.repeat(np.abs(first.scale) >= 2.0**-126, 256 // first.scale.shape[-1], axis=-1)
        if PRESETS[name].grid is CodeGrid.E2M1:
            has_scale &= np.asarray(first.codes) != 8  # -0 decodes to -0, which encodes as 0 or -0
        np.testing.assert_array_equal(
            np.where(has_scale, encoded.codes, 0), np.where(has_scale, first.codes, 0), err_msg=name
        )


def test_idempotent(results: dict[str, tuple[Encoded, jax.Array, jax.Array]]) -> None:
    again = jax.jit(lambda inputs: {name: fake_quant(x, PRESETS[name]) for name, x in inputs.items()})(
        {n: results[n][2] for n in IDEMPOTENT}
    )
    for name, x in again.items():
        # A subnormal float16 scale is too coarse for the largest value to get the largest code.
        scale = np.repeat(np.abs(results[name][0].scale), 256 // results[name][0].scale.shape[-1], axis=-1)
        is_normal = (scale >= 2.0**-14) | (scale == 0) | (PRESETS[name].scale_type is ScaleType.E8M0)
        np.testing.assert_array_equal(
            np.where(is_normal, x, 0), np.where(is_normal, results[name][2], 0), err_msg=name
        )


def test_any_axis(results: dict[str, tuple[Encoded, jax.Array, jax.Array]]) -> None:
    """Groups along another axis, after leading dims, equal those of the transposed array."""
    stacked = jnp.stack([jnp.asarray(VALUES).T] * 2)  # experts, in, out
    for name, (encoded, decoded, direct) in jax.jit(jax.vmap(lambda x: results_of(x, -2, KINDS)))(
        stacked
    ).items():
        for ours, expected in (
            (encoded.codes, results[name][0].codes),
            (encoded.scale, results[name][0].scale),
            (decoded, results[name][1]),
        ):
            np.testing.assert_array_equal(ours[1], expected.T, err_msg=name)
        np.testing.assert_array_equal(direct[0], decoded[0], err_msg=name)
    leading = jax.jit(lambda x: encode(x, PRESETS["q4_0"], axis=1))(stacked)
    np.testing.assert_array_equal(leading.codes[1], results["q4_0"][0].codes.T)
    with pytest.raises(ValueError, match="axis is 2, but the array has 2 dims"):
        encode(jnp.ones((32, 32)), PRESETS["q4_0"], axis=2)


@pytest.mark.parametrize("spec", [PartitionSpec("d"), PartitionSpec(None, "d")])
def test_sharded_over_devices(spec: PartitionSpec) -> None:
    """Rows or groups sharded over 8 devices give the same bits, without communication between them."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    x = jnp.asarray(np.tile(VALUES[[0, 1, 2, 3, 4, 6, 8, 9]], 2))
    sharded = jax.device_put(x, NamedSharding(mesh, spec))
    program = jax.jit(lambda x: results_of(x, -1, KINDS))
    single = program(x)
    for name, encoded in program(sharded).items():
        for ours, expected in zip(jax.tree.leaves(encoded), jax.tree.leaves(single[name]), strict=True):
            if PRESETS[name].statistic is Statistic.ABSMEAN and spec[0] is None:
                # A sum of partial sums may differ in the last bit.
                np.testing.assert_allclose(ours, expected, rtol=1e-6, err_msg=name)
            else:
                np.testing.assert_array_equal(ours, expected, err_msg=name)
    text = jax.jit(lambda x: fake_quant(x, PRESETS["q4_0"])).lower(sharded).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text and "collective-permute" not in text


def test_zeros_stay(results: dict[str, tuple[Encoded, jax.Array, jax.Array]]) -> None:
    """The eighth row is zero, and decodes to zero; formats without a zero level have a scale of zero."""
    for name, (_, decoded, _) in results.items():
        np.testing.assert_array_equal(decoded[7], 0, err_msg=name)


def test_subnormal_values() -> None:
    """They count as zero, and cause no division by zero."""
    rows = np.tile(np.array([[1e-38], [1e-39], [-1e-42]], np.float32), 512)
    for name, (_, decoded, direct) in jax.jit(lambda x: results_of(x, -1, KINDS))(rows).items():
        assert np.abs(decoded).max() < 1.2e-38, name
        np.testing.assert_array_equal(decoded, direct, err_msg=name)


def test_other_dtypes(results: dict[str, tuple[Encoded, jax.Array, jax.Array]]) -> None:
    """The values of the fourth row fit 8 bits; every dtype is encoded in float32."""
    for dtype in (jnp.bfloat16, jnp.float16):
        row = jax.jit(lambda x: results_of(x, -1, ("q4_0", "q8_0")))(jnp.asarray(VALUES[3], dtype))
        for name, (encoded, _, direct) in row.items():
            np.testing.assert_array_equal(encoded.codes, results[name][0].codes[3])
            np.testing.assert_array_equal(direct, results[name][2][3])


def test_with_a_scale_from_the_caller_nan_does_not_spread() -> None:
    x = jnp.array([1.0, jnp.nan, jnp.inf, -jnp.inf] + [0.0] * 28)
    rounded = jax.jit(lambda x: fake_quant(x, PRESETS["q4_0"], scale=jnp.ones(1)))(x)
    np.testing.assert_array_equal(rounded[:5], [1, np.nan, 7, -8, 0])


def test_errors_of_widths_name_the_format() -> None:
    with pytest.raises(
        ValueError, match=r"axis 1 of an array of shape \(2, 576\) is 576 wide, which tq2_0 cannot hold"
    ):
        encode(jnp.ones((2, 576)), PRESETS["tq2_0"])


def test_values_that_are_not_finite_are_not_hidden() -> None:
    """A group with NaN or an infinity decodes to no finite value, and its neighbours do not change."""
    x = np.tile(VALUES[0], 2)
    rows = np.tile(x, (4, 1))
    rows[1:, 37] = np.nan, np.inf, -np.inf
    specs = {name: PRESETS[name] for name in KINDS if not PRESETS[name].is_two_level}
    by_rule = jax.jit(lambda x: {name: decode(encode(x, spec), spec) for name, spec in specs.items()})(rows)
    ones = jnp.ones((4, 512))
    by_scale = jax.jit(
        lambda x: {name: decode(encode(x, s, scale=scale_of(ones, s)), s) for name, s in specs.items()}
    )(rows)
    for by_name in (by_rule, by_scale):
        for name, decoded in by_name.items():
            size = specs[name].group_size or 512
            same_group = np.arange(512) // size == 37 // size
            assert not np.isfinite(np.asarray(decoded)[1:, same_group]).any(), name
            np.testing.assert_array_equal(
                decoded[1:, ~same_group], np.tile(decoded[0, ~same_group], (3, 1)), err_msg=name
            )
            assert np.isfinite(decoded[0]).all(), name
    # The second scale belongs to the whole tensor.
    assert not np.isfinite(jax.jit(lambda x: fake_quant(x, PRESETS["nvfp4"]))(rows)).any()


def test_only_a_scale_from_the_caller_has_a_gradient() -> None:
    x = jnp.asarray(VALUES[0])
    scale = jnp.array([0.01])
    loss = lambda x, s: jnp.sum(fake_quant(x, PRESETS["litert_int4_row"], scale=s))  # noqa: E731
    by_x, by_scale = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, scale)
    np.testing.assert_array_equal(by_x, 0)
    np.testing.assert_allclose(
        by_scale, np.clip(np.round(VALUES[0] / np.float32(0.01)), -8, 7).sum(), rtol=1e-6
    )


def test_a_second_scale_is_refused_by_formats_without_one() -> None:
    with pytest.raises(ValueError, match="a format that has no second scale"):
        encode(group(), preset("q4_0"), tensor_scale=jnp.float32(1))


# Any values -------------------------------------------------------------------------------------------------

FINITE = st.floats(-1000, 1000, width=32).filter(lambda x: x == 0 or abs(x) > 1e-30)
PROPERTY_SPECS = {
    name: PRESETS[name]
    for name in ("q4_0", "q8_0", "w4a16_g32", "int3_g32", "stretched2_g32", "mxfp4", "onnx_int4_b32")
}


@jax.jit
def encoded_and_decoded(x: jax.Array) -> dict[str, tuple[Encoded, jax.Array]]:
    return {
        name: (encoded := encode(x, spec), decode(encoded, spec)) for name, spec in PROPERTY_SPECS.items()
    }


@settings(max_examples=25, deadline=None)
@given(arrays(np.float32, 32, elements=FINITE))
def test_no_level_is_nearer(x: np.ndarray) -> None:
    """Every value goes to a nearest level of its group, up to rounding of float32 and of a float16 scale."""
    for name, (encoded, decoded) in encoded_and_decoded(x).items():
        scale = float(encoded.scale[0])
        lattice = levels(PROPERTY_SPECS[name]).astype(np.float64) * scale
        best = np.abs(x[:, None].astype(np.float64) - lattice).min(-1)
        error = np.abs(x.astype(np.float64) - np.asarray(decoded))
        # GGUF computes codes with the scale before it is rounded.
        slack = 2.0**-22 * abs(scale) + np.abs(x) * (2.0**-9 if name in ("q4_0", "q8_0") else 2.0**-22)
        assert (error <= best + slack).all(), name


@settings(max_examples=25, deadline=None)
@given(arrays(np.float32, 32, elements=FINITE), st.integers(-8, 8))
def test_powers_of_two_only_move_the_scale(x: np.ndarray, exponent: int) -> None:
    """Formats with float32 or power-of-two scales do not depend on the absolute magnitude."""
    factor = np.float32(2.0**exponent)
    first = encoded_and_decoded(x)
    second = encoded_and_decoded(x * factor)
    for name in ("onnx_int4_b32", "mxfp4"):
        np.testing.assert_array_equal(first[name][0].codes, second[name][0].codes)
        np.testing.assert_array_equal(first[name][1] * factor, second[name][1])
