"""Number formats by name: those of inference engines, and basic ones for research.

`tests/formats/golden/` holds the codes and scales that the engines' own packages compute for the same values.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from slmjax.config import ConfigError, near_names
from slmjax.formats.spec import (
    TERNARY_BITS,
    CodeGrid,
    Codes,
    CodesFrom,
    Granularity,
    QuantSpec,
    Rounding,
    ScaleType,
    Scaling,
    Statistic,
)


def _quotient(x: float, divisor: int) -> float:
    """Divide in float32."""
    return float(np.float32(x) / np.float32(divisor))


# llama.cpp's blocks (gguf-py's quants): a float16 scale; codes are computed before it is rounded.
_GGUF = QuantSpec(
    bits=8,
    group_size=32,
    scale_type=ScaleType.FLOAT16,
    codes_from=CodesFrom.EXACT,
    scaling=Scaling.RECIPROCAL,
)
_Q4_0 = dataclasses.replace(
    _GGUF, bits=4, statistic=Statistic.SIGNED_MAX, divisor=8.0, rounding=Rounding.HALF_UP
)
_Q8_0 = dataclasses.replace(_GGUF, codes=Codes.SYMMETRIC, divisor=127.0, rounding=Rounding.HALF_AWAY)
_TQ2_0 = dataclasses.replace(
    _GGUF, bits=TERNARY_BITS, group_size=256, divisor=1.0, rounding=Rounding.HALF_AWAY
)

# torchao, 8-bit dynamic activations and 4-bit weights: a product with the reciprocal, and a minimum scale.
_TORCHAO = QuantSpec(bits=4, group_size=32, divisor=7.5, smallest_scale=2.0**-126, scaling=Scaling.RECIPROCAL)
_TORCHAO_TOKEN = dataclasses.replace(
    _TORCHAO,
    bits=8,
    granularity=Granularity.PER_CHANNEL,
    group_size=None,
    statistic=Statistic.MIN_MAX,
    divisor=1.0,
)

# compressed-tensors: a division; groups of zeros have float32's epsilon as their scale.
_COMPRESSED = QuantSpec(bits=4, group_size=32, divisor=7.5, scale_of_zeros=2.0**-23)
_COMPRESSED_ROW = dataclasses.replace(
    _COMPRESSED, bits=8, granularity=Granularity.PER_CHANNEL, group_size=None, divisor=127.5
)

# ai-edge-quantizer, for LiteRT: no lowest code in 8 bits; block scales are rounded to bfloat16; the largest
# magnitude counts as at least 1e-9.
_LITERT_ROW = QuantSpec(
    bits=8,
    codes=Codes.SYMMETRIC,
    granularity=Granularity.PER_CHANNEL,
    divisor=127.0,
    smallest_scale=_quotient(1e-9, 127),
)
_LITERT_ROW4 = dataclasses.replace(
    _LITERT_ROW, bits=4, codes=Codes.FULL, divisor=7.0, smallest_scale=_quotient(1e-9, 7)
)
_LITERT_BLOCK = dataclasses.replace(
    _LITERT_ROW4, granularity=Granularity.PER_GROUP, group_size=32, scale_type=ScaleType.BFLOAT16_IN_FLOAT16
)

# ONNX Runtime's MatMulNBits: Q4_0's codes, except where two values of opposite sign are the largest.
_ONNX = dataclasses.replace(_Q4_0, statistic=Statistic.FAR_END, scale_type=ScaleType.FLOAT32)

# The OCP's microscaling formats (MX specification 1.0): scales are powers of two, that of the largest
# magnitude, rounded down, over that of the grid's largest level.
_MXFP4 = QuantSpec(bits=4, grid=CodeGrid.E2M1, group_size=32, divisor=4.0, scale_type=ScaleType.E8M0)
_MXFP8_E4M3 = dataclasses.replace(_MXFP4, bits=8, grid=CodeGrid.E4M3, divisor=256.0)
_MXFP8_E5M2 = dataclasses.replace(_MXFP4, bits=8, grid=CodeGrid.E5M2, divisor=32768.0)
# gguf-py rounds ties towards zero, and has no -0. If the largest magnitude is within about five float32 steps
# below a power of two, its logarithm rounds up and its scale doubles, which is not reproduced here.
_MXFP4_GGUF = dataclasses.replace(_MXFP4, rounding=Rounding.HALF_DOWN)
# torchao's NVFP4: 8-bit float scales for groups of 16, at least 2**-6, and a float32 scale for the tensor.
_NVFP4 = QuantSpec(
    bits=4,
    grid=CodeGrid.E2M1,
    group_size=16,
    divisor=6.0,
    scale_type=ScaleType.E4M3,
    smallest_block_scale=2.0**-6,
)


def _group(spec: QuantSpec, size: int) -> QuantSpec:
    return dataclasses.replace(spec, group_size=size)


def _integers(bits: int) -> QuantSpec:
    """Return symmetric integers in groups of 32 with a float16 scale, which GGUF's blocks can hold."""
    highest = 2 ** (bits - 1) - 1
    return QuantSpec(
        bits=bits, codes=Codes.SYMMETRIC, group_size=32, divisor=float(highest), scale_type=ScaleType.FLOAT16
    )


