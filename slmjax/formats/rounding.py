"""Rounding to the levels of a grid, and the codes of these levels.

Compilers may fuse a product and a sum into one operation that rounds once, which would change bits. A clip
between the two prevents it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from slmjax.formats.bits import as_bits, from_bits
from slmjax.formats.spec import LARGEST, CodeGrid, QuantSpec, Rounding

# Mantissa bits of the float grids, and their smallest normal value.
_FLOATS = {CodeGrid.E2M1: (1, 1.0), CodeGrid.E4M3: (3, 2.0**-6), CodeGrid.E5M2: (2, 2.0**-14)}
_FLOAT8 = {CodeGrid.E4M3: jnp.float8_e4m3fn, CodeGrid.E5M2: jnp.float8_e5m2}
_EXPONENT = 0x7F800000  # the exponent bits of a float32
_ONE_OVER = 0x7F000000  # minus the bits of 2**e, these are the bits of 2**-e


def nearest(scaled: Float[Array, "..."], spec: QuantSpec) -> Float[Array, "..."]:
    """Return the level of the grid nearest to each value, as float32.

    Args:
      scaled: x divided by its scale.
      spec: a format without a zero point.
    """
    if spec.grid is CodeGrid.INTEGER:
        return _nearest_integer(scaled, spec)
    if spec.grid is CodeGrid.ODD:
        low = float(spec.lowest_code)
        high = float(spec.highest_code)
        if spec.bits == 1:
            return jnp.where(scaled < 0, -1.0, jnp.where(scaled >= 0, 1.0, jnp.nan))
        return 2 * jnp.round(jnp.clip(scaled, low, high) * 0.5 - 0.5) + 1
    return nearest_float(scaled, spec.grid, spec.rounding)


def _nearest_integer(scaled: Array, spec: QuantSpec) -> Array:
    low = float(spec.lowest_code)
    high = float(spec.highest_code)
    if spec.rounding is Rounding.HALF_UP:
        # Engines add an offset, truncate a positive value, and clip. Clipping first gives the same codes.
        return jnp.floor(jnp.clip(scaled, low - 0.5, high + 0.25) + (0.5 - low)) + low
    scaled = jnp.clip(scaled, low, high)
    if spec.rounding is Rounding.HALF_EVEN:
        return jnp.round(scaled)
    magnitude = jnp.abs(scaled)
    below = jnp.floor(magnitude)
    over = (magnitude - below >= 0.5) if spec.rounding is Rounding.HALF_AWAY else (magnitude - below > 0.5)
    return jnp.copysign(below + over.astype(jnp.float32), scaled)


def nearest_to_zero_point(
    scaled: Float[Array, "..."], zero: Float[Array, "..."], spec: QuantSpec
) -> Float[Array, "..."]:
    """Return the nearest codes of an asymmetric format; the zero point is added after rounding."""
    low = float(spec.lowest_code)
    high = float(spec.highest_code)
    # No zero point would bring into range what the inner clip removes.
    return jnp.clip(jnp.round(jnp.clip(scaled, low - high, high - low)) + zero, low, high)


def nearest_float(
    scaled: Float[Array, "..."], grid: CodeGrid, rounding: Rounding = Rounding.HALF_EVEN
) -> Float[Array, "..."]:
    """Return the nearest level of a float grid, and the largest level for values above it.

    `rounding` is HALF_EVEN, or HALF_DOWN, which turns -0 into 0.
    """
    mantissa_bits, smallest_normal = _FLOATS[grid]
    scaled = jnp.clip(scaled, -LARGEST[grid], LARGEST[grid])
    # The power of two below the magnitude, by its bits. Levels around it are 2**-mantissa_bits times that
    # apart; below the smallest normal value they keep its distance.
    exponent = as_bits(jnp.maximum(jnp.abs(scaled), smallest_normal)) & _EXPONENT
    steps = scaled * from_bits(_ONE_OVER - exponent) * 2.0**mantissa_bits
    if rounding is Rounding.HALF_EVEN:
        rounded = jnp.round(steps)
    else:
        magnitude = jnp.abs(steps)
        below = jnp.floor(magnitude)
        rounded = jnp.where(steps < 0, -1.0, 1.0) * (below + (magnitude - below > 0.5).astype(jnp.float32))
        rounded = jnp.where(rounded == 0, 0.0, rounded)
    return rounded * (from_bits(exponent) * 2.0**-mantissa_bits)


def with_mantissa(x: Float[Array, "..."], bits: int) -> Float[Array, "..."]:
    """Round to `bits` bits of mantissa, ties to even, with the exponent range of float32."""
    last = 23 - bits
    # Adding just under half of the last bit, or half if that bit is odd, carries as rounding to even does.
    rounded = as_bits(x) + (2 ** (last - 1) - 1) + ((as_bits(x) >> last) & 1) & -(2**last)
    return jnp.where(jnp.isnan(x), x, from_bits(rounded))


def codes_of(values: Float[Array, "..."], grid: CodeGrid) -> Int[Array, "..."]:
    """Return the int8 codes of levels of the grid: integers as they are, floats as bit patterns."""
    if grid in _FLOAT8:
        return jax.lax.bitcast_convert_type(values.astype(_FLOAT8[grid]), jnp.int8)
    if grid is not CodeGrid.E2M1:
        return values.astype(jnp.int8)
    magnitude = jnp.abs(values)
    # From 1 on, the last exponent bits and the first mantissa bit of a float32 count up as the codes do.
    code = jnp.where(magnitude < 1, (2 * magnitude).astype(jnp.int32), (as_bits(magnitude) >> 22) - 252)
    return jnp.where(jnp.signbit(values), code + 8, code).astype(jnp.int8)


def values_of(codes: Int[Array, "..."], grid: CodeGrid) -> Float[Array, "..."]:
    """Return the float32 levels that codes represent: the inverse of `codes_of`."""
    if grid in _FLOAT8:
        return jax.lax.bitcast_convert_type(codes, _FLOAT8[grid]).astype(jnp.float32)
    if grid is not CodeGrid.E2M1:
        return codes.astype(jnp.float32)
    code = codes.astype(jnp.int32)
    unsigned = code & 7
    magnitude = jnp.where(unsigned < 2, 0.5 * unsigned.astype(jnp.float32), from_bits((unsigned + 252) << 22))
    return jnp.where(code > 7, -magnitude, magnitude)
