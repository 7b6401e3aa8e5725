"""GGUF blocks: the gguf package decodes packed blocks to the same values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.formats.blocks import CONTAINERS, container_for, pack, unpack
from slmjax.formats.coding import Encoded, encode
from slmjax.formats.presets import PRESETS
from slmjax.formats.spec import CodeGrid, Codes, Granularity, QuantSpec, ScaleType

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def any_codes(container: str, *, group_size: int) -> Encoded:
    """Return all codes of the container in two rows of 512, with scales of both signs and all sizes."""
    rng = np.random.default_rng(3)
    kind = CONTAINERS[container]
    codes = rng.integers(kind.lowest, kind.highest + 1, (2, 512)).astype(np.int8)
    exponents = rng.integers(-24, 15, (2, 512 // group_size))
    scale = (2.0**exponents).astype(np.float32)
    if container != "MXFP4":
        scale = (scale * rng.uniform(-2, 2, scale.shape)).astype(np.float16).astype(np.float32)
        scale[0, 0] = -0.0
    else:
        scale[0, 0] = 2.0**-127
    return Encoded(codes=codes, scale=scale)


@pytest.mark.parametrize("container", CONTAINERS)
def test_the_package_decodes_packed_blocks(container: str) -> None:
    import gguf

    kind = gguf.GGMLQuantizationType[container]
    assert gguf.GGML_QUANT_SIZES[kind] == (CONTAINERS[container].size, CONTAINERS[container].num_bytes)
    for group_size in {CONTAINERS[container].size, 256, 512}:
        encoded = any_codes(container, group_size=group_size)
        values = encoded.codes.astype(np.float32)
        if container == "MXFP4":
            values = np.concatenate([FP4, -FP4])[encoded.codes]
        expected = values * np.repeat(encoded.scale, group_size, axis=-1)
        raw = pack(encoded, container)
        np.testing.assert_array_equal(gguf.quants.dequantize(raw, kind), expected)
        unpacked = unpack(raw, container)
        np.testing.assert_array_equal(unpacked.codes, encoded.codes)
        blocks_of_a_group = group_size // CONTAINERS[container].size
        np.testing.assert_array_equal(
            unpacked.scale.view(np.uint32),
            np.repeat(encoded.scale, blocks_of_a_group, axis=-1).view(np.uint32),
        )
        np.testing.assert_array_equal(pack(unpacked, container), raw)


def test_one_block_by_hand() -> None:
    """Codes -8 to 7 twice with scale 1, 0x3C00: nibbles are the code plus 8, element 16 above element 0."""
    codes = np.tile(np.arange(-8, 8, dtype=np.int8), 2)[None]
    raw = pack(Encoded(codes=codes, scale=np.ones((1, 1), np.float32)), "Q4_0")
    np.testing.assert_array_equal(raw, [[0x00, 0x3C, *(17 * i for i in range(16))]])


def test_a_stack_of_weights() -> None:
    """Leading dims stay; a scale for the tensor is repeated in every block."""
    x = jnp.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 64)
    spec = QuantSpec(bits=4, granularity=Granularity.PER_TENSOR, divisor=7.0, scale_type=ScaleType.FLOAT16)
    encoded, shared = jax.jit(lambda x: (encode(x, PRESETS["q8_0"]), encode(x, spec)))(x)
    raw = pack(encoded, "Q8_0")
    assert raw.shape == (2, 3, 68)
    np.testing.assert_array_equal(
        raw[1, 2], pack(Encoded(codes=encoded.codes[1, 2], scale=encoded.scale[1, 2]), "Q8_0")
    )
    assert shared.scale.shape == (1, 1, 1)
    np.testing.assert_array_equal(
        unpack(pack(shared, "Q4_0"), "Q4_0").scale, np.broadcast_to(shared.scale, (2, 3, 2))
    )


@pytest.mark.parametrize(
    ("name", "width", "container"),
    [
        ("q4_0", None, "Q4_0"),
        ("int4_g32", None, "Q4_0"),
        ("w4a16_g128", None, "Q4_0"),
        ("stretched2_g32", None, "Q4_0"),
        ("binary_row", None, "Q4_0"),
        ("int5_g32", None, "Q8_0"),
        ("int8_row", None, "Q8_0"),
        ("ternary_g256", None, "TQ2_0"),
        ("ternary_row", None, "Q4_0"),  # not every row is a multiple of 256
        ("ternary_row", 512, "TQ2_0"),
        ("ternary_row", 576, "Q4_0"),
        ("mxfp4", None, "MXFP4"),
    ],
)
def test_the_smallest_container(name: str, width: int | None, container: str) -> None:
    assert container_for(PRESETS[name], width=width) == container


@pytest.mark.parametrize(
    ("spec", "width", "message"),
    [
        (PRESETS["torchao_int8_token"], None, "torchao_int8_token has zero points"),
        (dataclasses.replace(PRESETS["q4_0"], group_size=16), None, "shares a scale among 16 elements"),
        (PRESETS["ternary_row"], 40, "shares a scale among 40 elements"),
        (PRESETS["mxfp8_e4m3"], None, "mxfp8_e4m3 has e4m3 codes with e8m0 scales"),
        (PRESETS["nvfp4"], None, "nvfp4 shares a scale among 16 elements"),
        (
            dataclasses.replace(PRESETS["mxfp4"], scale_type=ScaleType.FLOAT16),
            None,
            "e2m1 codes with float16 scales",
        ),
    ],
)
def test_no_container(spec: QuantSpec, width: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        container_for(spec, width=width)


def filled(codes: int, scale: float, *, groups: int = 1, width: int = 32) -> Encoded:
    return Encoded(codes=np.full((1, width), codes, np.int8), scale=np.full((1, groups), scale, np.float32))


@pytest.mark.parametrize(
    ("encoded", "container", "message"),
    [
        (filled(1, 0.1), "Q4_0", r"1 of 1 scales are not float16 values.*0\.1"),
        (filled(1, np.inf), "Q8_0", "are not float16 values"),
        (filled(1, np.nan), "Q8_0", "are not float16 values"),
        (filled(1, 65536.0), "Q8_0", "are not float16 values"),
        (filled(8, 1.0), "Q4_0", "codes from 8 to 8 do not fit Q4_0, which has -8 to 7"),
        (filled(2, 1.0, width=256), "TQ2_0", "do not fit TQ2_0"),
        (filled(1, 3.0), "MXFP4", "are not powers of two"),
        (filled(1, -2.0), "MXFP4", "are not powers of two"),
        (filled(1, 0.0), "MXFP4", "are not powers of two"),
        (filled(1, np.inf), "MXFP4", "are not powers of two"),
        (filled(1, 1.0, width=48), "Q4_0", "rows of 48 elements in groups of 48 do not fit Q4_0"),
        (filled(1, 1.0, groups=2, width=32), "Q4_0", "rows of 32 elements in groups of 16"),
        (filled(1, 1.0, width=576), "TQ2_0", "rows of 576 elements"),
        (
            dataclasses.replace(filled(1, 1.0), zero=np.zeros((1, 1), np.int32)),
            "Q4_0",
            "neither zero points nor a second scale",
        ),
        (filled(1, 1.0), "Q4_K", "unknown container 'Q4_K'"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(encoded: Encoded, container: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(encoded, container)


def test_an_incomplete_row_is_refused() -> None:
    with pytest.raises(ValueError, match="a row of 19 bytes is not a multiple of Q4_0's blocks of 18"):
        unpack(np.zeros((1, 19), np.uint8), "Q4_0")


def test_every_integer_format_of_presets_packs() -> None:
    """With float16 scales, whatever rule chose them."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 256)), jnp.float32)
    chosen = {
        name: s
        for name, s in PRESETS.items()
        if s.scale_type is ScaleType.FLOAT16 and s.grid in (CodeGrid.INTEGER, CodeGrid.ODD)
    }
    assert len(chosen) > 10
    for name, encoded in jax.jit(lambda x: {key: encode(x, spec) for key, spec in chosen.items()})(x).items():
        container = container_for(chosen[name], width=256)
        np.testing.assert_array_equal(
            unpack(pack(encoded, container), container).codes, encoded.codes, err_msg=name
        )
    full = QuantSpec(bits=8, codes=Codes.FULL, group_size=32, divisor=128.0, scale_type=ScaleType.FLOAT16)
    assert container_for(full) == "Q8_0"
