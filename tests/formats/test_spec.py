"""Formats as data: their levels, their sizes, and the settings that are refused."""

import dataclasses

import numpy as np
import pytest

from slmjax.config import ConfigError, from_json, to_json
from slmjax.formats.presets import PRESETS, name_of, preset
from slmjax.formats.spec import (
    CodeGrid,
    Codes,
    Granularity,
    QuantSpec,
    ScaleType,
    Statistic,
    bits_per_element,
    check_width,
    levels,
    stored_bytes,
)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (QuantSpec(bits=4, group_size=32), range(-8, 8)),
        (QuantSpec(bits=4, group_size=32, codes=Codes.SYMMETRIC), range(-7, 8)),
        (QuantSpec(bits=1.58, group_size=32), [-1, 0, 1]),
        (QuantSpec(bits=2, group_size=32, grid=CodeGrid.ODD), [-3, -1, 1, 3]),
        (QuantSpec(bits=1, group_size=32, grid=CodeGrid.ODD), [-1, 1]),
        (PRESETS["mxfp4"], [-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]),
    ],
)
def test_levels(spec: QuantSpec, expected: object) -> None:
    np.testing.assert_array_equal(levels(spec), list(expected))  # type: ignore[call-overload]
    if spec.grid in (CodeGrid.INTEGER, CodeGrid.ODD):
        assert (spec.lowest_code, spec.highest_code) == (levels(spec)[0], levels(spec)[-1])


def test_levels_of_eight_bit_floats() -> None:
    """All bit patterns but those of infinities and NaN, and one of the two zeros."""
    import ml_dtypes

    for name, kind in (("mxfp8_e4m3", ml_dtypes.float8_e4m3fn), ("mxfp8_e5m2", ml_dtypes.float8_e5m2)):
        all_values = np.arange(256, dtype=np.uint8).view(kind).astype(np.float32)
        np.testing.assert_array_equal(levels(PRESETS[name]), np.unique(all_values[np.isfinite(all_values)]))
        with pytest.raises(ValueError, match="bit patterns"):
            PRESETS[name].lowest_code  # noqa: B018


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("q4_0", 4.5),
        ("q8_0", 8.5),
        ("tq2_0", 2.0625),
        ("mxfp4", 4.25),
        ("nvfp4", 4.5),
        ("w4a16_g128", 4.25),
        ("int3_g32", 3.5),
        ("int8_row", 8 + 32 / 512),
        ("torchao_int8_token", 8 + 40 / 512),
        ("binary_g32", 1.5),
    ],
)
def test_bits(name: str, bits: float) -> None:
    """Scale and zero point are shared by a group; a row has 512 elements."""
    assert bits_per_element(PRESETS[name], 512) == bits
    assert stored_bytes(PRESETS[name], (4, 512)) == 4 * 512 * bits / 8 + (4 if name == "nvfp4" else 0)
    assert stored_bytes(PRESETS[name], (512, 4), axis=0) == stored_bytes(PRESETS[name], (4, 512))


def test_bytes_of_a_tensor() -> None:
    """One float32 scale for the tensor, and in an asymmetric format a zero point."""
    symmetric = QuantSpec(bits=4, granularity=Granularity.PER_TENSOR)
    asymmetric = QuantSpec(bits=8, granularity=Granularity.PER_TENSOR, statistic=Statistic.MIN_MAX)
    assert stored_bytes(symmetric, (3, 5)) == 12  # 60 bits and 32
    assert stored_bytes(asymmetric, (3, 5)) == 15 + 5
    assert stored_bytes(PRESETS["q4_0"], (0, 32)) == 0
    assert bits_per_element(QuantSpec(bits=4, granularity=Granularity.PER_TENSOR), 7) == 4


@pytest.mark.parametrize(
    ("name", "width", "way_out"),
    [
        ("tq2_0", 576, "a format in groups of 64 or one scale per row"),
        ("q4_0", 50, "a format with one scale per row"),
        ("nvfp4", 0, "row"),
    ],
)
def test_widths_are_refused_by_name(name: str, width: int, way_out: str) -> None:
    with pytest.raises(
        ValueError, match=f"blocks.up.kernel is {width} wide, which {name} cannot hold.*{way_out}"
    ):
        check_width(PRESETS[name], width, what="blocks.up.kernel", name=name)
    check_width(PRESETS[name], 512, what="blocks.up.kernel")
    check_width(PRESETS["int8_row"], 577, what="blocks.up.kernel")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 9, "group_size": 32}, "bits is 9"),
        ({"bits": 4}, "group_size is None with granularity 'per_group'"),
        (
            {"bits": 4, "group_size": 32, "granularity": Granularity.PER_CHANNEL},
            "group_size is 32 with granularity 'per_channel'",
        ),
        ({"bits": 4, "group_size": 0}, "group_size is 0"),
        ({"bits": 4, "group_size": 32, "divisor": 0.0}, "divisor is 0.0"),
        ({"bits": 4, "group_size": 32, "divisor": float("nan")}, "divisor is nan"),
        ({"bits": 1, "group_size": 32}, "give grid ODD"),
        ({"bits": 8, "group_size": 32, "grid": CodeGrid.ODD}, "bits is 8 with grid ODD"),
        ({"bits": 8, "group_size": 32, "grid": CodeGrid.E2M1}, "e2m1 has 4 bits"),
        (
            {"bits": 4, "group_size": 32, "codes": Codes.SYMMETRIC, "statistic": Statistic.MIN_MAX},
            "MIN_MAX has a zero point, which needs an INTEGER grid",
        ),
        (
            {"bits": 4, "group_size": 32, "scale_type": ScaleType.E4M3},
            "scale_type e4m3 needs a second scale for the tensor",
        ),
    ],
)
def test_impossible_formats(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantSpec(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PRESETS)
def test_names(name: str) -> None:
    assert preset(name) is PRESETS[name]
    assert name_of(from_json(QuantSpec, to_json(PRESETS[name]))) == name


def test_other_names() -> None:
    with pytest.raises(ConfigError, match="there is no number format 'q4_1'. Did you mean 'q4_0'"):
        preset("q4_1")
    assert len(set(PRESETS.values())) == len(PRESETS)
    spec = dataclasses.replace(PRESETS["int5_g32"], group_size=64)
    assert name_of(spec) == "5 bits absmax/15, groups of 64, float16 scales"
    assert "e2m1" in name_of(dataclasses.replace(PRESETS["mxfp4"], group_size=64))
    assert "one scale per tensor" in name_of(QuantSpec(bits=8, granularity=Granularity.PER_TENSOR))