# BitNet b1.58 (arXiv 2402.17764): the nearest of -1, 0, 1 in units of the mean magnitude.
_TERNARY = QuantSpec(
    bits=TERNARY_BITS, statistic=Statistic.ABSMEAN, group_size=256, scale_type=ScaleType.FLOAT16
)
# ParetoQ's stretched elastic quantizer (arXiv 2502.02631): 2 bits without zero, up to three quarters of the
# largest magnitude; three levels, up to two thirds of it; one bit in units of the mean magnitude.
_STRETCHED_2 = QuantSpec(bits=2, grid=CodeGrid.ODD, group_size=32, divisor=4.0, scale_type=ScaleType.FLOAT16)
_STRETCHED_TERNARY = QuantSpec(bits=TERNARY_BITS, group_size=256, divisor=1.5, scale_type=ScaleType.FLOAT16)
_BINARY = QuantSpec(
    bits=1, grid=CodeGrid.ODD, group_size=32, statistic=Statistic.ABSMEAN, scale_type=ScaleType.FLOAT16
)

PRESETS: Mapping[str, QuantSpec] = MappingProxyType(
    {
        "q4_0": _Q4_0,
        "q8_0": _Q8_0,
        "tq2_0": _TQ2_0,
        "torchao_int4": _TORCHAO,
        "torchao_int8_token": _TORCHAO_TOKEN,
        "w4a16_g32": _COMPRESSED,
        "w4a16_g128": _group(_COMPRESSED, 128),
        "int8_row": _COMPRESSED_ROW,
        "litert_int8_row": _LITERT_ROW,
        "litert_int4_row": _LITERT_ROW4,
        "litert_int4_b32": _LITERT_BLOCK,
        "litert_int4_b64": _group(_LITERT_BLOCK, 64),
        "litert_int4_b128": _group(_LITERT_BLOCK, 128),
        "litert_int4_b256": _group(_LITERT_BLOCK, 256),
        "onnx_int4_b32": _ONNX,
        "mxfp4": _MXFP4,
        "mxfp4_gguf": _MXFP4_GGUF,
        "mxfp8_e4m3": _MXFP8_E4M3,
        "mxfp8_e5m2": _MXFP8_E5M2,
        "nvfp4": _NVFP4,
        **{f"int{bits}_g32": _integers(bits) for bits in range(2, 9)},
        "ternary_g256": _TERNARY,
        "ternary_row": dataclasses.replace(_TERNARY, granularity=Granularity.PER_CHANNEL, group_size=None),
        "stretched2_g32": _STRETCHED_2,
        "stretched_ternary_g256": _STRETCHED_TERNARY,
        "stretched_ternary_row": dataclasses.replace(
            _STRETCHED_TERNARY, granularity=Granularity.PER_CHANNEL, group_size=None
        ),
        "binary_g32": _BINARY,
        "binary_row": dataclasses.replace(_BINARY, granularity=Granularity.PER_CHANNEL, group_size=None),
    }
)


def preset(name: str) -> QuantSpec:
    """Return the format of this name. Raises ConfigError, with near names, for an unknown name."""
    if name not in PRESETS:
        raise ConfigError(
            f"there is no number format {name!r}.{near_names(name, PRESETS)} There are {', '.join(PRESETS)}"
        )
    return PRESETS[name]


def name_of(spec: QuantSpec) -> str:
    """Return the preset's name, or a description: "5 bits absmax/15, groups of 64, float16 scales"."""
    for name, preset_spec in PRESETS.items():
        if preset_spec == spec:
            return name
    grid = "" if spec.grid is CodeGrid.INTEGER else f" {spec.grid.value}"
    scales = (
        f"groups of {spec.group_size}"
        if spec.granularity is Granularity.PER_GROUP
        else f"one scale {spec.granularity.value.replace('_', ' ')}"
    )
    rule = f"{spec.bits:g} bits{grid} {spec.statistic.value}/{spec.divisor:g}"
    return f"{rule}, {scales}, {spec.scale_type.value} scales"
